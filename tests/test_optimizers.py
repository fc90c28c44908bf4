"""The step as parts: their sum is the real step of torch's optimizers, to the last bits."""

import copy

import pytest
import torch

from lddyn.optimizers import clip_factor, copy_optimizer, make_optimizer, optimizer_step

torch.set_num_threads(1)

SHAPES = {"a": (5, 4), "b": (4,), "c": (3, 2, 2), "d": (1,)}

OPTIMIZERS = {
    "sgd": ("SGD", {}),
    "sgd-maximize": ("SGD", {"maximize": True}),
    "sgd-decay": ("SGD", {"weight_decay": 0.1}),
    "sgd-decay-maximize": ("SGD", {"weight_decay": 0.1, "maximize": True}),
    "sgd-momentum": ("SGD", {"momentum": 0.9}),
    "sgd-momentum-decay": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd-dampening": ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "sgd-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "sgd-nesterov-decay": ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "sgd-all-maximize": ("SGD", {"momentum": 0.8, "weight_decay": 0.1, "maximize": True}),
    "adam": ("Adam", {}),
    "adam-betas": ("Adam", {"betas": (0.7, 0.9), "eps": 1e-3}),
    "adam-coupled": ("Adam", {"weight_decay": 0.1}),
    "adam-coupled-maximize": ("Adam", {"weight_decay": 0.1, "maximize": True}),
    "adam-amsgrad": ("Adam", {"amsgrad": True}),
    "adam-amsgrad-coupled": ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    "adam-decoupled": ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-no-first-moment": ("Adam", {"betas": (0.0, 0.9)}),
    "adamw": ("AdamW", {}),
    "adamw-decay": ("AdamW", {"weight_decay": 0.3}),
    "adamw-no-decay": ("AdamW", {"weight_decay": 0.0}),
    "adamw-amsgrad": ("AdamW", {"amsgrad": True}),
    "adamw-maximize": ("AdamW", {"maximize": True, "weight_decay": 0.1}),
    "adamw-foreach": ("AdamW", {"foreach": True}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop-centered": ("RMSprop", {"centered": True}),
    "rmsprop-momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop-all": ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "rmsprop-maximize": ("RMSprop", {"maximize": True, "weight_decay": 0.1, "alpha": 0.9}),
}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64))
        for n, s in SHAPES.items()
    }


def gradients(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def real_step(optimizer, params, gradient, max_norm=None):
    """What optimizer.step() does to the parameters."""
    before = {n: p.detach().clone() for n, p in params.items()}
    for n, p in params.items():
        p.grad = gradient[n].clone()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(params.values()), max_norm)
    optimizer.step()
    return {n: p.detach() - before[n] for n, p in params.items()}


