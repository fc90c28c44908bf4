"""The bigram experiment: K against real steps, exact zeros, its pages."""

import json

import pytest
import torch

from lddyn.lab import bigram, settings
from lddyn.lab.bigram import models
from lddyn.lab.bigram.claims import make_claims
from lddyn.lab.record import Lab
from lddyn.steps.flow import softmax_step

torch.set_num_threads(1)
SMALL = settings.Bigram(length=5000, steps=200, pairs=12, pushes=8)


def model_of(kind, seed=0, size=12):
    return models.Bigram(kind, size, torch.Generator().manual_seed(seed), width=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bigram")
    found = bigram.run(out, SMALL, progress=False)
    return found, out


def test_the_kernel_predicts_a_short_step():
    """Δz of every context is −η K[:, :, c, :] (∂L/∂z), to second order."""
    for kind in models.KINDS:
        model = model_of(kind)
        errors = []
        for strength in (1e-3, 5e-4):
            before = model().detach()
            moved, _ = models.push_down(model, 3, 5, strength)
            full = models.kernel(model)
            rate = strength / float(full[3, 5, 3, 5])
            gradient = -before[3].softmax(0)
            gradient[5] += 1
            predicted = -rate * torch.einsum("cvw,w->cv", full[:, :, 3], gradient)
            errors.append(float((moved().detach() - before - predicted).norm()))
        assert errors[0] < 1e-5, kind
        if kind != "table":
            assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_in_a_table_the_step_is_the_lemma_and_other_contexts_are_untouched():
    model = model_of("table")
    with torch.no_grad():
        model.table.normal_(generator=torch.Generator().manual_seed(1))
    before = model().log_softmax(-1).detach()
    _, after = models.push_down(model, 3, 5, 0.7)
    push = torch.zeros(12, dtype=torch.float64)
    push[5] = -0.7
    assert torch.allclose(after[3] - before[3], softmax_step(before[3], push), atol=1e-12)
    apart = torch.arange(12) != 3
    assert torch.equal(after[apart], before[apart])
    full = models.kernel(model)
    assert not bool(full.permute(0, 2, 1, 3)[~torch.eye(12, dtype=torch.bool)].any())


def test_features_are_shared():
    for kind in ("factorised", "network"):
        model = model_of(kind)
        before = model().log_softmax(-1).detach()
        _, after = models.push_down(model, 3, 5, 0.7)
        assert bool(((after - before).abs().amax(1) > 1e-6).all()), kind


def test_the_text_follows_the_grammar():
    words, kinds = models.vocabulary()
    chances = models.transitions(torch.Generator().manual_seed(0))
    assert torch.allclose(chances.sum(1), torch.ones(len(words), dtype=torch.float64))
    counts = models.count_bigrams(chances, 30_000, torch.Generator().manual_seed(1))
    assert not bool(counts[chances == 0].any())
    articles = torch.tensor([k == "article" for k in kinds])
    nouns = torch.tensor([k == "noun" for k in kinds])
    share = float(counts[articles][:, nouns].sum() / counts[articles].sum())
    assert share == pytest.approx(0.6, abs=0.03)


def test_training_approaches_the_text():
    counts = models.count_bigrams(
        models.transitions(torch.Generator().manual_seed(0)), 5000, torch.Generator().manual_seed(1)
    )
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    floor = -float((counts / counts.sum() * torch.where(share > 0, share, 1).log()).sum())
    losses = {}
    for kind in models.KINDS:
        model = models.Bigram(kind, len(counts), torch.Generator().manual_seed(2))
        kept = models.train(model, counts, [0, 300])
        for step, at in kept.items():
            losses[kind, step] = -float(
                (counts / counts.sum() * at().detach().log_softmax(-1)).sum()
            )
        assert floor < losses[kind, 300] < floor + 0.1 < losses[kind, 0]


def test_claims_and_pages(results):
    found, out = results
    by_name = {c["name"]: c for c in found["claims"]}
    assert by_name["table"]["value"] == 0.0 and by_name["table"]["verdict"] == "agrees"
    assert by_name["argmax, table"]["value"] == 1.0
    assert by_name["leak"]["verdict"] == "agrees"
    rows = json.loads((out / "tables/longer.json").read_text())
    assert all(r["moved elsewhere"] == 0.0 for r in rows if r["model"] == "table")
    assert {r["steps"] for r in rows} >= {0, 100, 200}
    for name in ("leak", "longer"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000


def test_the_leak_and_the_kernel_can_be_refuted(results):
    """The same pushes with a small leak that does not follow ‖K‖, and does squeeze."""
    found = json.loads((results[1] / "steps/pushes.json").read_text())["value"]
    for row in found["pairs"]:
        row["moved elsewhere"] = 0.9 * row["moved here"]
        row["label falls elsewhere"] = 1.0
        if row["model"] == "network":
            row["kernel rank correlation"] -= 0.5
    refuted = {claim.name: claim.verdict for claim in make_claims(found, SMALL)}
    assert refuted["leak"] == refuted["kernel"] == "disagrees"
    assert refuted["leak, squeeze"] == "agrees"
    really = {c["name"]: c for c in results[0]["claims"]}
    assert really["leak, squeeze"]["verdict"] == "disagrees"


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="strength must be positive, got 0"):
        bigram.run(tmp_path, settings.Bigram(strength=0))


def test_models_depend_on_the_seed_alone(tmp_path):
    a, b = (
        models.Bigram("network", 9, Lab("bigram", tmp_path / n, 3).generator("model"))()
        for n in "ab"
    )
    assert torch.equal(a, b)
