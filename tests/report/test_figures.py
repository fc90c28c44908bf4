"""Pictures, plain words and the page, on decompositions made by hand."""

import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from lddyn import report
from lddyn.files import json_safe
from lddyn.report import figures
from lddyn.report.canvas import sequence_colours
from lddyn.steps.decomposition import Decomposition, Observed, UpdateToken
from lddyn.steps.folder import read_steps, write_steps
from lddyn.steps.verification import Verification

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "<svg/onload=alert(5)>",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "javascript:alert(6)",
    "</title><h1>",
    "&lt;script&gt;",
    "]]><iframe srcdoc='<p>'>",
    "\u2028alert(7)",
    "\x1b[2J\x07\u202etxet",
    "$\\frac{1}{0}$ $",
    "`${alert(8)}`",
]


def made(observed, updates, *, history=False, seed=0, settings=None):
    """A decomposition with random numbers: observed and updates map names to token texts."""
    generator = torch.Generator().manual_seed(seed)
    tokens, sequences = [], {}
    for name, texts in updates.items():
        sequences[name] = slice(len(tokens), len(tokens) + len(texts))
        sign = 1.0 if name == "y-" else -1.0
        tokens += [UpdateToken(name, i, i, t, sign) for i, t in enumerate(texts)]
    responses = []
    for name, texts in observed.items():
        m, n = len(texts), len(tokens)
        influence = torch.randn(m, n, generator=generator)
        zeros = torch.zeros(m)
        responses.append(
            Observed(
                name=name,
                token_ids=list(range(m)),
                tokens=list(texts),
                influence=influence,
                history=0.3 * torch.ones(m) if history else zeros,
                weight_decay=-0.1 * torch.ones(m) if history else zeros,
                error_estimate=1e-3 * torch.ones(m),
                logp=-torch.ones(m),
                sequences=sequences,
                parameters={"embed.weight": 0.1, "model.layers.0.w": -0.2, "model.layers.10.w": 1},
                agreement=1e-7,
                vocabulary_shift=torch.zeros(m, 3),
            )
        )
    named = {"objective": "DPO", "optimizer": "SGD", "beta": 0.1, **(settings or {})}
    return Decomposition(responses, tokens, 0.693, 1e-3, "midpoint", named)


def pair(**more):
    texts = {"y+": [" the", " cat", "."], "y-": [" a", " dog", "\n", "!"]}
    return made({"chosen": texts["y+"], "rejected": texts["y-"], "other": ["x"]}, texts, **more)


def checked(dec, slope=3.0):
    total = sum(len(o.tokens) for o in dec)
    rows = torch.stack([torch.cat([o.delta_logp for o in dec]) / 2**k for k in range(3)]).double()
    assert rows.shape == (3, total)
    return Verification(
        [1e-3, 5e-4, 2.5e-4], rows + 1e-6, rows, [1e-6, 1e-7, 1e-8], slope, 3, "torch.float64"
    )


def test_plot_writes_stable_names(tmp_path):
    drawn = pair(history=True).plot(tmp_path)
    names = [f.get_label() for f in drawn]
    assert names == [
        "overview",
        "blocks",
        "influence-0-chosen",
        "influence-1-rejected",
        "influence-2-other",
    ]
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == sorted(f"{n}.{e}" for n in names for e in ("png", "pdf"))
    assert all((tmp_path / n).stat().st_size > 3000 for n in found)


def test_influence_shows_the_table():
    dec = pair()
    figure = figures.plot_influence(dec.to_dict(), 0)
    heat = figure.axes[0]
    shown = [c.get_array() for c in heat.collections]
    at = dec[0].sequences
    for values, name in zip(shown, ("y+", "y-"), strict=True):
        assert torch.allclose(
            torch.tensor(values.data).reshape(3, -1).float(), dec[0].influence[:, at[name]]
        )
    norm = heat.collections[0].norm
    assert norm.vmin == -norm.vmax  # symmetric about 0
    assert norm(0.0) == pytest.approx(0.5)
    assert [t.get_text() for t in heat.get_yticklabels()] == ["␣the", "␣cat", "."]
    assert [t.get_text() for t in heat.get_xticklabels()][3:] == ["␣a", "␣dog", "↵", "!"]
    red, _, blue, _ = heat.collections[0].cmap(1.0)
    assert blue > red  # raised is blue


