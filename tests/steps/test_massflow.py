"""Where probability goes: against explicit gradient steps, explicit sums, and high precision."""

import copy
import json
import math
from fractions import Fraction

import pytest
import torch
import zoo
from torch.nn.functional import logsigmoid

import lddyn
from lddyn.steps.flow import Flow, renormalised, softmax_step, threshold

torch.set_num_threads(1)

GOOD = lddyn.Example(prompt_ids=[5, 9, 33, 7], response_ids=[21, 9, 40], name="good")
BAD = lddyn.Example(prompt_ids=[5, 9, 33, 7], response_ids=[62, 9, 17, 3], name="bad")


def logits_of(model, example):
    ids = torch.tensor([example.ids])
    return model(input_ids=ids, use_cache=False).logits[0][list(example.positions)]


def explicit(model, observed, loss, lr, nudge=1e-4):
    """log π before, log π after one SGD step, and (log π)' along the step: float64, autograd."""
    exact = zoo.double(model).eval()
    with lddyn.true_float64():
        parameters = [p for p in exact.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss(exact), parameters)

        def at(scale):
            moved = copy.deepcopy(exact)
            with torch.no_grad():
                for p, g in zip(
                    [p for p in moved.parameters() if p.requires_grad], gradients, strict=True
                ):
                    p -= lr * scale * g
                return logits_of(moved, observed)

        before, after = at(0.0).log_softmax(-1), at(1.0).log_softmax(-1)
        move = (at(nudge) - at(-nudge)) / (2 * nudge)
        return before, after, (before + move).log_softmax(-1)


def sft_loss(model):
    return -zoo.token_log_probs(model, GOOD).sum()


def dpo_loss(model):
    gap = zoo.token_log_probs(model, GOOD).sum() - zoo.token_log_probs(model, BAD).sum()
    return -logsigmoid(0.5 * (gap - gap.detach()))


def check_by_sums(flow, before, after, labels, top):
    """Every field from differences and Python loops, which float64 allows at these sizes."""
    probs, changed = before.exp(), after.exp()
    for m, y in enumerate(labels):
        change = (changed[m] - probs[m]).tolist()
        order = sorted((v for v in range(len(change)) if v != y), key=lambda v: -float(probs[m, v]))
        rest = [change[v] for v in order[top:]]
        expected = {
            "label": change[y],
            "argmax": change[order[0]],
            "top": sum(change[v] for v in order[1:top]),
            "rest": sum(rest),
            "gained": sum(change[v] for v in order if change[v] > 0),
            "lost": sum(change[v] for v in order if change[v] < 0),
            "entropy": float((probs[m] * before[m]).sum() - (changed[m] * after[m]).sum()),
        }
        for key, value in expected.items():
            assert float(getattr(flow, key)[m]) == pytest.approx(value, rel=1e-4, abs=1e-8), key
        assert int(flow.gainers[m]) == sum(change[v] > 0 for v in order)
        assert int(flow.losers[m]) == sum(change[v] < 0 for v in order)
        if change[y] < 0:
            assert float(flow.ratio[m]) == pytest.approx(-change[order[0]] / change[y], rel=1e-4)
        else:
            assert math.isnan(flow.ratio[m])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("observed", [GOOD, BAD], ids=["good", "bad"])
def test_against_explicit_steps(name, objective, observed):
    model = zoo.build(name, seed=3)
    update = (
        lddyn.SFT(GOOD, reduction="sum") if objective == "sft" else lddyn.DPO(GOOD, BAD, beta=0.5)
    )
    lr = 3e-3
    found = lddyn.massflow(model, observed, update, lr=lr, top=4)
    before, after, first = explicit(
        model, observed, sft_loss if objective == "sft" else dpo_loss, lr
    )
    assert torch.allclose(found.log_probs, before, atol=1e-10)
    assert torch.allclose(found.measured.change, after.exp() - before.exp(), atol=1e-9)
    scale = float((first.exp() - before.exp()).norm())
    assert float((found.predicted.change - (first.exp() - before.exp())).norm()) < 1e-4 * scale
    labels = list(observed.targets)
    check_by_sums(found.measured, before, after, labels, top=4)
    probs = before.exp()
    expected = (probs**2).sum(1) - probs[range(len(labels)), labels]
    assert torch.allclose(found.threshold, expected, atol=1e-10)


