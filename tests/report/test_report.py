"""Pages of a diagnosis and of a watched run in a real browser: nothing loads, nothing runs."""

import io
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import browser as chromium
import pytest
import torch
import zoo

import lddyn
from lddyn import report
from lddyn.files import sealed
from lddyn.probes.probe_set import LABELS
from lddyn.report.page import _isolated, _json
from lddyn.sets.diagnosis import Diagnosis
from lddyn.sets.page import write_page
from lddyn.sets.pair_steps import take_apart
from lddyn.sets.pairs import PairSet
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.scores import SCORES
from lddyn.sets.step import SetStep
from lddyn.sets.summary import summarise
from lddyn.text import hides, readable, visible

ALERT = "window.pwned=1"
NAMES = [name for name in SCORES if not name.startswith("run_")]
HOSTILE = [
    f"<script>{ALERT}</script>",
    f"</script><script>{ALERT}</script>",
    f"<ScRiPt>{ALERT}</sCrIpT >",
    f"<img src=x onerror={ALERT}>",
    f"<svg onload={ALERT}>",
    f"<svg><script>{ALERT}</script></svg>",
    f'"><script>{ALERT}</script>',
    f"'><script>{ALERT}</script>",
    f'" onmouseover="{ALERT}" x="',
    f"' onfocus='{ALERT}' autofocus='",
    f"` onmouseover={ALERT} `",
    f'"></canvas><body onload={ALERT}>',
    f"</title><script>{ALERT}</script>",
    f"</style><script>{ALERT}</script>",
    f"</textarea></noscript><script>{ALERT}</script>",
    f"--><script>{ALERT}</script><!--",
    f"]]><script>{ALERT}</script>",
    f"<!--<script>{ALERT}//-->",
    f'<iframe srcdoc="<script>parent.{ALERT}</script>">',
    f"<iframe src=javascript:{ALERT}>",
    f"<a href=javascript:{ALERT}>x</a>",
    f"javascript:{ALERT}",
    f"<math><mtext></form><form><mglyph><style></math><img src onerror={ALERT}>",
    f"<details open ontoggle={ALERT}>",
    f"<object data='javascript:{ALERT}'>",
    "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example/'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<form action=//evil.example/><input name=x></form>",
    "<style>*{display:none}@import '//evil.example/x.css'</style>",
    "{{ 7 * 7 }}{% for x in range(9) %}{{ x }}{% endfor %}{# gone #}",
    "${7*7} #{7*7} <%= 7*7 %> {{constructor.constructor('alert(1)')()}}",
    "a\u202eb\u2066c\u2069\u200fd",  # reorders
    "nul\0bell\x07back\x08\x7f",
    "\x1b[31mred\x1b]0;title\x07\x9b2J",  # moves a terminal's cursor
    "Z" + "\u0301\u0489" * 40,  # piles marks up
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\ufeff\U000e0041"
    "blank\u3164\u115f\u034f\u2800\ufe01\U000e0101\u00ad\u061c\u2029end",
    "\ud800 lone \udfff",
    "&lt;script&gt; &amp; &#60; &#x3c;script&#x3e; %3Cscript%3E \\u003cscript\\u003e",
    "x" * 3000,
]


