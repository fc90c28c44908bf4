"use strict";
const nats = v => (v > 0 ? "+" : v < 0 ? "−" : "") + String(Math.abs(v)).replace("e-", "e−");
const make = (tag, text, parent) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.append(e);
  return e;
};
const tint = (v, largest) => {
  const a = Math.asinh(20 * Math.abs(v) / largest) / Math.asinh(20) * .6;
  return a < .01 ? "transparent" : `rgba(var(--${v > 0 ? "up" : "down"}-rgb),${a.toFixed(3)})`;
};
// One stop of the Tab key for many things; arrow keys go from one to the next.
const roam = (box, list) => {
  list.forEach((e, i) => {
    e.tabIndex = i ? -1 : 0;
    e.setAttribute("role", "button");
    e.addEventListener("keydown", k => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[k.key];
      const next = step && list[i + step];
      if (!next) return;
      k.preventDefault();
      e.tabIndex = -1; next.tabIndex = 0; next.focus();
    });
  });
};
const size = list => list.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-30);
for (const who of document.querySelectorAll(".who")) {
  const data = JSON.parse(document.getElementById("tokens-" + who.dataset.section).textContent);
  // Isolated, so that letters of right-to-left scripts leave the numbers beside them in place.
  for (const part of [...data.responses, ...data.sequences])
    part.tokens = part.tokens.map(t => `\u2068${t}\u2069`);
  const find = c => who.querySelector(c);
  const select = find("select"), says = find(".says"), grid = find(".grid");
  const show = () => {
    const r = data.responses[Number(select.value)], all = data.sequences.flatMap(s => s.tokens);
    find(".observed").replaceChildren(); find(".updated").replaceChildren();
    const label = (box, text) => make("div", text, box).className = "soft";
    const spans = (box, tokens) => {
      const text = make("div", undefined, box); text.className = "text";
      return tokens.map(t => {
        const s = make("span", t, text);
        text.append("\u200b");
        return s;
      });
    };
    label(find(".observed"), r.name);
    const top = spans(find(".observed"), r.tokens);
    const low = data.sequences.flatMap(s => {
      label(find(".updated"), "update: " + s.name); return spans(find(".updated"), s.tokens);
    });
    let held = null;
    const entry = r.influence ? size(r.influence.map(size)) : 1;
    const paint = (list, values, what, largest = size(values)) => {
      list.forEach((s, i) => {
        s.style.background = tint(values[i], largest);
        s.title = what(i) + nats(values[i]) + " nats";
      });
    };
    const rest = () => {
      [...top, ...low].forEach(s => s.classList.remove("on"));
      paint(top, r.delta, i => `Δ log π of ${r.tokens[i]}: `);
      paint(low, r.columns, i => `${all[i]} on the whole response: `);
      says.textContent = "";
    };
    const ask = (span, list, values, sentence) => {
      rest();
      span.classList.add("on");
      paint(list, values, () => "", entry);
      says.textContent = sentence;
    };
    const listen = (span, act) => {
      span.addEventListener("mouseenter", () => held || act());
      span.addEventListener("mouseleave", () => held || rest());
      span.addEventListener("focus", () => held || act());
      span.addEventListener("blur", () => held || rest());
      const hold = () => { held = held === span ? null : span; rest(); act(); };
      span.addEventListener("click", hold);
      span.addEventListener("keydown", e => e.key === "Enter" && hold());
    };
    rest();
    roam(find(".observed"), top);
    roam(find(".updated"), low);
    grid.replaceChildren();
    if (!r.influence) { make("p", "too large for a table; see the pictures", grid); return; }
    top.forEach((s, m) => listen(s, () => ask(s, low, r.influence[m],
      `‘${r.tokens[m]}’ moved by ${nats(r.delta[m])} nats; below, what each token did to it`)));
    low.forEach((s, l) => listen(s, () => ask(s, top, r.influence.map(row => row[l]),
      `‘${all[l]}’ moved the response by ${nats(r.columns[l])} nats; above, each of its tokens`)));
    const fill = () => {
      if (grid.firstChild) return;
      const table = make("table", undefined, grid), head = make("tr", undefined,
        make("thead", undefined, table)), body = make("tbody", undefined, table);
      make("th", "", head); all.forEach(t => make("th", t, head));
      const largest = size(r.influence.map(size));
      r.influence.forEach((row, m) => {
        const line = make("tr", undefined, body); make("th", r.tokens[m], line);
        row.forEach((v, l) => {
          const cell = make("td", undefined, line); cell.style.background = tint(v, largest);
          cell.title = `${r.tokens[m]} [${m}] by ${all[l]}: ${nats(v)} nats`;
        });
      });
    };
    find("details").ontoggle = fill;
    if (find("details").open) fill();
  };
  select.addEventListener("change", show);
  show();
}

