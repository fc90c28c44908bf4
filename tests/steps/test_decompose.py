"""One step decomposed: against finite differences in true float64 and against real steps."""

import copy
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import zoo
from torch.nn.functional import logsigmoid

import lddyn
from lddyn.engine.stream.moved import moved_model
from lddyn.errors import DisagreementError
from lddyn.files import sealed, unsealed
from lddyn.memory import Budget
from lddyn.steps import setup
from lddyn.steps.budget import StepBudget, held_bytes, states_of
from lddyn.steps.decomposition import Decomposition
from lddyn.steps.rules import RULES
from lddyn.steps.setup import UpdateState, shifted_copy

torch.set_num_threads(1)

THE_16 = list(zoo.ARCHITECTURES)[:16]
FLOAT32, BFLOAT16 = 5e-6, 2e-2


def gradients_of(model, example):
    """∇ log π(y_l) in true float64, flat, and the norms of the rows."""
    rows = zoo.oracle_jacobian(model, example)
    return rows, rows.norm(dim=1)


def router_margin(model):
    """Least difference of the logits of the last expert taken and the first one left."""
    found = []

    def look(module, args, out):
        logits = out[0] if isinstance(out, tuple) else out
        top = logits.data.flatten(0, -2).float().sort(-1, descending=True).values
        found.append(float((top[:, 1] - top[:, 2]).min()))

    gates = [m for n, m in model.named_modules() if n.endswith(".gate")]
    hooks = [gate.register_forward_hook(look) for gate in gates]
    for example in zoo.examples():
        zoo.token_log_probs(model, example)
    for hook in hooks:
        hook.remove()
    return min(found)


# --------------------------------------------------------------------------- exactness


# A head is tied in every other architecture; tests/entk/test_operator.py has the others.
KINDS = [
    (name, kind)
    for i, name in enumerate(THE_16)
    for kind in (("untied", "tied")[i % 2], "lora", "bfloat16")
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_answers_match_the_oracle(name, kind):
    if kind == "lora":
        model = zoo.lora(name)
    else:
        model = zoo.build(name, tie_word_embeddings=kind == "tied")
    bound = FLOAT32
    if kind == "bfloat16":
        model, bound = model.bfloat16(), BFLOAT16
        seed = 0
        while name == "mixtral" and router_margin(model) < 0.01:
            seed += 1  # rounding must not choose the expert
            model = zoo.build(name, seed, tie_word_embeddings=False).bfloat16()
    model.eval()
    observed, updated = zoo.examples()
    rows, sizes = gradients_of(model, observed)
    own, lengths = gradients_of(model, updated)
    lr = 1e-3
    attention = "eager" if THE_16.index(name) % 2 else "lddyn"
    update = lddyn.DPO(updated, observed, beta=0.5, reference=(-20.0, -21.0))
    opened = lddyn.Anatomy(model, attention)
    dec = lddyn.decompose(opened, [observed, updated], update, lr=lr)
    weights = torch.tensor([t.weight for t in dec.update_tokens], dtype=torch.float64)
    assert dec[0].influence.shape == (6, 11) and dec[1].influence.shape == (5, 11)

    gram = rows @ torch.cat([own, rows]).T
    scale = sizes[:, None] * torch.cat([lengths, sizes])[None] * weights.abs() * lr
    # Where plain autograd in the same dtype is worse than the bound (a sharp softmax, a ReLU that
    # flips), lddyn may be at most twice as wrong as it.
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = [
        zoo.jacobian(zoo.token_log_probs(model, e), parameters).double()
        for e in (updated, observed)
    ]
    rough = -lr * weights * (plain[1] @ torch.cat(plain).T)
    truth = -lr * weights * gram
    errors = (dec[0].influence.double() - truth).abs() / scale
    if (name, kind) != ("opt", "bfloat16"):
        assert float(errors[:, :5].max()) <= bound  # two different sequences
    bound = max(bound, 2 * zoo.normalised_error(rough, truth, scale))
    assert float(errors.max()) <= bound  # and a sequence with itself

    # Row sums, and the parts of y+ and y−.
    parts = dec[0].by_sequence()
    assert list(parts) == ["y+", "y-"]
    assert torch.equal(parts["y+"], dec[0].influence[:, :5].sum(1))
    assert torch.equal(dec[0].delta_logp, dec[0].influence.sum(1))

    # All of the vocabulary, for the step and for single tokens of it.
    directions = -lr * weights[:, None] * torch.cat([own, rows])
    whole = directions.sum(0)
    shift = zoo.oracle_shift(model, observed, whole)
    widest = torch.maximum(sizes, zoo.widest(model, observed))[:, None]
    reach = widest * float(whole.norm())
    assert zoo.normalised_error(dec[0].delta_log_probs(), shift, reach) <= bound
    for index in (0, 4, 8):
        effects = dec[0].token_effects(index)
        truth = zoo.oracle_shift(model, observed, directions[index])
        reach = widest * float(directions[index].norm())
        error = zoo.normalised_error(effects, truth, reach)
        if error > bound:  # then plain torch's gradient, pushed by its forward mode, is no better
            rough = -lr * weights[index] * torch.cat(plain)[index]
            for pushed in zoo.plain_shifts(model, observed, rough):
                bound = max(bound, 2 * zoo.normalised_error(pushed, truth, reach))
        assert error <= bound

    # By parameter.
    trainable = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    pieces = zip(rows.sum(0).split([k for _, k in trainable]), strict=True)
    moves = whole.split([k for _, k in trainable])
    limit = bound * float(rows.sum(0).norm() * whole.norm())
    shares = dec[0].by_parameter()
    assert set(shares) <= {n for n, _ in trainable}
    for (parameter, _), (piece,), move in zip(trainable, pieces, moves, strict=True):
        assert abs(shares.get(parameter, 0.0) - float(piece @ move)) <= limit, parameter


def test_fresh_lora_acts_through_b_only():
    model = zoo.lora("mistral", zero=True)
    observed, updated = zoo.examples()
    shares = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)[0].by_parameter()
    assert len(shares) == 28
    for name, value in shares.items():
        assert (value == 0.0) if "lora_A" in name else (value != 0.0), name