class Tokenizer:
    """Says the hostile strings."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids):
        return "".join(self.texts[(int(i) - 3) % len(self.texts)] for i in ids)


def some_pairs(texts, count=5):
    """Pairs of tokens that are these texts, two in a response."""
    found = []
    for i in range(count):
        at = [(8 * i + k) % len(texts) for k in range(8)]
        ids, words = [3 + a for a in at], [texts[a] for a in at]
        found.append(
            tuple(
                lddyn.Example(
                    ids[:2], ids[k : k + 3], tokens=words[k : k + 3], prompt_tokens=words[:2]
                )
                for k in (2, 5)
            )
        )
    return found


def some_rows(kind="irr_train", steps=12):
    return [
        {
            "step": s,
            "overhead": 0.04,
            "log_prob/chosen": -9 - 0.1 * s,
            "change/chosen": -0.1 * s,
            "change/rejected": -5.0 * s,
            "log_prob/rejected": -80 - 5.0 * s,
            f"change/{kind}": -0.3 * s,
            "greedy/chosen": -5.0,
            "greedy/rejected": -30 + 0.2 * s,
            "entropy/chosen": 1 + 0.01 * s,
            "step/chosen": -0.1,
            "first_order/chosen": -0.11,
        }
        for s in range(steps)
    ]


@pytest.fixture(scope="module")
def model():
    return zoo.train(zoo.build("llama")).eval()


def write(model, folder, texts, kind="irr_train", facts=None):
    tokenizer = Tokenizer(texts)
    pairs = some_pairs(texts)
    found = lddyn.diagnose(model, pairs, beta=0.3, close_ups=2)
    return write_page(
        found,
        folder / "index.html",
        tokenizer=tokenizer,
        dynamics=some_rows(kind),
        pair_steps=take_apart(found, model, tokenizer, found.worst(2)),
        measured=torch.arange(len(found)).double(),
        extra=facts or {"model": "tiny"},
    )


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    words = ["Yes", ", ", "you ", "can", " say", " that", ".", "\n"] * 5
    return write(model, tmp_path_factory.mktemp("calm"), words)


@pytest.fixture(scope="module")
def hostile(model, tmp_path_factory):
    facts = {HOSTILE[0]: HOSTILE[1], "data": HOSTILE[6]}
    return write(model, tmp_path_factory.mktemp("hostile"), HOSTILE, HOSTILE[3], facts)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    chromium.needed()
    found = chromium.Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield found
    found.close()


OPEN_ALL = """(() => {
  document.querySelectorAll('.all').forEach(b => b.click());
  document.querySelectorAll('.open[aria-expanded=false]').forEach(b => b.click());
  document.querySelectorAll('details').forEach(d => { d.open = true; });
})()"""
LOOKS = {
    "light": {},
    "dark": {"dark": True},
    "phone": {"width": 360, "height": 740},
    "dark phone": {"width": 360, "height": 740, "dark": True},
}


@pytest.mark.case("texts that hide or reorder characters, in a page")
def test_no_character_of_a_page_hides_or_reorders_text(hostile):
    text = hostile.read_text(encoding="utf-8")
    assert {c for c in text if hides(c)} <= {"\n", "\t"}
    assert r"\u202e" in text and r"\u3164" in text


def test_a_script_is_given_nothing_hidden():
    value = {"a\u202e": ["b\u200b", ("c\u3164", 1.5, None)]}
    expected = {r"a\u202e": [r"b\u200b", [r"c\u3164", 1.5, None]]}
    assert json.loads(_json(value, ensure_ascii=False)) == expected


@pytest.mark.case("letters of right-to-left scripts in a page")
def test_right_to_left_text_is_isolated_from_the_numbers_beside_it(tmp_path):
    """A number that follows such a word would else be shown before it."""
    rows = [{"step": step, "log_prob/a": -1.0 - step} for step in range(2)]
    report.write_dynamics(rows, tmp_path / "x.html", title="שלום, עולם! +0.5 nats")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<title>שלום, עולם! +0.5 nats" in text
    assert "<h1><bdi>שלום, עולם</bdi>! +0.5 nats" in text
    kept = '<p title="א">a<svg><text>ב</text></svg><script>"ג"</script>'
    assert _isolated(kept + "&lt;د&gt; 1") == kept + "&lt;<bdi>د</bdi>&gt; 1"


# --------------------------------------------------------------------------- in the browser


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_opens_alone_and_fits(tab, page, look):
    tab.open(page, **LOOKS[look])
    for step in ("0", OPEN_ALL):
        tab.js(step)
        assert tab.js("document.documentElement.scrollWidth <= innerWidth"), step
    assert tab.complaints() == []


def test_a_watched_run_opens_alone_and_fits(tab, tmp_path):
    path = report.write_dynamics(some_rows(), tmp_path / "index.html")
    for look in LOOKS.values():
        tab.open(path, **look)
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        assert tab.js("document.querySelectorAll('polyline').length") == 8
        assert tab.complaints() == []


# Of every text that is seen, on all that lies behind it: WCAG's contrast, and what it must be.
CONTRAST = """(() => {
  const parse = c => [...c.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walker.nextNode()) {
    const text = walker.currentNode, e = text.parentElement;
    if (!text.data.trim() || !e.getClientRects().length || e.closest("script, option, noscript"))
      continue;
    const behind = [];
    for (let p = e; p; p = p.parentElement) behind.push(parse(getComputedStyle(p).backgroundColor));
    let ground = parse(getComputedStyle(document.documentElement).backgroundColor);
    for (const c of behind.reverse()) ground = over(c, ground);
    const style = getComputedStyle(e);
    const ink = over(parse(e.closest("svg") ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24 ||
      parseFloat(style.fontSize) >= 18.6 && Number(style.fontWeight) >= 700;
    count += 1;
    if ((a + .05) / (b + .05) < (large ? 3 : 4.5))
      bad.push([text.data.slice(0, 30), ((a + .05) / (b + .05)).toFixed(2)]);
  }
  return [count, bad];
})()"""


@pytest.mark.parametrize("look", ["light", "dark"])
def test_every_text_can_be_read(tab, page, look):
    tab.open(page, **LOOKS[look])
    tab.js(OPEN_ALL)
    count, bad = tab.js(CONTRAST)
    assert count > 300 and bad == []


def test_dark_mode_is_dark(tab, page):
    from PIL import Image

    def mean(**look):
        tab.open(page, **look)
        shot = tab.screenshot(900)
        folder = os.environ.get("LDDYN_SCREENSHOTS")
        if folder:  # to look at
            Path(folder, f"{'-'.join(look) or 'light'}.png").write_bytes(shot)
        image = Image.open(io.BytesIO(shot)).convert("L")
        return sum(image.tobytes()) / (image.width * image.height)

    assert mean() > 200 and mean(width=360) > 200 and mean(dark=True) < 80


def test_the_keyboard_reaches_everything(tab, page):
    tab.open(page)
    tab.press("Tab")
    assert tab.js("document.activeElement.className") == "skip"
    wanted = {"links", "find", "sort", "open", "canvas", "select", "token", "summary", "scroll"}
    kind = """(e => Object.entries({links: 'nav a', find: '.find', sort: 'th button', open: '.open',
      canvas: 'canvas', select: 'select', token: '.text span', summary: 'summary',
      scroll: '.scroll'}).find(([, where]) => e.matches(where))?.[0])(document.activeElement)"""
    seen, order = set(), []
    for _ in range(120):
        tab.press("Tab")
        seen.add(tab.js(kind))
        top = tab.js("document.activeElement.getBoundingClientRect().top + scrollY")
        if tab.js("document.activeElement === document.body"):
            break
        order.append(top)
    assert wanted <= seen
    # The order of tabs is that of the page: none jumps back by more than a line of the layout.
    assert all(later > earlier - 700 for earlier, later in itertools.pairwise(order))


def test_sort_and_open_by_keyboard(tab, page):
    tab.open(page)
    column = "[...document.querySelectorAll('.pairs tbody')].map(b => Number(b.dataset.set_chosen))"
    tab.js("document.querySelector('th button[data-key=set_chosen]').focus()")
    tab.press("Enter")
    rising = tab.js(column)
    assert rising == sorted(rising) and len(set(rising)) > 2
    heading = "document.activeElement.closest('th').getAttribute('aria-sort')"
    assert tab.js(heading) == "ascending"
    tab.press("Enter")
    assert tab.js(column) == rising[::-1] and tab.js(heading) == "descending"
    assert tab.js("document.querySelectorAll('th[aria-sort=ascending]').length") == 0
    tab.js("document.querySelector('.open').focus()")
    visible = "document.querySelector('.pairs tbody .inside').getClientRects().length > 0"
    assert not tab.js(visible)
    tab.press("Enter")
    assert (
        tab.js(visible) and tab.js("document.activeElement.getAttribute('aria-expanded')") == "true"
    )
    assert tab.js("document.querySelectorAll('tbody .inside dl dt').length") == len(NAMES)
    tab.press("Enter")
    assert not tab.js(visible)
    assert tab.complaints() == []


def test_find_links_and_fragments(tab, page):
    tab.open(page, fragment="#pair-3")
    opened = "document.querySelector('#pair-3 .inside').getClientRects().length > 0"
    assert tab.js(opened)
    tab.open(page)
    assert not tab.js(opened)
    tab.js(
        "document.querySelector('.dot').closest('a[href]') && [...document.querySelectorAll("
        "'svg a')].find(a => a.getAttribute('href') === '#pair-3').dispatchEvent("
        "new MouseEvent('click', {bubbles: true, cancelable: true}))"
    )
    assert tab.js(opened) and tab.js("document.activeElement.closest('tbody').id") == "pair-3"
    tab.js("document.querySelector('.find').focus()")
    tab.type("pair 2")
    shown = "[...document.querySelectorAll('.pairs tbody')].filter(b => !b.hidden).map(b => b.id)"
    assert "pair-2" in tab.js(shown) and len(tab.js(shown)) < 5


def test_the_map_and_the_tokens_answer_keys(tab, page):
    tab.open(page)
    says = "document.querySelector('.map .says').textContent"
    tab.js("document.querySelector('canvas').focus()")
    tab.press("ArrowDown")
    assert "cosine +1" in tab.js(says)  # the first cell is on the diagonal
    tab.press("ArrowRight")
    assert "cosine" in tab.js(says) and "cosine +1" not in tab.js(says)
    tab.press("Enter")
    assert tab.js("document.activeElement.className") == "open"
    says = "document.querySelector('.who .says').textContent"
    tab.js("document.querySelector('.observed .text span').focus()")
    assert "moved by" in tab.js(says)
    first = tab.js(says)
    tab.press("ArrowRight")
    assert tab.js(says) != first
    tab.press("Enter")  # held: leaving it changes nothing
    held = tab.js(says)
    tab.press("Tab")
    assert tab.js(says) == held
    painted = "document.querySelector('canvas').getContext('2d').getImageData(2, 2, 1, 1).data[3]"
    assert tab.js(painted) == 255


def test_hostile_texts_do_nothing(tab, hostile, page):
    tab.open(hostile)
    before = tab.js("document.querySelectorAll('*').length")
    tab.js(OPEN_ALL)
    tab.js(
        "document.querySelectorAll('.text span, .open, th button').forEach(e => { e.focus();"
        "e.dispatchEvent(new MouseEvent('mouseover', {bubbles: true})); })"
    )
    assert tab.complaints() == []
    assert tab.js("window.pwned") is None and before > 100
    names = "[...new Set([...document.querySelectorAll('*')].map(e => e.tagName))].sort()"
    marks = (
        "[...new Set([...document.querySelectorAll('*')].flatMap(e => "
        "e.getAttributeNames()))].sort()"
    )
    scripts = "document.scripts.length"
    found = [tab.js(x) for x in (names, marks, scripts)]
    text = tab.js("document.body.textContent")
    tab.open(page)
    tab.js(OPEN_ALL)
    calm = [tab.js(x) for x in (names, marks, scripts)]
    assert set(found[0]) <= set(calm[0]) and set(found[1]) <= set(calm[1]) and found[2] == calm[2]
    assert len(HOSTILE) == 40
    for line in HOSTILE:
        assert readable(line)[:500] in text or visible(line)[:500] in text, line


def test_the_policy_holds_even_where_escaping_would_not(tab, page, tmp_path):
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8").replace(
        "<h1>",
        f"<script>{ALERT}</script><img src=x onerror={ALERT}>"
        "<img src=https://evil.example/x.png><h1>",
    )
    broken.write_text(text, encoding="utf-8")
    tab.open(broken)
    refused = [p for m, p in tab.complaints() if m == "Log.entryAdded"]
    assert tab.js("window.pwned") is None and len(refused) >= 3
    assert tab.js("document.querySelectorAll('.pairs tbody[hidden]').length >= 0")


def test_large_tables_stay_quick(tab, tmp_path):
    found = synthetic(500)
    path = write_page(found, tmp_path / "index.html")
    assert path.stat().st_size < 2_500_000
    tab.open(path)
    spent = tab.js("""(() => { const start = performance.now();
      document.querySelector('.all').click();
      document.querySelector('th button[data-key=cosine]').click();
      document.querySelector('.pairs').offsetHeight; return performance.now() - start; })()""")
    assert spent < 2000
    assert tab.js("document.querySelectorAll('.pairs tbody:not([hidden])').length") == 500
    assert "256 pairs" in tab.js("document.querySelector('#map + p').textContent")


# --------------------------------------------------------------------------- without one


def synthetic(count, fall=0.0, objective="dpo", row_numbers=None, faults=None):
    """A diagnosis of a random Gram."""
    generator = torch.Generator().manual_seed(0)
    words = ["some ", "words ", "of ", "a ", "response ", "that ", "is ", "long "] * 10
    pairs = [
        tuple(
            lddyn.Example(
                [1, 2],
                list(range(80)),
                tokens=[*words[:-1], f"{i} {s}"],
                prompt_tokens=["What ", "now? "],
            )
            for s in "+-"
        )
        for i in range(count)
    ]
    rows = torch.randn(2 * count, 64, generator=generator, dtype=torch.float64)
    rows[:count, 0] += fall
    rows[count:, 0] += 3 * fall
    gram = rows @ rows.T
    facts = {name: torch.randn(count, generator=generator).double() for name in NAMES}
    log_probs = -torch.rand(2, count, generator=generator).double() * 50
    set_ = PairSet.of(pairs, row_numbers, faults)
    readings = Readings(log_probs, facts, {})
    return Diagnosis(SetStep(lddyn.Loss(objective), set_, readings, Gram(gram), log_probs))


def said_of(found, measured=None, dynamics=()):
    """What a sentence is about -> its text."""
    sentences = report.explain_diagnosis(summarise(found, measured=measured), dynamics)
    return {row["about"]: row["text"] for row in sentences}


def test_the_answer_names_the_mechanism():
    found = synthetic(40, fall=3.0)
    said = said_of(found)
    parts = found.gram[:40] / 80
    taken = -0.1 * parts[:, 40:].sum(1).mean()
    own = -0.1 * parts[:, 40:].diagonal().mean()
    assert said["the answer"].startswith("The chosen log-probs fall on average, and in")
    part = 100 * float(1 - own / taken)
    assert f"from pushing y− down ({part:.0f}% of it from other pairs' y−)" in said["the answer"]
    falling = int((found.scores["set_chosen"] < 0).sum())
    assert f"and in {falling} of 40 pairs. On average over all pairs," in said["the answer"]
    assert "lowering the rejected responses of other pairs" in said["the mechanism"]
    states = [row["state"] for row in report.warnings(found.summary())]
    assert states[0] == "act" and states == sorted(states, key=["act", "note", "fine"].index)


def test_where_some_fall_it_speaks_of_those():
    found = synthetic(30)
    falls = found.scores["set_chosen"] < 0
    assert 0 < int(falls.sum()) < 15 and float(found.scores["set_chosen"].mean()) > 0
    said = said_of(found)["the answer"]
    some = int(falls.sum())
    assert said.startswith("On average the chosen log-probs do not fall, but they do in ")
    assert f"but they do in {some} of 30 pairs. On average over these {some} pairs, log π" in said


def test_where_nothing_falls_it_says_so():
    found = synthetic(6, objective="sft")
    assert bool((found.scores["set_chosen"] > 0).all())
    assert said_of(found)["the answer"].startswith("At this point the chosen log-probs do not fall")
    text = page_of(found)
    assert "<title>Do the chosen" in text and f"torch {torch.__version__}" in text


def test_the_first_sentence_owns_up_to_what_a_run_does():
    found = synthetic(6, objective="sft")
    fell = torch.full((6,), -1.5).double()
    answer = said_of(found, measured=fell)["the answer"]
    assert "do not fall: a small step lowers log π(y+) of no pair. But the training" in answer
    assert answer.endswith(
        "But the training that followed lowered the chosen log-probs by 1.5 nats on average."
    )
    assert "But" not in said_of(found, measured=-fell)["the answer"]
    watched = [{"step": 0, "change/chosen": 0.0}, {"step": 9, "change/chosen": -0.93}]
    answer = said_of(found, dynamics=watched)["the answer"]
    assert "But the watched run lowered the chosen log-probs by 0.93 nats" in answer
    run = lddyn.Run(lr=0.1, optimizer="sgd")
    ahead = replace(found.simulate(run), change=torch.stack([fell, fell]))
    answer = said_of(replace(found, forecast=ahead))["the answer"]
    assert "But the planned run is predicted to lower the chosen log-probs by 1.5 nats" in answer
    rises = synthetic(40, fall=3.0)
    answer = said_of(rises, measured=torch.ones(40))["the answer"]
    assert (
        answer.startswith("The chosen log-probs fall on average")
        and "the training that followed raised the chosen log-probs by 1 nat on average" in answer
    )


def test_no_pair_is_called_harmful_that_is_not():
    helpful = page_of(synthetic(6, objective="sft"))
    assert "the least helpful first" in helpful and "most harmful" not in helpful
    assert "The pairs, the most harmful first" in page_of(synthetic(40, fall=3.0))


def page_of(found, **given):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_page(found, Path(folder, "deep", "x.html"), **given)
        assert (path.parent / "diagnosis.json").is_file()
        return path.read_text(encoding="utf-8")


def test_the_parts_add_up():
    found = synthetic(7, fall=1.0)
    total = sum(found.step.sources().values())
    both = (
        torch.cat([found.scores["set_chosen"], found.scores["set_rejected"]]) * found.step.unit_lr
    )
    assert torch.allclose(total, both)
    margin = (found.scores["set_chosen"] - found.scores["set_rejected"]) * found.step.unit_lr
    assert float(margin.abs().mean()) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_pairs_and_numbers_that_are_none(count):
    found = synthetic(count, row_numbers=[7 * i for i in range(count)])
    found.scores["ches"][0] = float("nan")
    found.scores["valley"][0] = float("-inf")
    text = page_of(found)
    assert f"row {7 * (count - 1)}" in text and "NaN" not in text and "Infinity" not in text


def test_no_step_at_all():
    found = synthetic(3)
    found.gram.zero_()
    found = found.under("dpo")
    assert "No step of this objective moves" in page_of(found)


def test_diagnosis_report_reads_a_run(model, tmp_path):
    (tmp_path / "run" / "lddyn").mkdir(parents=True)
    lines = [sealed(row, indent=None) for row in some_rows()] + ['{"step": 12, "chan']
    file = tmp_path / "run" / "lddyn" / "dynamics.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    found = lddyn.diagnose(model, some_pairs(["a", "b", "c"] * 8, 3), close_ups=0)
    path = found.report(
        tmp_path / "out" / "index.html",
        model,
        pair_steps=1,
        watched=tmp_path / "run",
        measured=torch.arange(3).double(),
    )
    text = path.read_text(encoding="utf-8")
    assert "The watched run" in text and "Over 11 steps" in text and "Where the probability" in text
    tokens = json.loads((tmp_path / "out" / "tokens.json").read_text(encoding="utf-8"))
    numbers = json.loads((tmp_path / "out" / "diagnosis.json").read_text(encoding="utf-8"))
    assert numbers["measured"] == [0, 1, 2] and {"score", "rho"} < set(numbers["correlations"][0])
    assert [t["pair"] for t in tokens] == found.worst(1) and tokens[0]["mass"]["by_position"]
    with pytest.raises(FileNotFoundError, match=r"no dynamics\.jsonl"):
        found.report(tmp_path / "x.html", watched=tmp_path)
    for text, why in (
        ("nothing\n", "line 1 is not as lddyn wrote it"),
        ("", "no row of a watched"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=why):
            report.read_dynamics(file)


def test_what_the_training_measured_is_saved_beside_a_forecast(model, tmp_path):
    pairs = some_pairs(["a", "b", "c"] * 8, 3)
    found = lddyn.diagnose(model, pairs, close_ups=0, run=lddyn.Run(lr=1e-4))
    found.report(tmp_path / "index.html", measured=torch.arange(3).double())
    numbers = json.loads((tmp_path / "diagnosis.json").read_text(encoding="utf-8"))
    assert numbers["measured"] == [0, 1, 2] and numbers["correlations"]
    assert numbers.keys() - {"measured", "correlations", "state", "kind", "format"} == {
        *found.to_dict(),
        *("tensors", "digest"),
    }


def test_real_steps_and_actions_are_shown(model):
    pairs = some_pairs(["a", "b", "c"] * 8, 6)
    found = lddyn.diagnose(model, pairs, close_ups=0, validate=3)
    faults = {found.worst(1)[0]: "duplicate"}
    found = replace(found, step=replace(found.step, pairs=PairSet.of(pairs, None, faults)))
    text = page_of(found)
    assert "3 real steps differ from it by" in text and "What real steps" not in text
    assert "Which score predicted what real steps did" in text
    assert "fix (weight" in text and ": duplicate" in text
    wanted = [row["action"] for row in found.actions()]
    shown = re.findall(r'<td class="do">(\w+)', text)
    assert shown == wanted and shown[0] == "fix"


def test_a_run_ahead_is_drawn(model, tmp_path):
    run = lddyn.Run(lr=1e-4, epochs=2, batch=2)
    found = lddyn.diagnose(model, some_pairs(["a", "b", "c"] * 8, 4), run=run, close_ups=0)
    said = said_of(found)
    assert "2 epochs of adamw at a learning rate of 0.0001" in said["the planned run"]
    text = found.report(tmp_path / "index.html").read_text(encoding="utf-8")
    assert "The planned run, predicted" in text and "run Δ y+" in text
    order = [float(x) for x in re.findall(r'data-contribution="([^"]*)"', text)]
    assert order == sorted(order)
    assert order == pytest.approx(sorted(found.forecast.contribution.tolist()), rel=1e-4)


def test_the_commands_write_pages(tmp_path):
    from tokenizers import Tokenizer as Core
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from typer.testing import CliRunner

    from lddyn.cli.app import app

    def call(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)))

    core = Core(models.WordLevel({w: i for i, w in enumerate("._abcdefgh?")}, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="_").save_pretrained(tmp_path / "m")
    zoo.build("llama", eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / "m")
    rows = [{"prompt": "a b ?", "chosen": f" {c} d", "rejected": f" {c} e f"} for c in "efgh"]
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (run / "lddyn").mkdir(parents=True)
    lines = "".join(sealed(row, indent=None) for row in some_rows())
    (run / "lddyn" / "dynamics.jsonl").write_text(lines, encoding="utf-8")
    told = call(
        "diagnose",
        "--model",
        tmp_path / "m",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--watched",
        run,
        "--after",
        tmp_path / "m",
    )
    assert told.exit_code == 0, told.output
    assert "open it in a browser" in told.output
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "The watched run" in text and "row 3" in text and "Token by token" in text
    assert (tmp_path / "out" / "diagnosis.json").exists()
    told = call("diagnose", "--model", tmp_path / "m", "--data", data, "--after", tmp_path / "m")
    assert told.exit_code == 2 and "give --out FOLDER" in told.output
    told = call("report", run)
    assert told.exit_code == 0 and "Over 11 steps" in told.output
    assert "Log-probs over training" in (run / "lddyn" / "index.html").read_text("utf-8")


def test_a_run_in_words():
    said = report.explain_dynamics(some_rows(), LABELS)
    assert said[0] == (
        "Over 11 steps of the watched run, log π(chosen) fell by 1.1 nats (−9 → −10.1), and log "
        "π(rejected) fell by 55 nats (−80 → −135)."
    )
    assert "‘chosen of another’ −3.3 nats" in said[1] and "squeezing" in said[2]
    assert "a relative error of 10%" in said[3]
    assert report.explain_dynamics([]) == []
    rows = [{"step": 0, "change/chosen": 0.0}, {"step": 2, "change/chosen": None}]
    assert report.explain_dynamics(rows) == [
        "There is one pass over the probes, at step 0: no change is known yet."
    ]
    rows = [{"step": 3, "change/chosen": 0.0, "log_prob/chosen": -8.5}]
    assert report.explain_dynamics(rows) == [
        "There is one pass over the probes, at step 3: no change is known yet; "
        "log π(chosen) = −8.5 nats."
    ]
    with pytest.raises(ValueError, match="at least one pass"):
        report.write_dynamics([], "nowhere.html")


def test_axes_have_round_ticks():
    from lddyn.report.page import axis

    places, ticks = axis([-3.4, 0.2], 0, 100)
    assert [t["text"] for t in ticks] == ["−3", "−2", "−1", "0"] and 0 < places[0] < places[1] < 100
    assert axis([], 0, 1)[0] == [] and len(axis([5.0, 5.0], 0, 1, zero=False)[1]) >= 1
