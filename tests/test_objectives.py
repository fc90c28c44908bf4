"""Losses and the weights they put on tokens, against closed forms and whole-model autograd."""

import math

import pytest
import torch
import zoo

import lddyn
from lddyn import objectives

torch.set_num_threads(1)


def pair():
    chosen, rejected = zoo.examples()
    return chosen, rejected


def log_probs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in (6, 5)]


def summed(values):
    return [float(v.sum()) for v in values]


def weights_of(dec):
    return torch.tensor([t.weight for t in dec.update_tokens], dtype=torch.float64)


def test_sft_weights():
    one, other = pair()
    loss, weights = lddyn.SFT([one, other]).weights(log_probs())
    assert loss == pytest.approx(-sum(summed(log_probs())))
    assert all(bool((w == -1).all()) for w in weights)
    loss, weights = lddyn.SFT([one, other], reduction="mean").weights(log_probs())
    assert loss == pytest.approx(-sum(summed(log_probs())) / 11)
    assert all(torch.allclose(w, torch.tensor(-1 / 11, dtype=torch.float64)) for w in weights)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        lddyn.SFT(one, reduction="max")


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("reference", [(-5.0, -9.0), (0.0, 0.0), (-20.0, -2.5)])
def test_dpo_weights_are_the_closed_form(beta, reference):
    """G± = ±β(1 − a)(π − y±), paper App. B: w = ∓β(1 − a)."""
    values = log_probs(1)
    loss, weights = lddyn.DPO(*pair(), beta=beta, reference=reference).weights(values)
    plus, minus = summed(values)
    a = 1 / (1 + math.exp(-beta * ((plus - reference[0]) - (minus - reference[1]))))
    assert loss == pytest.approx(-math.log(a), rel=1e-9)
    assert torch.allclose(weights[0], torch.full((6,), -beta * (1 - a)).double(), rtol=1e-6)
    assert torch.allclose(weights[1], torch.full((5,), beta * (1 - a)).double(), rtol=1e-6)


@pytest.mark.parametrize("smooth", [0.1, 0.4])
def test_conservative_dpo(smooth):
    values = log_probs(2)
    beta, reference = 0.5, (-8.0, -7.0)
    update = lddyn.DPO(*pair(), beta=beta, reference=reference, label_smoothing=smooth)
    loss, weights = update.weights(values)
    plus, minus = summed(values)
    margin = beta * ((plus - reference[0]) - (minus - reference[1]))
    a = 1 / (1 + math.exp(-margin))
    assert loss == pytest.approx(-(1 - smooth) * math.log(a) - smooth * math.log(1 - a), rel=1e-9)
    slope = beta * ((1 - smooth) * (1 - a) - smooth * a)
    assert torch.allclose(weights[0], torch.full((6,), -slope).double(), rtol=1e-6)
    assert torch.allclose(weights[1], torch.full((5,), slope).double(), rtol=1e-6)


def test_extreme_margins_stay_finite():
    for reference in ((-1e4, 0.0), (0.0, -1e4)):
        loss, weights = lddyn.DPO(*pair(), beta=1.0, reference=reference).weights(log_probs())
        assert math.isfinite(loss) and all(bool(torch.isfinite(w).all()) for w in weights)
    assert float(weights[0][0]) == pytest.approx(-1.0)  # a = 0: full weight β


def test_self_reference_is_one_half():
    model = zoo.build("llama")
    dec = lddyn.decompose(model, pair()[0], lddyn.DPO(*pair(), beta=0.2), lr=1e-3)
    assert dec.loss == pytest.approx(math.log(2), abs=1e-6)
    w = weights_of(dec)
    assert torch.allclose(w[:6], torch.tensor(-0.1).double(), atol=1e-7)
    assert torch.allclose(w[6:], torch.tensor(0.1).double(), atol=1e-7)
    assert [t.sequence for t in dec.update_tokens] == ["y+"] * 6 + ["y-"] * 5