def test_float32_adapter_on_a_bfloat16_base():
    """What peft makes of a bfloat16 model by default."""
    model = zoo.lora("llama")
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    observed, updated = zoo.examples()
    dec = lddyn.decompose(model, observed, lddyn.SFT(updated, reduction="sum"), lr=1e-3)
    truth, scale = zoo.oracle_gram(model, observed, updated)
    assert zoo.normalised_error(dec[0].influence / 1e-3, truth, scale) <= BFLOAT16


# --------------------------------------------------------------------------- orders

OPTIMIZERS = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "dampening": ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "decay": ("SGD", {"weight_decay": 0.1}),
    "clip": ("SGD", {}),
    "adamw": ("AdamW", {"weight_decay": 0.1}),
    "adamw-clip": ("AdamW", {}),
    "adam": ("Adam", {"weight_decay": 0.01}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "rmsprop": ("RMSprop", {"eps": 1e-2}),
    "rmsprop-momentum": ("RMSprop", {"momentum": 0.9, "centered": True, "eps": 1e-2}),
}
# Length of the largest of the real steps ‖Δθ‖ and the ratio between them: where the error is in
# its leading order and above rounding.
STEPS = {"start": (5e-3, 0.5), "midpoint": (1e-2, 0.5), "simpson": (1.5e-2, 0.75)}
OTHERS = [
    lddyn.Example(prompt_ids=[i, 9], response_ids=[(7 * i + 11 * j) % 80 + 3 for j in range(12)])
    for i in (5, 61)
]
BANDS = {"start": (2.0, 0.05), "midpoint": (3.0, 0.1), "simpson": (5.0, 0.2)}


