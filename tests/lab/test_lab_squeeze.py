"""The squeeze experiment: its steps against autograd, its claims, its pages."""

import json
import math

import pytest
import torch

from lddyn.lab import settings, squeeze
from lddyn.lab.record import Lab
from lddyn.lab.shares import Share
from lddyn.lab.squeeze import measure
from lddyn.steps.flow import leading, renormalised

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("squeeze")
    return squeeze.run(out, settings.Squeeze(cases=1500, large=200), progress=False), out


def claims(results):
    return {c["name"]: c for c in results[0]["claims"]}


def test_the_reference_values_of_the_paper():
    """paper.md 5.2: four steps of η' = 0.5 on logits (2, 1, 0, −1, −2)."""
    for row in measure.reference_rows():
        assert row["largest_difference"] <= 6e-5
        assert row["entropy_change"] == pytest.approx(row["published_entropy_change"], abs=6e-5)


def test_both_guarantees_hold_in_every_case(results):
    found = claims(results)
    for name in ("Lemma 1", "claim 1", "claim 2", "trend 3"):
        assert found[name]["verdict"] == "agrees", name
    assert found["claim 2"]["value"] == 1.0
    assert found["Lemma 1"]["value"] < 1e-12


def test_the_regimes_are_what_they_are_called(results):
    rows = {r["regime"]: r for r in json.loads((results[1] / "tables/regimes.json").read_text())}
    flat = rows["flat, one label pushed down"]
    assert flat["losers"] == 0 and flat["threshold"] < 0.02
    for name in ("peaky, the second peak pushed down", "peaky, a valley pushed down"):
        assert rows[name]["gainers"] == 1 and rows[name]["argmax_change"] > 0.1
    # The published panel: the positive step of the same size hides the squeeze.
    assert abs(rows["as published: another pulled up too"]["argmax_change"]) < 0.01


def test_a_rarer_label_never_makes_the_argmax_rise_more(results):
    assert claims(results)["trend 4, y*"]["value"] == 0.0
    assert claims(results)["trend 4, y*"]["verdict"] == "disagrees"
    assert claims(results)["trend 4, ratio"]["value"] > 0.9


def test_what_is_said_of_all_must_hold_as_a_rule(results):
    found = claims(results)
    for name, verdict in (("trend 3A", "disagrees"), ("trend 3B", "disagrees")):
        assert found[name]["verdict"] == verdict and 0.5 < found[name]["value"] < 0.9
    kinds = json.loads((results[1] / "tables/kinds.json").read_text())
    gainers = {row["prediction"]: row["gainers"] for row in kinds}
    assert gainers["flat"] > 0.9 > gainers["between"] > 0.1 > gainers["peaky"]


def test_the_threshold_is_right_for_short_steps_only(results):
    rows = json.loads((results[1] / "tables/threshold.json").read_text())
    assert rows[0]["share"] > 0.999 and rows[-1]["share"] < 0.9
    assert [r["share"] for r in rows] == sorted((r["share"] for r in rows), reverse=True)


def test_a_context_that_shares_nothing_but_features(tmp_path):
    """`limits` moves other contexts as one real step on W would."""
    generator = torch.Generator().manual_seed(5)
    normal = {"generator": generator, "dtype": torch.float64}
    weights, pushed = torch.randn(6, 30, **normal), torch.randn(6, **normal)
    other = torch.randn(6, **normal)
    log_probs = (pushed @ weights).log_softmax(-1)
    push = log_probs.exp()
    push[3] -= 1
    moved = weights + 0.1 * torch.outer(pushed, push)
    expected = (other @ moved).log_softmax(-1) - (other @ weights).log_softmax(-1)
    shift = 0.1 * float(other @ pushed) * push
    found = renormalised((other @ weights).log_softmax(-1), shift)
    assert torch.allclose(found, expected, atol=1e-12)


def test_limits_begin_at_the_lemma(results):
    for name, key, value in (
        ("positions", "positions", 1),
        ("hidden", "body", 0.0),
        ("contexts", "cosine", 1.0),
    ):
        rows = json.loads((results[1] / f"tables/{name}.json").read_text())
        column = "its own argmax rises" if name == "contexts" else "argmax rises"
        assert all(r[f"{column}: share"] == 1.0 for r in rows if r[key] == value), name
        assert any(r[f"{column}: share"] < 0.95 for r in rows), name


def test_regression_step_is_a_real_step():
    weights = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([1.0, -1, 0.5, 2], dtype=torch.float64)
    before, after = measure.regression_step(weights, x, {3: -1.0}, 0.1)
    gradient = torch.outer(x, torch.nn.functional.one_hot(torch.tensor(3), 20) - before.exp())
    expected = (x @ (weights - 0.1 * gradient)).log_softmax(-1)
    assert torch.allclose(after, expected, atol=1e-12)
    assert int(leading(before[None], torch.tensor([3]), 1)) == int(before.argmax())


def test_the_same_seed_gives_the_same_cases(tmp_path):
    a, b = (measure.random_cases(Lab("squeeze", tmp_path / n), 10, 50)[0] for n in "ab")
    assert torch.equal(a, b)


def test_everything_is_written(results):
    for name in ("regimes", "trends", "limits"):
        assert (results[1] / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (results[1] / "figures" / f"{name}.pdf").exists()
    assert "panel D" in (results[1] / "index.html").read_text()


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="labels must be at least 20, got 5"):
        squeeze.run(tmp_path, settings.Squeeze(labels=5))


def test_shares_have_wilson_intervals():
    none, some = Share(0, 100), Share(50, 100)
    assert none.interval == (0.0, pytest.approx(0.0370, abs=1e-4))
    assert some.interval == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert none.tendency == "disagrees" and some.tendency == "not testable at this scale"
    assert Share(60, 100).rule == "disagrees" and Share(990, 1000).rule == "agrees"
    assert Share(96, 100).rule == "not testable at this scale"
    assert Share(100, 100).tendency == "agrees" and math.isnan(Share(0, 0).value)


def test_claims_of_dependent_cases_have_no_interval(results):
    found = claims(results)
    for name in ("τ", "beyond one softmax"):  # labels of one prediction, positions of one response
        assert found[name]["verdict"] == "agrees" and found[name]["interval"] is None