const read = id => JSON.parse(document.getElementById(id).textContent);
const pairs = document.querySelector(".pairs");
if (pairs) {
  const FIRST = 20;
  const table = pairs.querySelector("table"), bodies = [...table.tBodies];
  const all = document.querySelector(".all"), find = document.querySelector(".find");
  const found = document.querySelector(".found"), scores = read("scores-data");
  const number = Object.fromEntries(scores.pairs.map((pair, i) => [pair, i]));
  let whole = bodies.length <= FIRST;
  const show = () => {
    const words = find.value.trim().toLowerCase();
    const hits = [...table.tBodies].filter(b => !words || b.textContent.toLowerCase().includes(words));
    bodies.forEach(b => { b.hidden = true; });
    (whole || words ? hits : hits.slice(0, FIRST)).forEach(b => { b.hidden = false; });
    found.textContent = words ? `${hits.length} of ${bodies.length}` : "";
    all.hidden = whole || Boolean(words);
    all.textContent = `Show all ${bodies.length}`;
  };
  const open = (body, on) => {
    const inside = body.querySelector(".inside");
    body.querySelector(".open").setAttribute("aria-expanded", String(on));
    inside.hidden = !on;
    const box = inside.querySelector(".pair");
    if (!on || box.querySelector("details")) return;
    const details = make("details", undefined, box);
    make("summary", "all scores of this pair", details);
    const list = make("dl", undefined, details), at = number[body.id.slice(5)];
    scores.names.forEach((name, k) => {
      const line = make("div", undefined, list);
      make("dt", name, line).title = scores.meanings[name];
      make("dd", String(scores.values[at][k] ?? "not a number"), line);
    });
  };
  const go = id => {
    const body = document.getElementById(id);
    if (!body || !bodies.includes(body)) return;
    if (body.hidden) { whole = true; find.value = ""; show(); }
    open(body, true);
    body.scrollIntoView({ block: "center" });
    body.querySelector(".open").focus({ preventScroll: true });
  };
  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), key = button.dataset.key;
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const th of table.tHead.querySelectorAll("th")) th.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = b => key === "outcome" ? b.dataset.outcome : Number(b.getAttribute("data-" + key));
      const sorted = [...table.tBodies].sort((a, b) => {
        const x = value(a), y = value(b);
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      });
      table.append(...sorted);
      show();
    });
  }
  bodies.forEach(body => body.querySelector(".open").addEventListener("click", e =>
    open(body, e.currentTarget.getAttribute("aria-expanded") !== "true")));
  find.addEventListener("input", show);
  all.addEventListener("click", () => { whole = true; show(); found.focus(); });
  addEventListener("hashchange", () => go(decodeURIComponent(location.hash.slice(1))));
  document.addEventListener("click", e => {
    const link = e.target.closest("a");
    const to = link && (link.getAttribute("href") || "");
    if (to && to.startsWith("#pair-")) { e.preventDefault(); go(to.slice(1)); }
  });
  show();
  if (location.hash.startsWith("#pair-")) go(location.hash.slice(1));

  const map = document.querySelector(".map"), data = read("map-data"), n = data.pairs.length;
  const canvas = map.querySelector("canvas"), says = map.querySelector(".says");
  const select = map.querySelector("select"), noun = map.dataset.noun;
  const views = data.views.map(v =>
    ({ ...v, cells: Int8Array.from(atob(v.cells), c => c.charCodeAt(0)) }));
  const mark = { row: -1, column: -1 };
  const zoom = Math.max(1, Math.ceil(512 / n));
  canvas.width = canvas.height = n * zoom;
  const draw = () => {
    const view = views[Number(select.value)], context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const [up, down] = ["--up-rgb", "--down-rgb"].map(k => style.getPropertyValue(k));
    context.clearRect(0, 0, canvas.width, canvas.height);
    view.cells.forEach((v, i) => {
      const shade = Math.asinh(Math.abs(v) / 6) / Math.asinh(127 / 6);
      context.fillStyle = `rgba(${v > 0 ? up : down},${shade.toFixed(3)})`;
      context.fillRect((i % n) * zoom, Math.floor(i / n) * zoom, zoom, zoom);
    });
    if (mark.row < 0) return;
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = Math.max(1, n * zoom / 256);
    context.strokeRect(mark.column * zoom, mark.row * zoom, zoom, zoom);
  };
  const point = (row, column) => {
    mark.row = Math.min(Math.max(row, 0), n - 1); mark.column = Math.min(Math.max(column, 0), n - 1);
    const view = views[Number(select.value)];
    const value = view.cells[mark.row * n + mark.column] / 127 * view.largest;
    const [one, other] = [data.rows[mark.row], data.rows[mark.column]];
    says.textContent = view.name === "alike"
      ? `${noun}s ${one} and ${other}: cosine ${nats(Number(value.toFixed(2)))}`
      : `${noun} ${other} moves log π(y+) of ${noun} ${one} by ${nats(Number(value.toPrecision(2)))} nats`;
    draw();
  };
  const where = e => {
    const box = canvas.getBoundingClientRect();
    point(Math.floor((e.clientY - box.top) / box.height * n),
          Math.floor((e.clientX - box.left) / box.width * n));
  };
  canvas.addEventListener("pointermove", where);
  canvas.addEventListener("click", where);
  canvas.addEventListener("keydown", e => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (e.key === "Enter" && mark.row >= 0) go("pair-" + data.pairs[mark.row]);
    if (!step[e.key]) return;
    e.preventDefault();
    point(mark.row + step[e.key][0], mark.column + step[e.key][1]);
  });
  select.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}