def small(name="llama", seed=1, **changes):
    """One block in float64: large enough to be nonlinear, small enough for many steps."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return zoo.build(name, seed, **{**sizes, **changes}).double()


def trained(model, kind, name, options, clip=None, steps=3):
    """A torch optimizer at the state that real steps leave, and the update it is about to make."""
    observed, updated = zoo.examples()
    reference = (-30.0, -30.0)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)
    for _ in range(steps):
        plus, minus = (zoo.token_log_probs(model, e).sum() for e in (updated, observed))
        loss = -plus if kind == "sft" else -logsigmoid(0.1 * (plus - minus))
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    optimizer.zero_grad()
    update = lddyn.SFT(updated)
    if kind == "dpo":
        update = lddyn.DPO(updated, observed, beta=0.1, reference=reference)
    return optimizer, update


def orders(model, optimizer, update, clip=None, rules=STEPS):
    """One decomposition, and its verification by every rule."""
    observed = [*zoo.examples(), *OTHERS]  # many tokens: no accidental cancellation in the norm
    with lddyn.true_float64():
        dec = lddyn.decompose(model, observed, update, optimizer=optimizer, max_grad_norm=clip)
        setup = dec._session.setup
        direction = UpdateState.at(setup, setup.anatomy, optimizer).step.direction()
        length = sum(float(d.square().sum()) for d in direction.values()) ** 0.5
        found = {}
        for rule in rules:
            dec._session.setup = dataclasses.replace(setup, rule=rule)
            longest, ratio = STEPS[rule]
            first = dec.lr * longest / length
            found[rule] = dec.verify(lrs=[first * ratio**k for k in range(4)])
    return dec, found


# A loss enters the step through its weights alone: every optimizer with two sequences of opposite
# weights, and one without and one with a state for the loss of a single sequence.
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "dpo") for name in OPTIMIZERS), ("sgd", "sft"), ("adamw", "sft")]
)
def test_order_of_the_error(name, kind):
    model = small()
    clip = 0.5 if "clip" in name else None
    optimizer, update = trained(model, kind, *OPTIMIZERS[name], clip)
    # Simpson's rule has the midpoint's points and one more: three optimizers are enough for it.
    rules = [*STEPS] if name in ("sgd", "adamw", "rmsprop-momentum") else ["start", "midpoint"]
    dec, found = orders(model, optimizer, update, clip, rules)
    for rule, verification in found.items():
        expected, band = BANDS[rule]
        assert verification.expected == expected
        assert verification.slope == pytest.approx(expected, abs=band), verification
        assert verification.errors[-1] > 1e-14
    assert (dec.settings["clip_factor"] < 0.9) == (clip is not None)
    stateful = name in ("momentum", "dampening", "nesterov", "rmsprop-momentum", "amsgrad")
    assert bool(dec[0].history.any()) == (stateful or "adam" in name)
    assert bool(dec[0].weight_decay.any()) == (name in ("decay", "adamw", "adamw-clip", "adam"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_order_of_the_error_on_other_architectures(name):
    changes = {"activation_function": "gelu"} if name == "opt" else {}
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    model = zoo.build(name, **changes, **{layers: 1}).double()
    optimizer, update = trained(model, "dpo", "SGD", {"momentum": 0.9}, steps=2)
    for rule, verification in orders(model, optimizer, update, rules=["start", "midpoint"])[
        1
    ].items():
        expected, band = BANDS[rule]
        assert verification.slope == pytest.approx(expected, abs=band)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("padding", [2, -87])
def test_padding_token_in_the_sequence(tied, padding):
    """nn.Embedding(padding_idx) does not train the padding row as input; the head row it does."""
    model = small(tie_word_embeddings=tied)
    embedding = model.get_input_embeddings()
    embedding.padding_idx = padding
    observed = lddyn.Example(prompt_ids=[5, 2, 9], response_ids=[7, 2, 8, 2])
    updated = lddyn.Example(prompt_ids=[5, 2, 2], response_ids=[2, 7, 2])
    for optimizer in ("sgd", "adamw"):
        with lddyn.true_float64():
            dec = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-5, optimizer=optimizer)
            verification = dec.verify(lrs=[1e-4 * 2.0**-k for k in range(5)])
            total = sum(dec[0].token_effects(i) for i in range(3))
        assert verification.slope == pytest.approx(2.0, abs=0.05), optimizer
        assert dec[0].agreement < 1e-10
        if optimizer == "sgd":
            assert torch.allclose(total, dec[0].delta_log_probs(), rtol=1e-9, atol=1e-14)


def test_predicted_change_is_the_users_own_step():
    """Not verify(), but a plain training step written here."""
    model = zoo.build("qwen3").eval()
    observed, updated = zoo.examples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6, weight_decay=0.1)
    for _ in range(3):
        (-zoo.token_log_probs(model, updated).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    dec = lddyn.decompose(
        model, observed, lddyn.SFT(updated), optimizer=optimizer, rule="midpoint", max_grad_norm=1.0
    )
    before = zoo.token_log_probs(zoo.double(model), observed)
    (-zoo.token_log_probs(model, updated).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    moved = (zoo.token_log_probs(zoo.double(model), observed) - before).detach()
    assert float((dec[0].delta_logp - moved).abs().max()) <= 2e-3 * float(moved.abs().max())


def test_error_estimate_is_the_error():
    model = small()
    observed, updated = zoo.examples()
    with lddyn.true_float64():
        dec = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-4)
        verification = dec.verify(lrs=[1e-4])
    error = (verification.predicted - verification.measured)[0]
    assert torch.allclose(dec[0].error_estimate, error, rtol=0.05, atol=1e-9)
    assert verification.relative_error == pytest.approx(
        float(error.norm() / verification.measured.norm())
    )


# --------------------------------------------------------------------------- sum rules


def close(one, other, tolerance=2e-6):
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((n, "start") for n in ("sgd", "momentum", "decay", "adamw", "rmsprop")),
        ("clip", "midpoint"),
        ("adam", "midpoint"),
        ("adamw", "simpson"),
    ],
)
def test_sum_rules(name, rule):
    model = small()
    clip = 0.5 if name == "clip" else None
    optimizer, update = trained(model, "dpo", *OPTIMIZERS[name], clip)
    observed = [zoo.examples()[0]]
    with lddyn.true_float64():
        dec = lddyn.decompose(
            model, observed, update, optimizer=optimizer, rule=rule, max_grad_norm=clip
        )
        for o, example in zip(dec, observed, strict=True):
            total = o.influence.sum(1) + o.history + o.weight_decay
            assert close(o.delta_logp, total, 1e-12)
            parts = o.by_sequence()
            assert close(sum(parts.values()), o.delta_logp, 1e-12)
            assert sum(o.by_parameter().values()) == pytest.approx(
                float(o.delta_logp.sum()), rel=1e-9
            )
            blocks = o.by_parameter("block")
            assert set(blocks) == {"embedding", "block 0", "head and final norm"}
            assert sum(blocks.values()) == pytest.approx(float(o.delta_logp.sum()), rel=1e-9)
            shift = o.delta_log_probs()
            targets = torch.tensor(example.targets)[:, None]
            assert close(shift.gather(1, targets)[:, 0], o.delta_logp, 1e-9)
            effects = [o.token_effects(i) for i in range(11)]
            stacked = torch.stack([e.gather(1, targets)[:, 0] for e in effects], dim=1)
            assert close(stacked, o.influence, 1e-9)
            assert torch.equal(o.token_effects(-1), effects[-1])
            if name in ("sgd", "clip"):
                assert close(sum(effects), shift, 1e-9)
            if rule == "start":  # probability is conserved: Σ_v π_v Δ log π_v = 0
                logits = model(input_ids=torch.tensor([example.ids])).logits[0]
                probabilities = logits[list(example.positions)].softmax(-1).detach()
                for move in (shift, effects[3]):
                    leak = (probabilities * move).sum(-1).abs().max()
                    assert float(leak) <= 1e-12 * max(1.0, float(move.abs().max()))
    for bad in (11, -12):
        with pytest.raises(IndexError, match="one of 11 update tokens"):
            dec[0].token_effects(bad)
    with pytest.raises(ValueError, match="level must be 'parameter' or 'block'"):
        dec[0].by_parameter("layer")


@pytest.mark.parametrize(
    ("name", "optimizer"), [("llama", "sgd"), ("gpt2", "adamw"), ("mixtral", "adamw")]
)
def test_memory_changes_nothing(name, optimizer):
    model = zoo.build(name, tie_word_embeddings=True)
    examples = [
        lddyn.Example([5, 9, 33], [21, 9, 40]),
        lddyn.Example([5, 12], [40, 7]),
    ]
    update = lddyn.SFT(examples[::-1])
    runs = [
        lddyn.decompose(model, examples, update, lr=1e-3, optimizer=optimizer, memory=memory)
        for memory in ("2GiB", "30KB", 1)
    ]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert close(two.influence, one.influence, 5e-6)
            assert close(two.delta_log_probs(), one.delta_log_probs(), 5e-6)


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_order_of_the_update_sequences(name):
    model = zoo.build(name)
    one, other = zoo.examples()
    straight = lddyn.decompose(model, [one], lddyn.SFT([one, other]), lr=1e-3)[0].influence
    turned = lddyn.decompose(model, [one], lddyn.SFT([other, one]), lr=1e-3)[0].influence
    assert close(torch.cat([turned[:, 5:], turned[:, :5]], dim=1), straight)


def test_one_response_observed_under_two_names():
    model = zoo.build("llama")
    one, other = zoo.examples()
    update = lddyn.SFT(one, reduction="sum")
    dec = lddyn.decompose(model, {"a": one, "b": one, "c": other}, update, lr=1e-3)
    assert torch.equal(dec["a"].influence, dec["b"].influence) or close(
        dec["a"].influence, dec["b"].influence
    )
    assert [o.name for o in dec] == ["a", "b", "c"] and len(dec) == 3
    with pytest.raises(KeyError, match="no observed response 'd'"):
        dec["d"]
    twice = lddyn.decompose(model, [one, one], lddyn.SFT([one, one], reduction="sum"), lr=1e-3)
    assert len({o.name for o in twice}) == 2
    assert len(twice[0].sequences) == 2
    assert close(twice[1].influence[:, 6:], dec["a"].influence)


def test_masked_and_short_examples():
    model = zoo.build("gpt2")
    single = lddyn.Example(prompt_ids=[5], response_ids=[9])
    masked = lddyn.Example(
        prompt_ids=[5], response_ids=[9, 9, 9, 4], response_mask=[False, True, False, True]
    )
    for observed, updated in ((single, masked), (masked, single), (masked, masked)):
        truth, scale = zoo.oracle_gram(model, observed, updated)
        dec = lddyn.decompose(model, observed, lddyn.SFT(updated, reduction="sum"), lr=1e-3)
        assert dec[0].influence.shape == (len(observed), len(updated))
        assert zoo.normalised_error(dec[0].influence / 1e-3, truth, scale) <= FLOAT32
        assert dec[0].token_ids == list(observed.targets)
        assert len(dec[0].tokens) == len(observed)
        assert [t.token_id for t in dec.update_tokens] == list(updated.targets)


def test_learning_rate_of_the_optimizer_and_its_groups():
    model = small()
    observed, updated = zoo.examples()
    names = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in names.items() if "mlp" in n], "lr": 1e-4, "weight_decay": 0.5},
        {"params": [p for n, p in names.items() if "attn" in n], "lr": 3e-4},
    ]  # the embeddings, norms and head are left out
    for cls in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = cls(copy.copy([dict(g) for g in groups]), lr=1.0)
        with lddyn.true_float64():
            dec = lddyn.decompose(model, observed, lddyn.SFT(updated), optimizer=optimizer)
            assert dec.lr == 3e-4
            verification = dec.verify(lrs=[3e-4 * 2.0**-k for k in range(5)])
        assert verification.slope == pytest.approx(2.0, abs=0.05)
        shares = dec[0].by_parameter()
        for name, value in shares.items():
            if "mlp" not in name and "attn" not in name:
                assert value == 0.0
        with pytest.raises(ValueError, match="several learning rates"):
            lddyn.decompose(model, observed, lddyn.SFT(updated), optimizer=optimizer, lr=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    one = lddyn.decompose(model, observed, lddyn.SFT(updated), optimizer=optimizer, lr=1e-4)
    two = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-4)
    assert torch.allclose(one[0].influence, two[0].influence, rtol=1e-9)
    assert optimizer.param_groups[0]["lr"] == 1e-2


# --------------------------------------------------------------------------- refusals


def run(**options):
    observed, updated = zoo.examples()
    settings = {"observed": observed, "update": lddyn.SFT(updated), "lr": 1e-3, **options}
    return lddyn.decompose(settings.pop("model", None) or zoo.build("gpt2"), **settings)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": -1e-3}, ValueError, "lr must be a positive number, or 0, got -0.001"),
        ({"lr": float("nan")}, ValueError, "lr must be a positive number, or 0, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be a positive number, or 0, got inf"),
        ({"lr": None}, ValueError, "lr is needed with optimizer='sgd'"),
        ({"rule": "trapezoid"}, ValueError, "rule must be one of .*'midpoint'.* got 'trapezoid'"),
        ({"optimizer": "muon"}, ValueError, "optimizer must be one of"),
        ({"memory": "much"}, ValueError, "memory must look like '2GiB', '500MB' or 'auto'"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be positive"),
        ({"observed": []}, ValueError, "observed must hold at least one Example"),
        ({"observed": {}}, ValueError, "observed must hold at least one Example"),
    ],
)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        run(**options)


def test_optimizers_that_cannot_be():
    model = zoo.build("gpt2")
    with pytest.raises(ValueError, match="was it built on another copy of the model"):
        run(model=model, optimizer=torch.optim.SGD(zoo.build("gpt2").parameters(), lr=1e-3))
    with pytest.raises(TypeError, match=r"optimizer must be one of SGD, .* Adagrad"):
        run(model=model, optimizer=torch.optim.Adagrad(model.parameters(), lr=1e-3))


def test_a_wrong_derivative_is_caught(monkeypatch):
    """Factors that are off by one percent disagree with the push of the whole step."""
    module = sys.modules["lddyn.engine.pullback"]
    original = module.pull

    def pull(replay, cotangents):
        state, factors = original(replay, cotangents)
        factors.taps = [(tap, 1.01 * delta) for tap, delta in factors.taps]
        return state, factors

    monkeypatch.setattr(module, "pull", pull)
    with pytest.raises(DisagreementError):
        run()


def test_bad_learning_rates_of_verify():
    dec = run()
    for lrs in ([], [0.0], [-1e-3], [float("nan")], [1e-3, float("inf")]):
        with pytest.raises(ValueError, match="lrs must be positive numbers"):
            dec.verify(lrs=lrs)


@pytest.mark.parametrize("change", ["step", "copy_", "load_state_dict", "data"])
def test_questions_after_the_model_moved(change):
    model = zoo.build("gpt2")
    dec = run(model=model)
    weight = model.transformer.h[0].mlp.c_fc.weight
    if change == "step":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    elif change == "copy_":
        with torch.no_grad():
            weight.mul_(1.5)
    elif change == "load_state_dict":
        model.load_state_dict(zoo.build("gpt2", seed=3).state_dict())
    else:
        weight.data = weight.data * 1.5
    for ask in (lambda: dec.verify(lrs=[1e-4]), lambda: dec[0].token_effects(0)):
        with pytest.raises(RuntimeError, match="weights have changed since decompose"):
            ask()


# --------------------------------------------------------------------------- saving


def test_save_and_load(tmp_path):
    dec = run(update=lddyn.DPO(*zoo.examples()), rule="midpoint", optimizer="adamw")
    path = tmp_path / "deep" / "step.v1"
    dec.save(path)
    first = {p.name for p in path.parent.iterdir()}
    assert len(first) == 2 and "step.v1.json" in first
    run().save(path)  # a save over another leaves nothing of it behind
    assert len(list(path.parent.iterdir())) == 2
    dec.save(path)
    assert {p.name for p in path.parent.iterdir()} == first
    back = Decomposition.load(path)
    assert back.lr == dec.lr and back.rule == dec.rule and back.loss == dec.loss
    assert back.update_tokens == dec.update_tokens
    assert json.dumps(back.summary()) == json.dumps(dec.summary())
    assert str(back) == str(dec)
    for one, two in zip(dec, back, strict=True):
        for key in ("influence", "history", "weight_decay", "error_estimate", "logp"):
            assert torch.equal(getattr(one, key), getattr(two, key))
        assert torch.equal(one.delta_log_probs(), two.delta_log_probs())
        assert one.by_parameter() == two.by_parameter()
        assert one.sequences == two.sequences and one.tokens == two.tokens
    with pytest.raises(RuntimeError, match="read from disk"):
        back.verify()
    with pytest.raises(RuntimeError, match=r"token_effects\(\) needs the model.*read from disk"):
        back[0].token_effects(0)


def test_damaged_files(tmp_path):
    dec = run()
    path = tmp_path / "step"
    dec.save(path)
    meta = tmp_path / "step.json"
    (tensors,) = tmp_path.glob("step.*.safetensors")
    whole, text = tensors.read_bytes(), meta.read_text()
    cases = {
        "empty": (b"", text),
        "cut": (whole[: len(whole) // 2], text),
        "one bit": (whole[:-1] + bytes([whole[-1] ^ 1]), text),
        "no json": (whole, ""),
        "cut json": (whole, text[: len(text) // 2]),
        "list": (whole, "[]"),
        "kind": (whole, text.replace('"kind": "lddyn.Decomposition"', '"kind": "lddyn.Sum"')),
        "keys": (whole, text.replace('"observed"', '"seen"')),
        "twice": (whole, text.replace('"lr":', '"lr": 1.0, "lr":', 1)),
    }
    for name, (one, two) in cases.items():
        tensors.write_bytes(one)
        meta.write_text(two)
        with pytest.raises(ValueError, match=r"cannot be read as lddyn\.Decomposition"):
            Decomposition.load(path)
        assert name
    meta.write_text(sealed({**unsealed(text, ""), "format": 9}))
    tensors.write_bytes(whole)
    with pytest.raises(ValueError, match=r"its format is 9, and this version .* reads format 1"):
        Decomposition.load(path)
    tensors.unlink()
    with pytest.raises(ValueError, match=r"cannot be read as lddyn\.Decomposition"):
        Decomposition.load(path)
    tensors.write_bytes(whole)
    meta.write_text(text)
    assert torch.equal(Decomposition.load(path)[0].influence, dec[0].influence)


def test_summary_is_json_and_print_is_readable():
    dec = run(update=lddyn.DPO(*zoo.examples()))
    summary = json.loads(json.dumps(dec.summary()))
    assert summary["objective"] == "dpo" and summary["optimizer"] == "SGD"
    (one,) = summary["observed"]
    assert one["delta_logp"] == pytest.approx(float(dec[0].delta_logp.sum()))
    assert sum(one["by_sequence"].values()) == pytest.approx(one["delta_logp"], rel=1e-4)
    ranked = [abs(s["nats"]) for s in one["strongest"]]
    assert ranked == sorted(ranked, reverse=True) and len(ranked) == 8
    text = str(dec)
    assert "y+" in text and "nats" in text and "observed" in text
    assert "slope" in str(dec.verify(lrs=[1e-6, 5e-7]))
    assert math.isnan(dec.verify(lrs=[1e-6]).slope)


def test_shifted_copy_shares_what_is_frozen():
    model = zoo.lora("llama")
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    moved = shifted_copy(model, direction, 0.5)
    for (name, old), (_, new) in zip(
        model.named_parameters(), moved.named_parameters(), strict=True
    ):
        if old.requires_grad:
            assert torch.allclose(new, old + 0.5) and new is not old, name
        else:
            assert new is old, name


# --------------------------------------------------------------------------- memory


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter"
)
def test_memory_is_obeyed():
    """Peak memory above the model, the step's vectors included, stays within the budget."""
    tests = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", "import grown; grown.main()"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(tests / "steps")])},
        capture_output=True,
        text=True,
        check=True,
    )
    sizes = json.loads(found.stdout)
    assert sizes["vectors"] > 6 and sizes["4GiB"] > 2 * 48, sizes
    assert sizes["48MiB"] < 1.25 * 48 + 16, sizes