def test_the_mass_need_not_go_to_the_argmax():
    """SFT on one token: the mass comes from y*, here the argmax, and goes to the label."""
    model = zoo.build("llama", seed=3)
    with torch.no_grad():
        order = logits_of(model.eval(), BAD)[0].argsort(descending=True).tolist()
    watched = lddyn.Example(BAD.prompt_ids, [order[5]], name="watched")
    taught = lddyn.Example(BAD.prompt_ids, [order[60]])
    flow = lddyn.massflow(model, watched, lddyn.SFT(taught), lr=0.05)
    assert int(flow.argmax[0]) == order[0]
    for part in (flow.measured, flow.predicted):
        assert float(part.argmax[0]) < 0 and float(part.rest[0]) > 0
        assert float(part.ratio[0]) < 0
    assert flow.strongest(0)["gainers"][0]["token_id"] == order[60]
    assert flow.strongest(0)["losers"][0]["token_id"] == order[0]
    assert flow.summary()["argmax_gains_most"] == 0.0 and flow.summary()["argmax_falls"] == 1.0


def test_small_steps_and_small_probabilities_keep_their_digits():
    """Against rational arithmetic on the series of the exponential."""
    logits = torch.tensor([0.0, -2, -30, -45, -60], dtype=torch.float64)
    step = softmax_step(logits, torch.tensor([0.0, 0, 0, -1e-9, 0]))
    flow = Flow.of(logits.log_softmax(-1)[None], step[None], torch.tensor([3]), top=2)
    probs = [Fraction(float(p)) for p in logits.softmax(-1)]
    total = sum(probs)
    probs = [p / total for p in probs]
    eta = Fraction(1e-9)
    move = [eta * (p - (i == 3)) for i, p in enumerate(probs)]
    growth = [x + x**2 / 2 + x**3 / 6 for x in move]
    mean = sum(p * g for p, g in zip(probs, growth, strict=True))
    for i in range(5):
        exact = float(probs[i] * ((growth[i] - mean) / (1 + mean)))
        # The digits that are lost are those of π itself, 1 part in 1e16 of the largest move.
        assert float(flow.change[0, i]) == pytest.approx(exact, rel=1e-6), i


def test_masses_add_up_and_labels_may_be_anything():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 30, generator=generator, dtype=torch.float64)
    labels = torch.randint(30, (200,), generator=generator)
    push = torch.zeros(200, 30, dtype=torch.float64)
    push[range(200), labels] = -5 * torch.rand(200, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    for top in (1, 10, 29, 1000):
        flow = Flow.of(log_probs, softmax_step(logits, push), labels, top)
        total = flow.label + flow.argmax + flow.top + flow.rest
        assert float(total.abs().max()) < 1e-14
        assert bool((flow.gained + flow.lost + flow.label).abs().max() < 1e-14)


def test_first_order_flows_add_up_and_are_the_limit():
    generator = torch.Generator().manual_seed(4)

    def normal():
        return torch.randn(50, 20, generator=generator, dtype=torch.float64)

    log_probs, one, other = (2 * normal()).log_softmax(-1), normal(), normal()
    labels = torch.randint(20, (50,), generator=generator)
    flows = [Flow.first_order(log_probs, s, labels, top=4) for s in (one, other, one + other)]
    small = 1e-6 * (one + other)
    real = Flow.of(log_probs, renormalised(log_probs, small), labels, top=4)
    for name in ("change", "label", "argmax", "top", "rest", "entropy"):
        first, second, whole = (getattr(flow, name) for flow in flows)
        assert torch.allclose(first + second, whole, atol=1e-14), name
        assert torch.allclose(getattr(real, name), 1e-6 * whole, rtol=1e-3, atol=1e-11), name
    whole = flows[-1]
    assert torch.equal(whole.gainers, real.gainers) and torch.equal(whole.losers, real.losers)
    assert float((whole.label + whole.argmax + whole.top + whole.rest).abs().max()) < 1e-14
    assert torch.equal(whole.likeliest, log_probs.argmax(1) == labels)


def test_lemma_1_as_printed():
    """1 / Σ β_j p_j with the paper's β, for pushes in both directions, large and small."""
    generator = torch.Generator().manual_seed(1)
    for eta in (-8.0, -0.5, -1e-6, 1e-6, 0.5, 8.0):
        p = (2 * torch.randn(50, generator=generator, dtype=torch.float64)).softmax(-1)
        y = 7
        push = torch.zeros(50, dtype=torch.float64)
        push[y] = eta
        found = softmax_step(p.log(), push)
        for i in range(50):
            if i == y:
                beta = torch.exp(-eta * (1 + p - p[i]))
                beta[y] = 1.0
            else:
                beta = torch.exp(-eta * (p - p[i]))
                beta[y] = torch.exp(-eta * (p[y] - p[i] - 1))
            assert float(found[i]) == pytest.approx(-math.log(float(beta @ p)), abs=1e-12)


def test_threshold_is_the_first_order_of_the_lemma():
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(20, 40, generator=generator, dtype=torch.float64)
    labels = torch.arange(20)
    push = torch.zeros(20, 40, dtype=torch.float64).scatter_(1, labels[:, None], -1e-7)
    found = softmax_step(logits, push)
    p = logits.softmax(-1)
    own = torch.nn.functional.one_hot(labels, 40)
    expected = 1e-7 * (p - own - threshold(p.log(), labels)[:, None])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-14)


