"""Results in notebooks: escaped, small, without scripts, readable in light and dark."""

import re

import pytest
import torch
import zoo

import lddyn
from lddyn.cells import Grid, cell


def test_a_cell_is_escaped_and_bounded():
    grid = Grid(
        "<b>nats</b>",
        [f"c{i}" for i in range(40)],
        [(f"<i>{j}\u202e", [1.0] * 40) for j in range(30)],
        heat=True,
    )
    shown = cell("A<script>", "one\n\ntwo & \u202ethree \u05d0", [grid])
    assert "<script" not in shown and "<b>" not in shown and "<i>" not in shown
    assert "\u202e" not in shown and "<bdi>" in shown
    assert "24 of 30 rows and 32 of 40 columns" in shown
    assert shown.count("<tr>") == 25 and shown.count("<td") == 24 * 32
    assert "http" not in shown and "src=" not in shown


def test_numbers_colour_their_cells():
    rows = [("a", [0.5, -0.25, 0.0, float("nan"), None, "text"])]
    shown = Grid("nats", list("uvwxyz"), rows, heat=True).html()
    assert "rgba(0,114,178,0.75)" in shown and "rgba(213,94,0,0.53)" in shown
    assert shown.count("–") == 2 and '<td class="text">text</td>' in shown and "−0.25" in shown
    plain = Grid("nats", list("uvwxyz"), rows).html()
    assert "rgba" not in plain and "+0.5" in plain


@pytest.fixture(scope="module")
def results():
    model = zoo.build("llama")
    one = lddyn.Example([1, 2], [3, 4, 5], tokens=["<x>", " b", "c"], name="y+")
    other = lddyn.Example([1, 2], [6, 7], name="y-")
    pairs = [(one, other), (lddyn.Example([5, 2], [7, 4]), lddyn.Example([5, 2], [8, 9]))]
    update = lddyn.DPO(one, other, beta=0.1)
    dec = lddyn.decompose(model, {"y+": one, "y-": other}, update, lr=1e-3)
    kernel = lddyn.ntk(model, one, other)
    diagnosis = lddyn.diagnose(
        model, pairs, beta=0.1, run=lddyn.Run(lr=1e-3, epochs=1, batch=2), close_ups=0
    )
    return {
        "Decomposition": dec,
        "Observed": dec[0],
        "Verification": dec.verify(),
        "MassFlow": lddyn.massflow(model, one, update, lr=1e-3),
        "NTK": kernel,
        "LowRank": kernel.lowrank(4),
        "Diagnosis": diagnosis,
        "Forecast": diagnosis.forecast,
        "SequenceDiagnosis": lddyn.diagnose(model, [one, other], "sft"),
        "Plan": lddyn.plan(model, [one], [other]),
        "Estimate": lddyn.Estimate(torch.randn(3, 2), torch.ones(3, 2)),
    }


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "Decomposition": "strongest update token",
        "Observed": "Δ log π of each token",
        "Verification": "measured",
        "MassFlow": "change of probability",
        "NTK": "K.gram()",
        "LowRank": "rank 4",
        "Diagnosis": "Pairs that lower y+ most",
        "Forecast": "epoch",
        "SequenceDiagnosis": "Sequences that harm most",
        "Plan": "GFLOP",
        "Estimate": "standard errors",
    }.items(),
)
def test_every_result_shows_itself(results, name, said):
    shown = results[name]._repr_html_()
    assert f"<strong>{name}</strong>" in shown and said in re.sub(r"</?bdi>", "", shown)
    assert "<script" not in shown and "<x>" not in shown
    assert len(shown) < 50_000
    for tag in ("table", "tr", "td", "th", "p", "div"):
        assert len(re.findall(rf"<{tag}[ >]", shown)) == shown.count(f"</{tag}>"), tag


def test_numbers_of_the_influence_table(results):
    dec = results["Decomposition"]
    shown = dec._repr_html_()
    largest = max((float(v) for v in dec[0].influence.flatten()), key=abs)
    assert lddyn.text.signed(largest) in shown
    assert "&lt;x&gt;" in shown
