"""Losses and the weights they put on tokens, against closed forms and whole-model autograd."""

import copy
import dataclasses
import math
import pickle
import re
import warnings

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
    loss, weights = lddyn.SFT([one, other], reduction="sum").weights(log_probs())
    assert loss == pytest.approx(-sum(summed(log_probs())))
    assert all(bool((w == -1).all()) for w in weights)
    loss, weights = lddyn.SFT([one, other]).weights(log_probs())
    assert loss == pytest.approx(-sum(summed(log_probs())) / 11)
    assert all(torch.allclose(w, torch.tensor(-1 / 11, dtype=torch.float64)) for w in weights)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
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
        ({"reference": (1.0,)}, r"must have the shape \(2,\), got \(1,\)"),
        ({"reference": (1.0, float("nan"))}, "must be finite numbers of nats"),
        ({"reference": (1.0, 2.0, 3.0)}, r"must have the shape \(2,\), got \(3,\)"),
        ({"reference": torch.zeros(2, 2)}, r"must have the shape \(2,\), got \(2, 2\)"),
        ({"reference": "base"}, "reference must be a model, 'self', 'adapter-off', 'adapter:NAME'"),
        ({"reference": "adapter:"}, "reference must be a model, 'self', 'adapter-off'"),
        ({"reference": None}, "reference must be a model, .* got None"),
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


# --------------------------------------------------------------------------- the table of losses


def several(count=3):
    """Pairs of different lengths, with log-probs of all chosen, then all rejected responses."""
    generator = torch.Generator().manual_seed(7)
    chosen = [lddyn.Example([1, 2], [3 + k] * (2 + k)) for k in range(count)]
    rejected = [lddyn.Example([1, 2], [13 + k] * (5 - k)) for k in range(count)]
    values = [
        -3 * torch.rand(len(e), generator=generator, dtype=torch.float64)
        for e in [*chosen, *rejected]
    ]
    reference = -8 * torch.rand(2, count, generator=generator, dtype=torch.float64)
    return chosen, rejected, values, reference


def test_a_loss_is_a_frozen_value():
    loss = lddyn.Loss("cdpo", beta=0.2)
    assert repr(loss) == "Loss('cdpo', beta=0.2, label_smoothing=0.1)"
    assert loss == lddyn.Loss("cdpo", label_smoothing=0.1, beta=0.2) != lddyn.Loss("cdpo")
    assert len({loss, lddyn.Loss(loss), lddyn.Loss(loss, beta=1)}) == 2
    assert lddyn.Loss(loss, beta=1).parameters == {"beta": 1.0, "label_smoothing": 0.1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.name = "dpo"
    loss.parameters["beta"] = 5.0
    assert loss.parameters["beta"] == 0.2
    assert copy.deepcopy(loss) == pickle.loads(pickle.dumps(loss)) == loss


def test_the_table_in_the_documentation_is_the_table():
    """Names, parameters and defaults in the docstring of Loss are those of LOSSES."""
    rows = re.findall(r"^ *\| ([^|]+) \|.*\| ([^|]*) ?\|$", lddyn.Loss.__doc__, re.MULTILINE)[1:]
    assert [name for name, _ in rows] == list(objectives.LOSSES)
    for name, text in rows:
        shown = {
            key: float(value) for key, value in re.findall(r"(\w+)(?: \S+)? \(([\d.]+)\)", text)
        }
        assert shown == lddyn.Loss(name).parameters, name


@pytest.mark.parametrize("name", [n for n, row in objectives.LOSSES.items() if not row.of_batch])
def test_a_batch_is_the_mean_over_its_pairs(name):
    chosen, rejected, values, reference = several()
    batch = lddyn.preference(name, chosen, rejected, reference=reference)
    loss, weights = batch.weights(values)
    losses = []
    for i, (good, bad) in enumerate(zip(chosen, rejected, strict=True)):
        one = lddyn.preference(name, good, bad, reference=tuple(reference[:, i].tolist()))
        each, (up, down) = one.weights([values[i], values[3 + i]])
        losses.append(each)
        assert torch.allclose(weights[i], up / 3, rtol=1e-12, atol=0)
        assert torch.allclose(weights[3 + i], down / 3, rtol=1e-12, atol=0)
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_losses_of_a_batch_are_those_of_all_its_tokens_or_sorted_margins():
    """SFT is the mean over all tokens of the batch; AOT compares sorted margins, not pairs."""
    chosen, rejected, values, reference = several()
    loss, weights = lddyn.preference("sft", chosen, rejected).weights(values)
    tokens = torch.cat(values[:3])
    assert loss == pytest.approx(-float(tokens.mean()))
    assert all(torch.allclose(w, torch.full_like(w, -1 / len(tokens))) for w in weights[:3])
    mixed = lddyn.Loss(["sigmoid", "sft"], loss_weights=[0.5, 2.0])
    parts = [
        lddyn.preference(name, chosen, rejected, reference=reference).weights(values)[0]
        for name in ("dpo", "sft")
    ]
    total, _ = lddyn.preference(mixed, chosen, rejected, reference=reference).weights(values)
    assert total == pytest.approx(0.5 * parts[0] + 2 * parts[1])
    sums = torch.stack([v.sum() for v in values]).view(2, 3)
    ratios, known = (x[0] - x[1] for x in (sums, reference))
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratios.sort()[0] - known.sort()[0])).mean()
    got, _ = lddyn.preference("aot", chosen, rejected, reference=reference).weights(values)
    assert got == pytest.approx(float(expected), rel=1e-12)