@pytest.mark.parametrize(
    ("name", "rule", "tied"),
    [("llama", "start", False), ("llama", "simpson", True), ("mixtral", "midpoint", False)],
)
def test_a_copy_of_one_block_at_a_time_changes_nothing(name, rule, tied, monkeypatch):
    """Where memory is short, weights on the way of the step exist for one block at a time."""
    made = []
    original = setup.moved_model
    monkeypatch.setattr(setup, "moved_model", lambda *a: made.append(original(*a)) or made[-1])
    monkeypatch.setattr(Budget, "holds", lambda self, vectors: not self.strict)
    monkeypatch.setattr(StepBudget, "group", lambda self: 4096 if self.budget.strict else None)
    monkeypatch.setattr(StepBudget, "recomputes", lambda self, traces: self.budget.strict)
    model = zoo.build(name, tie_word_embeddings=tied)
    observed, updated = zoo.examples()
    update = lddyn.DPO(observed, updated, beta=0.1)
    wide, narrow = (
        lddyn.decompose(model, [observed, updated], update, lr=1e-2, rule=rule, memory=memory)
        for memory in ("auto", "4GiB")
    )
    assert len(made) == len({0.5, *(at for at, _ in RULES[rule].points if at)})
    for one, other in zip(wide, narrow, strict=True):
        assert close(other.error_estimate, one.error_estimate, 1e-3)
        assert close(other.influence, one.influence, 5e-6)
        if not tied:  # the two uses of a tied weight are summed in another order
            assert torch.equal(other.error_estimate, one.error_estimate)
            assert torch.equal(other.delta_log_probs(), one.delta_log_probs())
    check, other = (dec.verify([1e-2, 5e-3], dtype=None) for dec in (wide, narrow))
    assert torch.allclose(check.measured, other.measured, rtol=1e-9)
    assert narrow.verify([1e-2]).measured.dtype == torch.float64
    assert torch.allclose(check.predicted, other.predicted, rtol=1e-4, atol=1e-6)


