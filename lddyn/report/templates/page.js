"use strict";
const nats = v => (v > 0 ? "+" : v < 0 ? "−" : "") + String(Math.abs(v)).replace("e-", "e−");
const make = (tag, text, parent) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.append(e);
  return e;
};
const tint = (v, largest) => {
  const a = Math.asinh(20 * Math.abs(v) / largest) / Math.asinh(20) * .75;
  return a < .01 ? "transparent" : `rgba(var(--${v > 0 ? "up" : "down"}-rgb),${a.toFixed(3)})`;
};
const size = list => list.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-30);
for (const who of document.querySelectorAll(".who")) {
  const data = JSON.parse(document.getElementById("tokens-" + who.dataset.section).textContent);
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
      span.addEventListener("click", () => {
        held = held === span ? null : span; rest(); if (held) act();
      });
    };
    rest();
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