def assert_step(step, moved, tolerance=1e-12):
    predicted = step.direction()
    for n, value in moved.items():
        size = max(float(value.abs().max()), 1e-3)
        assert float((predicted[n] - value).abs().max()) <= tolerance * size, n


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_step_is_the_real_step(kind, clip):
    name, options = OPTIMIZERS[kind]
    params = parameters()
    optimizer = getattr(torch.optim, name)(params.values(), lr=0.05, **options)
    for k in range(5):  # the first step has no state, the others have a real one
        state = copy.deepcopy(optimizer.state_dict())
        step = optimizer_step(optimizer, params, gradients(k), clip)
        now = optimizer.state_dict()
        assert state["param_groups"] == now["param_groups"]
        for key, values in state["state"].items():  # the optimizer was not changed
            for entry, value in values.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, now["state"][key][entry])
        assert_step(step, real_step(optimizer, params, gradients(k), clip))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradient_part_is_linear_in_the_gradient(kind):
    """The parts owned by two halves of the gradient add up to the gradient's part."""
    name, options = OPTIMIZERS[kind]
    params = parameters()
    optimizer = getattr(torch.optim, name)(params.values(), lr=0.05, **options)
    for k in range(3):
        real_step(optimizer, params, gradients(k))
    whole = gradients(7)
    half = gradients(8)
    step = optimizer_step(optimizer, params, whole)
    one = step.gradient_part(half)
    other = step.gradient_part({n: whole[n] - half[n] for n in whole})
    for n, value in step.gradient_part().items():
        assert torch.allclose(one[n] + other[n], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_groups_with_their_own_settings_and_a_parameter_left_out(name):
    params = parameters()
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(torch.optim, name)(
        [
            {"params": [params["a"]], "lr": 0.1, "weight_decay": 0.2},
            {"params": [params["b"], params["d"]], "lr": 0.01, "weight_decay": 0.0},
        ],
        lr=1.0,
        **options,
    )
    for k in range(4):
        step = optimizer_step(optimizer, params, gradients(k))
        moved = real_step(optimizer, params, gradients(k))
        assert not moved["c"].any()
        assert_step(step, moved)
        assert not step.direction()["c"].any()


def test_plain_sgd_needs_no_preconditioner():
    params = parameters()
    step = optimizer_step(torch.optim.SGD(params.values(), lr=0.05), params, gradients(0))
    assert step.precondition is None and step.history is None and step.decay is None
    assert step.rate == 0.05 and step.clip == 1.0


def test_history_is_what_an_empty_gradient_would_do():
    params = parameters()
    optimizer = torch.optim.SGD(params.values(), lr=0.05, momentum=0.9)
    real_step(optimizer, params, gradients(0))
    step = optimizer_step(optimizer, params, gradients(1))
    zero = {n: torch.zeros_like(g) for n, g in gradients(1).items()}
    moved = real_step(optimizer, params, zero)
    for n, value in moved.items():
        assert torch.allclose(step.history[n], value, rtol=1e-12)


def test_clip_factor_is_that_of_torch():
    for limit in (0.1, 1.0, 100.0):
        params = parameters()
        for n, p in params.items():
            p.grad = gradients(0)[n]
        torch.nn.utils.clip_grad_norm_(list(params.values()), limit)
        scale = float((params["a"].grad / gradients(0)["a"]).mean())
        assert clip_factor(gradients(0), limit) == pytest.approx(scale, rel=1e-12)
    assert clip_factor(gradients(0), None) == 1.0
    assert clip_factor(gradients(0), 0.0) == 1.0  # as trainers have it: 0 does not clip
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm must be positive"):
            clip_factor(gradients(0), bad)


@pytest.mark.parametrize("kind", ["sgd-momentum", "adamw", "adam-amsgrad", "rmsprop-all"])
def test_copy_optimizer_takes_the_same_step(kind):
    name, options = OPTIMIZERS[kind]
    params = parameters()
    optimizer = getattr(torch.optim, name)(params.values(), lr=0.05, **options)
    for k in range(3):
        real_step(optimizer, params, gradients(k))
    twins = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    twin = copy_optimizer(optimizer, params, twins)
    halved = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    half = copy_optimizer(optimizer, params, halved, 0.5)
    moved = real_step(optimizer, params, gradients(9))
    moved_twin = real_step(twin, twins, gradients(9))
    moved_half = real_step(half, halved, gradients(9))
    for n, value in moved.items():
        assert torch.equal(value, moved_twin[n])
        assert torch.allclose(0.5 * value, moved_half[n], rtol=1e-9, atol=1e-14)


def test_a_subclass_is_accepted_and_other_optimizers_are_refused():
    class Renamed(torch.optim.AdamW):
        pass

    params = parameters()
    own = Renamed(params.values(), lr=0.1)
    assert_step(optimizer_step(own, params, gradients(0)), real_step(own, params, gradients(0)))
    for name in ("Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"):
        optimizer = getattr(torch.optim, name)(params.values(), lr=0.1)
        with pytest.raises(TypeError, match=f"optimizer must be one of SGD.*{name}"):
            optimizer_step(optimizer, params, gradients(0))


def test_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(parameters(1).values(), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the model's trainable parameters"):
        optimizer_step(optimizer, parameters(0), gradients(0))


def test_make_optimizer():
    params = parameters()
    for kind, cls in (("sgd", "SGD"), ("AdamW", "AdamW"), ("rmsprop", "RMSprop")):
        assert type(make_optimizer(kind, params.values(), 0.1)).__name__ == cls
    with pytest.raises(ValueError, match=r"optimizer must be one of .*got 'lion'"):
        make_optimizer("lion", params.values(), 0.1)


def test_float32_step():
    params = {n: torch.nn.Parameter(p.detach().float()) for n, p in parameters().items()}
    optimizer = torch.optim.AdamW(params.values(), lr=0.05)
    for k in range(3):
        g = {n: v.float() for n, v in gradients(k).items()}
        step = optimizer_step(optimizer, params, g)
        assert_step(step, real_step(optimizer, params, g), 2e-5)


def test_tensor_learning_rate():
    params = parameters()
    optimizer = torch.optim.AdamW(params.values(), lr=torch.tensor(0.05, dtype=torch.float64))
    for k in range(2):
        step = optimizer_step(optimizer, params, gradients(k))
        assert_step(step, real_step(optimizer, params, gradients(k)))


def test_a_step_of_its_own_is_refused():
    class AdamW(torch.optim.Optimizer):
        def step(self, closure=None):
            """Does something else."""

    class Sneaky(torch.optim.SGD):
        def step(self, closure=None):
            """Does something else, too."""

    parameter = torch.nn.Parameter(torch.ones(2))
    for kind in (AdamW, Sneaky):
        optimizer = (
            Sneaky([parameter], lr=0.1) if kind is Sneaky else AdamW([parameter], {"lr": 0.1})
        )
        with pytest.raises(TypeError, match="its own"):
            optimizer_step(optimizer, {"p": parameter}, {"p": torch.ones(2)})