def test_memory_that_holds_no_step_is_refused_before_the_work(monkeypatch):
    model = zoo.build("llama")
    before = [p.clone() for p in model.parameters()]
    observed, updated = zoo.examples()
    monkeypatch.setattr("lddyn.memory.FLOOR", 0)
    size = sum(p.nbytes for p in model.parameters())
    with pytest.raises(lddyn.MemoryBudgetError, match=r"(?s)Adam.* needs .* \(--memory\) or more"):
        lddyn.decompose(
            model, observed, lddyn.SFT(updated), 1e-3, optimizer="adam", memory=size + size // 4
        )
    dec = lddyn.decompose(model, observed, lddyn.SFT(updated), 1e-3, memory=3 * size)
    with pytest.raises(lddyn.MemoryBudgetError, match=r"copy of the model in float64.*dtype=None"):
        dec.verify()
    assert dec.verify(dtype=None).errors
    assert all(map(torch.equal, before, model.parameters()))
    lddyn.decompose(model, observed, lddyn.SFT(updated), 1e-3, optimizer="adam")  # "auto" takes it
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.numel() < 100)  # little trains: logits need most
    long = lddyn.Example([3], [i % 80 for i in range(60)])
    with pytest.raises(
        lddyn.MemoryBudgetError, match=r"logits of 60 response tokens over \d+ needs .*shorter"
    ):
        lddyn.decompose(model, long, lddyn.SFT(long), 1e-3, memory=1 << 16)
    # Adam's gradient of 16-bit weights is float32, taken on a float32 copy: four times the weights.
    half = zoo.build("llama").to(torch.bfloat16)
    lddyn.decompose(half, observed, lddyn.SFT(updated), 1e-3, memory=size)
    with pytest.raises(lddyn.MemoryBudgetError, match=r"(?s)Adam needs .*optimizer=\"sgd\""):
        lddyn.decompose(
            half, observed, lddyn.SFT(updated), 1e-3, optimizer="adam", memory=size + size // 4
        )


