"""NaN and overflow in weights, gradients, an optimizer's state and a step: said, never returned."""

import copy
import math

import pytest
import torch
import zoo

import lddyn
from lddyn.errors import NonFiniteError

NAME = "model.layers.0.mlp.up_proj.weight"
OBSERVED, UPDATED = zoo.examples()
DPO = lddyn.DPO(OBSERVED, UPDATED, reference=(0.0, 0.0))


@pytest.fixture(scope="module")
def llama():
    return zoo.build("llama", num_hidden_layers=1).eval()


def decompose(model, optimizer="sgd", lr=None, update=DPO):
    return lddyn.decompose(model, [OBSERVED], update, lr=lr, optimizer=optimizer)


def optimizer_with(model, kind, key, value, **options):
    """An optimizer after a step, one number of whose state was overwritten."""
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **options)
    before = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        for p, old in before.items():
            p.copy_(old)
            p.grad = None
        state = optimizer.state[model.get_parameter(NAME)][key]
        state.view(-1)[0] = value
    return optimizer


@pytest.mark.case("an optimizer's state with a NaN")
@pytest.mark.parametrize(
    ("kind", "key", "value", "options"),
    [
        ("SGD", "momentum_buffer", math.nan, {"momentum": 0.9}),
        ("AdamW", "exp_avg", math.inf, {}),
        ("AdamW", "exp_avg_sq", math.inf, {}),
        ("AdamW", "exp_avg_sq", -1.0, {}),
        ("AdamW", "max_exp_avg_sq", math.nan, {"amsgrad": True}),
        ("Adam", "step", -3.0, {}),
        ("RMSprop", "square_avg", math.nan, {}),
    ],
)
def test_a_broken_state_names_its_parameter(llama, kind, key, value, options):
    optimizer = optimizer_with(llama, kind, key, value, **options)
    with pytest.raises(NonFiniteError, match=rf"optimizer's {key} of {NAME} (has|is).*checkpoint"):
        decompose(llama, optimizer)


@pytest.mark.case("an optimizer's state on another device")
def test_a_state_on_another_device_names_its_parameter(llama):
    optimizer = optimizer_with(llama, "AdamW", "exp_avg", 0.0)
    state = optimizer.state[llama.get_parameter(NAME)]
    state["exp_avg"] = state["exp_avg"].to("meta")
    with pytest.raises(ValueError, match=rf"exp_avg of {NAME} is on meta, the parameter .* on cpu"):
        decompose(llama, optimizer)


@pytest.mark.case("an optimizer with eps=0, or whose squares overflow")
def test_steps_that_are_no_numbers_say_why(llama):
    without_eps = torch.optim.Adam(llama.parameters(), lr=1e-3, eps=0.0)
    with pytest.raises(NonFiniteError, match=r"embed_tokens.weight divides by 0: eps"):
        decompose(llama, without_eps)
    large = lddyn.Objective(lambda log_probs: 1e30 * log_probs[0].sum(), [OBSERVED])
    with pytest.raises(NonFiniteError, match=r"squared gradient of \S+ overflows in torch.float32"):
        decompose(llama, "adamw", 1e-3, large)
    with pytest.raises(NonFiniteError, match=r"is NaN or infinite .*lower the learning"):
        decompose(llama, "sgd", 1e300)
    with pytest.raises(NonFiniteError, match=r"after 50% of the step .*lower the learning rate"):
        decompose(llama, "sgd", 1e20)


@pytest.mark.case("a learning rate that is no number")
@pytest.mark.parametrize("lr", [True, "1e-3", math.nan, math.inf, -1, 10**400])
def test_a_learning_rate_that_is_no_number(llama, lr):
    with pytest.raises(ValueError, match=r"lr must be a positive number, or 0, got"):
        decompose(llama, lr=lr)
    optimizer = torch.optim.SGD(llama.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="learning rate of the optimizer must be"):
        decompose(llama, optimizer)


@pytest.mark.case("a weight that is NaN where no token reads it")
def test_a_weight_that_no_token_reads_is_named(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[80] = math.nan  # decay would put it into the step
    with pytest.raises(NonFiniteError, match=r"model.embed_tokens.weight has 32 NaN or infinite"):
        decompose(model, "adamw", 1e-3)


@pytest.mark.case("gradients that overflow")
def test_what_overflows_is_never_returned(llama):
    """Weights and logits are finite, products of gradients are not."""
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e19)
    kernel = lddyn.ntk(model, OBSERVED, UPDATED)
    cotangents = torch.zeros_like(kernel.updated.logits)
    cotangents[0, 0] = 1.0
    for ask in (
        lambda: decompose(model, lr=1e-3),
        kernel.gram,
        lambda: kernel.gram(method="pushed"),
        lambda: kernel @ cotangents,
        lambda: kernel.frobenius(rtol=0.5),
        lambda: lddyn.features(model, [OBSERVED], lddyn.Sketch(k=400)),
        lambda: lddyn.diagnose(model, [(OBSERVED, UPDATED)], close_ups=0),
    ):
        with pytest.raises(NonFiniteError, match="overflow"):
            ask()
    half = copy.deepcopy(llama).half()
    with torch.no_grad():
        half.lm_head.weight.mul_(2e4)
    with pytest.raises(NonFiniteError, match=r"gradient of \S+ is NaN .* in torch.float16"):
        decompose(half, lr=1e-3)


# --------------------------------------------------------------------------- 16 bits


@pytest.mark.case("AdamW on weights in bfloat16, where tokens cancel")
@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_sums_of_a_step_in_bfloat16_hold_where_their_parts_cancel(kind):
    """Parts are rounded to 16 bits; their sum was off by up to 12 times itself.

    Of two layers an entry of the gradient cancels against Adam's decay to a part in 1,000, so that
    weights ∂L/∂log π made of log-probs in 16 bits left influence 46 % off.
    """
    layers = 2 if kind == "Adam" else 1
    model = zoo.build("llama", num_hidden_layers=layers).bfloat16().eval()
    exact = copy.deepcopy(model).double()
    options = {"lr": 1e-4, "weight_decay": 0.1}
    ours = decompose(model, getattr(torch.optim, kind)(model.parameters(), **options))[0]
    with lddyn.true_float64():
        truth = decompose(exact, getattr(torch.optim, kind)(exact.parameters(), **options))[0]
    assert float((ours.delta_logp - truth.delta_logp).norm() / truth.delta_logp.norm()) < 0.05
    for one, other in (
        (ours.influence, truth.influence),
        (ours.weight_decay, truth.weight_decay),
    ):
        assert float((one - other).norm() / other.norm()) < 0.05


@pytest.mark.case("DPO on weights in bfloat16, policy and reference the same")
def test_a_reference_in_bfloat16_is_as_exact_as_the_policy():
    """Log-probs of one in float32 and of the other in 16 bits would be a margin where none is."""
    model = zoo.build("llama", num_hidden_layers=1).bfloat16().eval()
    for reference in ("self", copy.deepcopy(model)):
        update = lddyn.DPO(OBSERVED, UPDATED, reference=reference)
        step = decompose(model, "adamw", 1e-4, update)
        assert step.loss == pytest.approx(math.log(2), abs=1e-6)
        assert step.settings["margin_at_start"] == pytest.approx(0, abs=1e-5)
        assert all(abs(t.weight) == pytest.approx(0.05, abs=1e-6) for t in step.update_tokens)