PROMPTLESS = [n for n, row in objectives.LOSSES.items() if not row.reads_prompt]


@pytest.mark.parametrize("name", PROMPTLESS)
def test_weights_of_pairs_have_the_sign_of_the_objective(name):
    """w = ∂L/∂log π, negative raises: one meaning for one pair, a batch and a whole set."""
    chosen, rejected, values, reference = several()
    sums = torch.stack([v.sum() for v in values]).view(2, 3)
    lengths = torch.tensor([[len(e) for e in side] for side in (chosen, rejected)])
    weights = lddyn.Loss(name).weights(sums, reference, lengths)
    _, expected = lddyn.preference(name, chosen, rejected, reference=reference).weights(values)
    for w, token_weights in zip(weights.flatten(), expected, strict=True):
        assert torch.allclose(token_weights, (w / 3).expand_as(token_weights), rtol=1e-12)
    assert not weights.requires_grad and not sums.requires_grad


def test_a_batch_of_pairs_against_autograd_through_the_model():
    model, reference = zoo.build("llama").eval(), zoo.build("llama", seed=3).eval()
    one, other = pair()
    third = lddyn.Example(prompt_ids=[5, 9, 12], response_ids=[7, 21])
    chosen, rejected = [one, third, other], [other, one, third]
    update = lddyn.DPO(chosen, rejected, beta=0.4, reference=reference)
    dec = lddyn.decompose(model, one, update, lr=1e-3)

    def gains(example):
        with torch.no_grad():
            ref = zoo.token_log_probs(reference, example).sum()
        return zoo.token_log_probs(model, example).sum() - ref

    margins = [0.4 * (gains(c) - gains(r)) for c, r in zip(chosen, rejected, strict=True)]
    loss = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    parameters = list(model.parameters())
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    jacobian = zoo.jacobian(zoo.token_log_probs(model, one), parameters)
    assert dec.loss == pytest.approx(loss.item(), rel=1e-5)
    error = float((dec[0].delta_logp / 1e-3 + jacobian @ flat).abs().max())
    assert error <= 5e-6 * float((jacobian.norm(dim=1) * flat.norm()).max())
    assert list(dec[0].by_sequence()) == ["y+ 0", "y+ 1", "y+ 2", "y- 0", "y- 1", "y- 2"]
    assert torch.tensor(dec.settings["reference_log_probs"]).shape == (2, 3)


def test_dpo_by_name_is_dpo():
    chosen, rejected = pair()
    reference = (-7.0, -9.0)
    for name, smooth in (("dpo", 0.0), ("cdpo", 0.2)):
        extra = {"label_smoothing": smooth} if smooth else {}
        by_name = lddyn.preference(name, chosen, rejected, reference=reference, beta=0.3, **extra)
        by_loss = lddyn.preference(
            lddyn.Loss(name, beta=0.3, **extra), chosen, rejected, reference=reference
        )
        dpo = lddyn.DPO(chosen, rejected, 0.3, reference, smooth)
        assert dpo.describe() == by_name.describe() == by_loss.describe()
        for other in (by_name, by_loss):
            loss, weights = other.weights(log_probs())
            assert loss == dpo.weights(log_probs())[0]
            for w, v in zip(weights, dpo.weights(log_probs())[1], strict=True):
                assert torch.equal(w, v)