@pytest.mark.parametrize("stateful", [False, True])
def test_what_a_step_holds_is_counted(stateful):
    """Δθ and P, and a copy of the optimizer's state with the history that is made of it."""
    model = zoo.build("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if stateful:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    size = sum(p.nbytes for p in model.parameters())
    steps = 4 * len(list(model.parameters())) if stateful else 0  # float32 counters
    trainable = dict(model.named_parameters())
    assert held_bytes(trainable, optimizer) == (5 if stateful else 2) * size + steps
    assert states_of(optimizer) == 2
    assert states_of(torch.optim.SGD(model.parameters(), lr=1e-3)) == 0


def test_a_moved_copy_is_freed_with_its_last_user():
    """It holds Δθ: in a circle it would stay until Python's next collection."""
    model = zoo.build("llama")
    anatomy = lddyn.Anatomy(model)
    change = {n: torch.zeros_like(p) for n, p in anatomy.trainable.items()}
    gc.collect()
    gc.disable()
    try:
        moved = lddyn.Anatomy(moved_model(anatomy, change, 0.5))
        moved.trace(zoo.examples()[0])
        kept = [weakref.ref(moved.model), weakref.ref(next(iter(change.values())))]
        del moved, change
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


def test_a_step_of_length_zero_is_zero():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dec = lddyn.decompose(model, observed, lddyn.SFT(updated), optimizer=optimizer)
    assert not dec[0].influence.any() and dec[0].agreement == 0.0
    with pytest.raises(ValueError, match="learning rate is 0"):
        lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3, optimizer=optimizer)