@pytest.mark.parametrize("count", [1, 5, 40, 100])
def test_influence_is_readable_at_any_size(count):
    texts = [f"tok{i}" for i in range(count)]
    dec = made({"a": texts}, {"y+": texts, "y-": texts})
    figure = figures.plot_influence(dec.to_dict(), 0)
    width, height = figure.get_size_inches()
    assert width <= 22 and height <= 16
    figure.canvas.draw()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        labels = [t for t in axis.get_ticklabels() if t.get_text()]
        assert labels and all(t.get_fontsize() >= 4.5 for t in labels)
        boxes = [t.get_window_extent() for t in labels]
        side = 0 if axis is figure.axes[0].xaxis else 1
        centres = sorted((b.min[side] + b.max[side]) / 2 for b in boxes)
        extent = max((b.width, b.height)[side] for b in boxes)
        assert all(b - a > 0.8 * extent for a, b in itertools.pairwise(centres))
    everything = figure.get_tightbbox()
    assert everything.x0 > -0.05 and everything.y0 > -0.05
    assert everything.x1 < width + 0.05 and everything.y1 < height + 0.05


def test_zero_influence_is_drawn():
    dec = pair()
    for o in dec:
        o.influence.zero_()
    assert len(dec.plot()) == 5


def test_custom_objective_with_three_sequences_is_drawn():
    dec = made({"a": ["x", "y"]}, {"one": ["a"], "two": ["b"], "three": ["c"]})
    assert len(set(sequence_colours(["one", "two", "three", "history"]).values())) == 4
    assert len(dec.plot()) == 3


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_texts_are_drawn_as_text(payload, tmp_path):
    dec = made({payload: [payload, "b"]}, {"y+": [payload], "y-": ["\x00"]})
    dec.plot(tmp_path)
    assert all(re.fullmatch(r"[a-z0-9.-]+", p.name) for p in tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Words


def test_tell_names_causes_and_tokens():
    dec = pair()
    chosen = dec[0]
    chosen.influence.zero_()
    chosen.influence[0, 0] = 0.42  # y+ " the"
    chosen.influence[1, 4] = -0.61  # y- " dog"
    chosen.influence[1, 5] = -0.12  # y- newline
    said = dec.explain()
    assert "y+ (chosen) fell by 0.31 nats" in said
    assert "+0.42 from y+ tokens, −0.73 from y− tokens" in said
    assert "84 % of the lowering by y− came through ‘␣dog’" in said
    assert "y+ fell although the step raises it by itself" in said
    assert "margin" in said and "y− (rejected)" in said
    assert "not checked against a real step" in said


def test_tell_with_verification():
    dec = pair()
    said = dec.explain(checked(dec)).splitlines()[-1]
    assert "slope 3.00 (expected 3)" in said and "A real step measured" in said
    assert "slope" not in dec.explain(checked(dec, slope=math.nan)).splitlines()[-1]


def test_tell_of_an_optimizer_with_history():
    said = pair(history=True).explain()
    assert "from the optimizer's history" in said and "from weight decay" in said


# ---------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """What a browser would see: tags, attributes, script sources."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def test_page_is_self_contained(tmp_path):
    dec = pair()
    path = report.write_step_page(
        {"": dec.to_dict()},
        tmp_path / "new" / "page.html",
        title="A title",
        checks={"": checked(dec).to_dict()},
        opening=["A sentence."],
        facts={"model": "tiny"},
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, key, value in page.attributes:
        assert key not in ("href", "srcset")
        if key == "src":
            assert tag == "img" and value.startswith("data:image/png;base64,")
    assert not re.search(r"https?://|@import|url\(", text)
    for part in ("A title", "A sentence.", "tiny", "3.000", "prefers-color-scheme", "viewport"):
        assert part in text
    assert page.tags.count("img") == 5
    data = json.loads(page.scripts[0])
    assert data["sequences"][1] == {"name": "y−", "start": 3, "tokens": ["␣a", "␣dog", "↵", "!"]}
    table = torch.tensor(data["responses"][0]["influence"])
    assert torch.allclose(table, dec[0].influence, rtol=1e-2)


def test_page_of_several_decompositions(tmp_path):
    decs = {"sft": made({"a": ["x"]}, {"a": ["x"]}), "dpo": pair()}
    steps = {name: dec.to_dict() for name, dec in decs.items()}
    checks = {"dpo": checked(decs["dpo"]).to_dict()}
    text = report.write_step_page(steps, tmp_path / "p.html", checks=checks).read_text("utf-8")
    assert text.count("<section>") == 2 and text.count("Checked against real steps") == 1


def test_page_with_hostile_texts_does_nothing(tmp_path):
    texts = {"y+": PAYLOADS, "y-": PAYLOADS[::-1]}
    decs = {p: made({p: PAYLOADS, "b" + p: PAYLOADS}, texts, settings={p: p}) for p in PAYLOADS[:2]}
    clean = {n: made({"a": ["t"] * 16, "b": ["t"] * 16}, {"y+": ["t"], "y-": ["t"]}) for n in "ab"}

    def page(decs, hostile):
        words = PAYLOADS if hostile else ["w"] * len(PAYLOADS)
        extra = {words[0]: words[1], "k": words[2]}
        pictures = {name: [] for name in decs}
        path = report.write_step_page(
            {name: dec.to_dict() for name, dec in decs.items()},
            tmp_path / "p.html",
            title=words[1],
            opening=words,
            facts=extra,
            figures=pictures,
        )
        return Page(path.read_text(encoding="utf-8"))

    attacked, calm = page(decs, True), page(clean, False)
    assert set(attacked.tags) == set(calm.tags)
    assert attacked.tags.count("script") == calm.tags.count("script") == 3
    assert attacked.scripts[-1] == calm.scripts[-1]  # the page's own code is untouched
    assert {k for _, k, _ in attacked.attributes} == {k for _, k, _ in calm.attributes}
    for source in attacked.scripts[:-1]:
        assert "<" not in source  # nothing there can end the data
        names = {r["name"] for r in json.loads(source)["responses"]}
        assert len(names) == 2


def test_run_is_written_and_read_back(tmp_path):
    decs = {"": pair()}
    checks = {"": checked(decs[""])}
    path = write_steps(tmp_path, decs, checks, title="T", opening=["S"], facts={"row": 3})
    assert path == tmp_path / "index.html"
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["row"] == 3 and summary["title"] == "T"
    assert summary["verification"]["slope"] == 3.0
    assert summary["observed"][0]["measured"] == pytest.approx(
        float(checks[""].measured[0, :3].sum())
    )
    back, again, facts = read_steps(tmp_path)
    assert torch.equal(back[""][0].influence, decs[""][0].influence)
    assert torch.equal(again[""].measured, checks[""].measured)
    assert again[""].slope == 3.0 and {"digest", "records"} <= summary.keys()
    assert facts == {k: v for k, v in summary.items() if k not in ("digest", "records")}


def test_run_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no decomposition"):
        read_steps(tmp_path)
    write_steps(tmp_path, {"": pair()}, {"": None}, title="T")
    (tmp_path / "verification.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be read as lddyn\.Verification"):
        read_steps(tmp_path)
    (tmp_path / "verification.json").unlink()
    pair(history=True).save(tmp_path / "decomposition")
    with pytest.raises(
        ValueError, match=r"decomposition\.json and summary.json are not of one save"
    ):
        read_steps(tmp_path)
    next(tmp_path.glob("decomposition.*.safetensors")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot be read as lddyn\.Decomposition"):
        read_steps(tmp_path)


def test_json_of_numbers_that_json_does_not_have():
    assert json_safe({"a": math.nan, "b": (1, math.inf)}) == {"a": None, "b": [1, None]}
