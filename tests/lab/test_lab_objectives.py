"""The objectives experiment: coefficients and descents against differences and autograd."""

import json
import math

import pytest
import torch

import lddyn
from lddyn.lab import objectives
from lddyn.lab.objectives import flows, residuals
from lddyn.lab.settings import Objectives as Settings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("objectives")
    return objectives.run(out, Settings(cases=25, labels=30, steps=120), progress=False), out


def claims(results):
    return {c["name"]: c for c in results[0]["claims"]}


def test_closed_forms_agree_with_autograd(results):
    rows = json.loads((results[1] / "tables/residuals.json").read_text())
    assert [r["objective"] for r in rows] == list(residuals.OBJECTIVES) and len(rows) == 12
    for row in rows:
        assert row["error of c"] <= 1e-8 and row["error of the logit gradient"] <= 1e-8, row
        assert 0 < row["negative margins"] < row["cases"]
    assert claims(results)["closed forms"]["verdict"] == "agrees"


def test_closed_forms_agree_with_finite_differences():
    """Independent of autograd: central differences of the loss itself."""
    one, other = lddyn.Example([0], [1, 2, 3]), lddyn.Example([0], [4, 5])
    generator = torch.Generator().manual_seed(0)
    for name, settings in residuals.SETTINGS.items():
        for _ in range(10):
            lps = [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 2)]
            sums = [float(lp.sum()) for lp in lps]
            drift = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
            reference = (sums[0] - drift[0], sums[1] - drift[1])
            objective = residuals.build(name, one, other, reference, settings)
            gains = (sums[0] - reference[0], sums[1] - reference[1])
            parameters = dict(settings)
            if name == "kto":
                parameters |= {"baseline": 0.0, "desirable_weight": 1.0, "undesirable_weight": 1.0}
            expected = residuals.closed_form(name, *sums, gains, (3, 2), parameters)
            for side, sign in ((0, -1), (1, 1)):
                values = []
                for step in (1e-5, -1e-5):
                    moved = [lp.clone() for lp in lps]
                    moved[side][0] += step
                    values.append(float(objective.loss(moved)))
                slope = (values[0] - values[1]) / 2e-5
                assert sign * slope == pytest.approx(expected[side], abs=1e-7), name


def test_the_printed_forms_are_wrong(results):
    for name in ("IPO", "SLiC", "SPPO"):
        claim = claims(results)[f"{name}, printed"]
        assert claim["verdict"] == "disagrees" and claim["value"] > 0.1
    # SPPO's is the negative of the true gradient.
    true = residuals.closed_form("sppo_hard", -3, -4, (0.3, -0.2), (1, 1), {"beta": 0.5})
    said = residuals.printed_form("sppo_hard", -3, -4, (0.3, -0.2), {"beta": 0.5})
    assert said == pytest.approx((-true[0], -true[1]))


def test_strengths_at_the_start_are_the_tabulated_ones(results):
    assert claims(results)["strength at the start"]["value"] <= 1e-8
    for name, expected in (
        ("dpo", 0.25),
        ("ipo", 2.0),
        ("sppo_hard", 2.0),
        ("kto", 0.0625),
        ("sft", 0),
    ):
        assert residuals.at_margin(name, (0.0, 0.0), (-2.0, -2.0))[1] == pytest.approx(expected)


def test_signs_flip_where_the_closed_forms_say(results):
    rows = json.loads((results[1] / "tables/margins.json").read_text())
    for name, target in (("ipo", 1.0), ("sppo_hard", 2.0)):
        for row in rows:
            if row["objective"] == name and row["margin"] != target:
                assert (row["c-"] < 0) == (row["margin"] > target)
    flips = {r["objective"] for r in rows if r["c-"] < -1e-9}
    assert flips == {"cdpo", "ipo", "sppo_hard", "cal-dpo"}


def test_a_descent_is_gradient_descent_on_the_loss():
    """Two softmaxes, and one: against autograd through logits."""
    generator = torch.Generator().manual_seed(0)
    start = (2 * torch.randn(9, generator=generator, dtype=torch.float64)).log_softmax(-1)
    reference = (float(start[2]), float(start[5]))
    one, other = lddyn.Example([0], [1]), lddyn.Example([0], [2])
    for name in ("dpo", "sppo_hard", "unlikelihood"):
        objective = residuals.build(name, one, other, reference, residuals.SETTINGS[name])
        for shared in (True, False):
            path = flows.descend(name, start, 2, 5, 5, shared=shared)
            first, c = path[0]
            rate = 0.1 / (abs(c[0]) + abs(c[1]))
            good = start.clone().requires_grad_(True)
            bad = good if shared else start.clone().requires_grad_(True)
            for now, _ in path:
                assert torch.allclose(now, bad.detach().log_softmax(-1), atol=1e-12)
                lps = [good.log_softmax(-1)[2, None], bad.log_softmax(-1)[5, None]]
                loss = objective.loss(lps)
                leaves = [good] if shared else [good, bad]
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                moved = [
                    (z if g is None else z - rate * g).detach().requires_grad_(True)
                    for z, g in zip(leaves, found, strict=True)
                ]
                good, bad = moved[0], moved[-1]
            assert torch.equal(first, start)


def test_a_shared_softmax_hides_the_squeeze(results):
    rows = {
        (r["situation"], r["objective"]): r
        for r in json.loads((results[1] / "tables/summary.json").read_text())
    }
    assert rows["valley", "dpo"]["change of y*"] > 0 > rows["valley", "dpo"]["change of log others"]
    assert rows["valley, same context", "dpo"]["change of y*"] < 0
    assert rows["likeliest", "dpo"]["change of log others"] > 0
    assert rows["valley", "sft"]["change of y*"] == 0


def test_everything_is_written(results):
    for name in ("coefficients", "simplex-valley", "simplex-peak", "flow"):
        assert (results[1] / "figures" / f"{name}.png").stat().st_size > 10_000
    assert "SPPO" in (results[1] / "index.html").read_text()


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cases must be at least 10, got 5"):
        objectives.run(tmp_path, Settings(cases=5))
    with pytest.raises(ValueError, match="no closed form for 'x'"):
        residuals.closed_form("x", 0, 0, (0, 0), (1, 1), {})
    assert math.isclose(residuals._sigmoid(-800.0), 0.0)