def test_later_changes_of_the_callers_objects_do_not_matter():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    update = lddyn.SFT(updated)
    dec = lddyn.decompose(model, observed, update, optimizer=optimizer)
    before = dec[0].token_effects(0)
    optimizer.param_groups[0]["lr"] = 1e-4
    update.examples.append(observed)
    assert torch.equal(dec[0].token_effects(0), before)
    check = dec.verify([1e-3, 5e-4])
    assert check.answer_error is not None
    assert check.answer_error < 2 * check.errors[0] + 1e-6
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(RuntimeError, match="trainable"):
        dec.verify()


def test_verify_looks_at_the_answer_itself():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    dec = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-5)
    dec[0].influence.mul_(-3)
    check = dec.verify([1e-5, 5e-6])
    assert check.answer_error > 100 * check.errors[0]


def test_equal_names_lose_nothing():
    model = zoo.build("llama")
    observed, _ = zoo.examples()
    again = [dataclasses.replace(observed, name=n) for n in ("x (2)", "x", "x")]
    dec = lddyn.decompose(model, again, lddyn.SFT(again), lr=1e-4)
    assert len(dec) == 3 and len(dec[0].sequences) == 3
    named = dataclasses.replace(observed, name="history")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    dec = lddyn.decompose(model, observed, lddyn.SFT(named), optimizer=optimizer)
    torch.testing.assert_close(sum(dec[0].by_sequence().values()), dec[0].delta_logp)


def test_adapter_off_keeps_frozen_adapters_frozen():
    model = zoo.lora("llama")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    chosen, rejected = zoo.examples()
    update = lddyn.DPO(chosen, rejected, reference="adapter-off")
    lddyn.decompose(model, chosen, update, lr=1e-3)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