@pytest.mark.parametrize("name", list(objectives.LOSSES))
def test_a_named_objective_can_be_decomposed(name):
    chosen, rejected = pair()
    objective = lddyn.preference(name, chosen, rejected)
    dec = lddyn.decompose(zoo.build("llama"), [chosen, rejected], objective, lr=1e-6)
    assert dec.settings["objective"] == name
    assert dec.verify([1e-6]).relative_error < 0.01


def test_orpo_learns_the_prompt_too_and_stays_finite_where_the_response_is_certain():
    chosen, rejected = lddyn.Example([1, 5], [7], name="one"), lddyn.Example([1, 5], [9, 2])
    orpo = lddyn.preference("orpo", chosen, rejected, beta=0.1)
    assert orpo.examples[0].prompt_ids == (1,) and orpo.examples[0].response_ids == (5, 7)
    prompt, down = -1.0, torch.tensor([-3.0, -2.0], dtype=torch.float64)
    for certain in (0.0, -1e-12, -0.7, -5.0):
        up = torch.tensor([prompt, certain], dtype=torch.float64)
        loss, weights = orpo.weights([up, down])
        a, b = certain, float(down.mean())
        odds = torch.tensor(a - b).double() - math.log(-math.expm1(a) or 1e-300)
        odds = odds + math.log(-math.expm1(b))
        expected = -(prompt + a) / 2 - 0.1 * torch.nn.functional.logsigmoid(odds)
        assert loss == pytest.approx(float(expected), rel=1e-9)
        slope = 1 / (-math.expm1(a) + math.exp(a - b) * -math.expm1(b))
        assert weights[0].tolist() == pytest.approx([-0.5, -0.5 - 0.1 * slope], rel=1e-9)
    with pytest.raises(ValueError, match=r"not finite at response 'y-' \(two\), where log π = 0"):
        two = lddyn.Example([1, 5], [9], name="two")
        lddyn.preference("orpo", chosen, two).weights([down, down[:1] * 0])


def test_kto_on_single_responses_and_on_pairs():
    chosen, rejected, values, reference = several()
    known, flags = reference.flatten(), [True] * 3 + [False] * 3
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    single = lddyn.KTO([*chosen, *rejected], flags, reference=known, kl=0.4, **options)
    paired = lddyn.preference("kto", chosen, rejected, reference=reference, baseline=0.4, **options)
    (one, ones), (other, others) = single.weights(values), paired.weights(values)
    assert one == pytest.approx(other, rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ones, others, strict=True))
    model, base = zoo.build("llama"), zoo.build("llama", seed=3)
    examples = [zoo.examples()[0], zoo.examples()[1]]
    ready = lddyn.KTO(examples, [True, False], reference=base).prepare(lddyn.Anatomy(model))
    mixed = [
        lddyn.Example(a.prompt_ids, b.response_ids, b.response_mask)
        for a, b in zip(examples, reversed(examples), strict=True)
    ]
    gains = [
        float((zoo.token_log_probs(model.eval(), e) - zoo.token_log_probs(base.eval(), e)).sum())
        for e in mixed
    ]
    assert ready.kl == pytest.approx(max(0.0, sum(gains) / 2), rel=1e-4, abs=1e-6)
    assert lddyn.KTO(examples[0], False).prepare(lddyn.Anatomy(model)).kl == 0.0
    with pytest.raises(ValueError, match="give two examples or more"):
        lddyn.KTO(examples[0], False, reference=base).prepare(lddyn.Anatomy(model))
    with pytest.raises(ValueError, match="labels must be one bool per example, got 1 for 2"):
        lddyn.KTO(examples, True)


def test_a_loss_that_is_not_finite_names_the_response():
    one, other = lddyn.Example([1], [2], name="one"), lddyn.Example([1], [3, 4], name="two")
    objective = lddyn.Objective(lambda lp: torch.log(-lp[0].sum()) + lp[1].sum(), [one, other])
    with pytest.raises(ValueError, match="not finite at response 'one', where log π = 0"):
        objective.weights([torch.zeros(1), -torch.ones(2)])


def test_dft_weighs_a_token_by_its_own_probability():
    example = lddyn.Example([1], [2, 3])
    values = torch.tensor([-0.5, -2.0], dtype=torch.float64)
    loss, weights = lddyn.SFT(example, loss_type="dft").weights([values])
    assert loss == pytest.approx(float(-(values * values.exp()).mean()))
    assert torch.allclose(weights[0], -values.exp() / 2)