def test_self_reference_belongs_to_the_step_not_to_the_object():
    update = lddyn.DPO(*pair())
    models = [zoo.build("llama", seed) for seed in (0, 1)]
    decs = [lddyn.decompose(m, pair()[0], update, lr=1e-4) for m in models]
    for dec in decs:
        assert dec.loss == pytest.approx(math.log(2), abs=1e-6)
        # Later questions about the first are still about the first.
        lrs = [1e-6, 5e-7]
        verification = dec.verify(lrs=lrs)
        assert float((verification.predicted[0] / 1e-2 - dec[0].delta_logp).abs().max()) <= (
            1e-4 * float(dec[0].delta_logp.abs().max())
        )


def test_model_reference():
    model, reference = zoo.build("llama"), zoo.build("llama", seed=7)
    for frozen in (False, True):
        reference.requires_grad_(not frozen)
        reference.train(not frozen)
        dec = lddyn.decompose(
            model, pair()[0], lddyn.DPO(*pair(), beta=0.3, reference=reference), lr=1e-3
        )
        own, ref = (
            [float(zoo.token_log_probs(m.eval(), e).detach().sum()) for e in pair()]
            for m in (model, reference)
        )
        margin = 0.3 * ((own[0] - ref[0]) - (own[1] - ref[1]))
        assert dec.loss == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
        assert dec.settings["reference_log_probs"] == pytest.approx(ref, rel=1e-5)
        assert all(p.requires_grad is not frozen for p in reference.parameters())


def test_adapter_off_reference():
    model = zoo.lora("llama")
    dec = lddyn.decompose(
        model, pair()[0], lddyn.DPO(*pair(), beta=0.3, reference="adapter-off"), lr=1e-3
    )
    base = zoo.build("llama").eval()
    ref = [float(zoo.token_log_probs(base, e).detach().sum()) for e in pair()]
    assert dec.settings["reference_log_probs"] == pytest.approx(ref, rel=1e-5)
    assert abs(dec.loss - math.log(2)) > 1e-3
    # With B = 0 the adapter changes nothing: a = 1/2.
    fresh = zoo.lora("llama", zero=True)
    dec = lddyn.decompose(fresh, pair()[0], lddyn.DPO(*pair(), reference="adapter-off"), lr=1e-3)
    assert dec.loss == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="'adapter-off' needs a peft model"):
        lddyn.decompose(
            zoo.build("llama"), pair()[0], lddyn.DPO(*pair(), reference="adapter-off"), lr=1e-3
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": -1}, "beta must be positive, got -1"),
        ({"beta": float("nan")}, "beta must be positive, got nan"),
        ({"reference": (1.0,)}, "two finite numbers"),
        ({"reference": (1.0, float("nan"))}, "two finite numbers"),
        ({"reference": (1.0, 2.0, 3.0)}, "two finite numbers"),
        ({"reference": "base"}, "reference must be a model, 'adapter-off', 'self'"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
    ],
)
def test_bad_dpo_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        lddyn.DPO(*pair(), **options)