def test_answers_can_be_read_and_kept():
    model = zoo.build("llama", seed=3)
    flow = lddyn.massflow(model, BAD, lddyn.DPO(GOOD, BAD), lr=0.1, optimizer="adamw")
    kept = json.loads(json.dumps(flow.to_dict()))
    assert len(kept["by_position"]) == len(BAD) and kept["summary"]["optimizer"] == "AdamW"
    entry = kept["by_position"][0]
    assert entry["token_id"] == 62 and len(entry["top"]) == 10 and 62 not in entry["top"]
    p = flow.log_probs[0].exp()
    above = {v for v in range(len(p)) if v != 62 and p[v] > flow.threshold[0]}
    assert entry["above_threshold"] == len(above)
    assert len(str(flow).splitlines()) == 2 + len(BAD)


def test_adapters_other_optimizers_and_the_own_dtype():
    model = zoo.lora("llama")
    for optimizer, lr in (("sgd", 1e-3), ("adamw", 1e-4)):
        options = {"lr": lr, "optimizer": optimizer}
        exact = lddyn.massflow(model, BAD, lddyn.DPO(GOOD, BAD), **options)
        own = lddyn.massflow(model, BAD, lddyn.DPO(GOOD, BAD), dtype=None, **options)
        assert torch.allclose(exact.measured.change, own.measured.change, atol=1e-6)
        assert torch.allclose(exact.predicted.change, own.predicted.change, atol=1e-6)
        error = (exact.measured.change - exact.predicted.change).norm()
        assert float(error) < 0.1 * float(exact.measured.change.norm())


def test_nothing_of_the_model_changes():
    model = zoo.build("llama", seed=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lddyn.massflow(model, BAD, lddyn.SFT(GOOD), lr=0.1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_real_step_needs_the_model(tmp_path):
    dec = lddyn.decompose(zoo.build("llama", seed=3), BAD, lddyn.SFT(GOOD), lr=0.1)
    before, after = dec.real_step()["bad"]
    labels = torch.tensor(BAD.targets)[:, None]
    measured = (after - before).gather(1, labels)[:, 0]
    assert torch.allclose(measured, dec.verify([0.1]).measured[0], atol=1e-12)
    dec.save(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="this decomposition was read from disk"):
        type(dec).load(tmp_path / "kept").real_step()


def test_mistakes_are_named():
    model = zoo.build("llama", seed=3)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        lddyn.massflow(model, BAD, lddyn.SFT(GOOD), lr=0.1, top=0)
    with pytest.raises(ValueError, match="one column per logit, 5, got 4"):
        softmax_step(torch.zeros(5), torch.zeros(4))