def test_mistakes_in_a_named_objective_are_named():
    chosen, rejected = pair()
    with pytest.raises(ValueError, match=r"objective must be one of sft, .*, got 'orpos'"):
        lddyn.preference("orpos", chosen, rejected)
    with pytest.raises(ValueError, match=r"ipo has the parameters \['beta'\], got 'gamma'"):
        lddyn.preference("ipo", chosen, rejected, gamma=1.0)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        lddyn.preference("ipo", chosen, rejected, beta=0)
    with pytest.raises(ValueError, match="penalty must be at least 0, got -1"):
        lddyn.preference("dpop", chosen, rejected, penalty=-1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        lddyn.preference("cdpo", chosen, rejected, label_smoothing=0.5)
    with pytest.raises(ValueError, match="baseline must be finite, got inf"):
        lddyn.Loss("kto", baseline=math.inf)
    with pytest.raises(RuntimeError, match="call prepare"):
        lddyn.preference("ipo", chosen, rejected).weights(log_probs())
    with pytest.raises(ValueError, match="must be as many, got 2 and 1"):
        lddyn.preference("ipo", [chosen, chosen], rejected)


# --------------------------------------------------------------------------- references


def sums_of(model):
    return [float(zoo.token_log_probs(model.eval(), e).detach().sum()) for e in pair()]


def reference_of(model, reference):
    dec = lddyn.decompose(model, pair()[0], lddyn.DPO(*pair(), reference=reference), lr=1e-3)
    return dec.settings["reference_log_probs"]


def test_preparing_leaves_the_objective_as_it_is():
    update = lddyn.DPO(*pair())
    prepared = update.prepare(lddyn.Anatomy(zoo.build("llama")))
    assert update.reference_log_probs is None and prepared.reference_log_probs.shape == (2, 1)
    assert prepared.examples == update.examples and prepared.examples is not update.examples


def test_every_kind_of_reference_of_one_model_is_the_same():
    model, other = zoo.build("llama"), zoo.build("llama", seed=7)
    expected = pytest.approx(sums_of(other), rel=1e-5)
    given = reference_of(model, other)
    assert given == expected
    assert reference_of(model, lddyn.Anatomy(other)) == given
    assert reference_of(model, torch.tensor(given)[:, None]) == pytest.approx(given)
    assert reference_of(model, (torch.tensor([given[0]]), torch.tensor([given[1]]))) == given
    assert reference_of(model, "self") == pytest.approx(sums_of(model), rel=1e-5)


def test_an_adapter_by_name_is_the_reference():
    model = zoo.lora("llama")
    torch.manual_seed(5)
    model.add_adapter("before", model.peft_config["default"])
    for key, parameter in model.named_parameters():
        if ".before." in key:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    own = sums_of(model)
    model.set_adapter("before")
    expected = sums_of(model)
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    assert expected != pytest.approx(own, rel=1e-2)
    assert reference_of(model, "adapter:before") == pytest.approx(expected, rel=1e-5)
    assert reference_of(model, "adapter:default") == pytest.approx(own, rel=1e-5)
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert sums_of(model) == own
    with pytest.raises(ValueError, match=r"must name an adapter .* has default, before: load it"):
        reference_of(model, "adapter:after")
    with pytest.raises(ValueError, match="'adapter:before' needs a peft model"):
        reference_of(zoo.build("llama"), "adapter:before")


@pytest.mark.case("chosen and rejected answer different prompts")
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_pair_of_two_prompts_is_remarked(loss):
    """Also where the loss learns the prompt; not where a cut has made the prompts differ."""
    one, other = lddyn.Example([1, 5], [7, 2]), lddyn.Example([1, 6], [8, 2])
    with pytest.warns(UserWarning, match="Chosen and rejected have different prompts"):
        pair = lddyn.preference(loss, one, other)
    with pytest.warns(UserWarning, match="In 1 of 2 pairs, first in pair 1, chosen"):
        lddyn.DPO([one, one], [lddyn.Example([1, 5], [9]), other])
    dec = lddyn.decompose(zoo.build("llama"), one, pair, lr=1e-3)
    assert "have different prompts" in dec.explain()
    cut = lddyn.Example([6], [8, 2], notes=[("truncated_prompt", "2 -> 1 tokens, end kept")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not lddyn.preference(loss, one, lddyn.Example([1, 5], [9, 2])).remarks()
        assert not lddyn.preference(loss, one, cut).remarks()