LOSSES = {
    "ipo": lambda lp: ((lp[0].mean() - lp[1].mean()) - 2.5) ** 2,
    "hinge": lambda lp: torch.relu(3.0 - 0.1 * (lp[0].sum() - lp[1].sum())),
    "weighted": lambda lp: -(lp[0] * torch.linspace(0.1, 1, 6)).sum() + lp[1].exp().sum(),
    "clipped": lambda lp: -torch.minimum(lp[0].exp() * 1.3, torch.tensor(0.5)).sum(),
    "one-sequence": lambda lp: lp[1].logsumexp(0),
    "shape-one": lambda lp: -lp[0].sum().reshape(1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_against_autograd_through_the_model(name):
    model = zoo.build("qwen2").eval()
    loss_fn = LOSSES[name]
    dec = lddyn.decompose(model, pair()[0], lddyn.Objective(loss_fn, pair()), lr=1e-3)
    exact = [zoo.token_log_probs(model, e) for e in pair()]
    loss = loss_fn(exact).sum()
    assert dec.loss == pytest.approx(loss.item(), rel=1e-5)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss, parameters)
    jacobian = zoo.jacobian(zoo.token_log_probs(model, pair()[0]), parameters)
    flat = torch.cat([g.flatten() for g in gradient])
    scale = float((jacobian.norm(dim=1) * flat.norm()).max())
    error = float((dec[0].delta_logp / 1e-3 + jacobian @ flat).abs().max())
    assert error <= 5e-6 * scale


@pytest.mark.parametrize(
    ("fn", "kind", "message"),
    [
        (lambda lp: -lp[0], ValueError, r"must be a scalar, got shape \(6,\): add \.sum\(\)"),
        (lambda lp: -float(lp[0].detach().sum()), TypeError, "must be a scalar tensor.*got float"),
        (lambda lp: None, TypeError, "got NoneType"),
        (lambda lp: torch.tensor(1.0), ValueError, "does not depend on the log-probs"),
        (lambda lp: lp[0].detach().sum(), ValueError, "does not depend on the log-probs"),
        (lambda lp: lp[0].sum() * float("nan"), ValueError, "not finite"),
        (lambda lp: (lp[0].sum() * 0).sqrt(), ValueError, "gradient is not finite"),
        (lambda lp: lp[0].sum() / 0.0, ValueError, "not finite"),
    ],
    ids=["vector", "float", "None", "constant", "detached", "nan", "nan-gradient", "inf"],
)
def test_bad_losses(fn, kind, message):
    with pytest.raises(kind, match=message):
        lddyn.decompose(zoo.build("gpt2"), pair()[0], lddyn.Objective(fn, pair()), lr=1e-3)


def test_bad_objectives():
    with pytest.raises(ValueError, match="at least one example"):
        lddyn.Objective(lambda lp: lp[0].sum(), [])
    with pytest.raises(ValueError, match="at least one example"):
        lddyn.SFT([])
    with pytest.raises(ValueError, match="one per example, got 1 for 2"):
        lddyn.Objective(lambda lp: lp[0].sum(), pair(), names=["only"])
    with pytest.raises(TypeError, match=r"update must be lddyn\.SFT"):
        lddyn.decompose(zoo.build("gpt2"), pair()[0], pair()[1], lr=1e-3)


# --------------------------------------------------------------------------- preference(name, …)


def test_dpo_by_name_is_dpo():
    chosen, rejected = pair()
    reference = (-7.0, -9.0)
    for name, smooth in (("dpo", 0.0), ("cdpo", 0.2)):
        extra = {"label_smoothing": smooth} if smooth else {}
        found = lddyn.preference(name, chosen, rejected, reference=reference, beta=0.3, **extra)
        expected = lddyn.DPO(chosen, rejected, 0.3, reference, smooth)
        loss, weights = found.weights(log_probs())
        assert loss == pytest.approx(expected.weights(log_probs())[0], rel=1e-12)
        for w, v in zip(weights, expected.weights(log_probs())[1], strict=True):
            assert torch.allclose(w, v, rtol=1e-12)


@pytest.mark.parametrize("name", list(objectives.PREFERENCES))
def test_a_named_objective_can_be_decomposed(name):
    chosen, rejected = pair()
    objective = lddyn.preference(name, chosen, rejected)
    dec = lddyn.decompose(zoo.build("llama"), [chosen, rejected], objective, lr=1e-6)
    assert dec.settings["objective"] == name
    assert dec.verify([1e-6]).relative_error < 0.01


def test_mistakes_in_a_named_objective_are_named():
    chosen, rejected = pair()
    with pytest.raises(ValueError, match=r"objective must be one of sft, .*, got 'orpo'"):
        lddyn.preference("orpo", chosen, rejected)
    with pytest.raises(ValueError, match=r"ipo has the parameters \['beta'\], got 'gamma'"):
        lddyn.preference("ipo", chosen, rejected, gamma=1.0)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        lddyn.preference("ipo", chosen, rejected, beta=0)
    with pytest.raises(ValueError, match="penalty must be at least 0, got -1"):
        lddyn.preference("dpop", chosen, rejected, penalty=-1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        lddyn.preference("cdpo", chosen, rejected, label_smoothing=0.5)
    with pytest.raises(RuntimeError, match="call prepare"):
        lddyn.preference("ipo", chosen, rejected).weights(log_probs())
