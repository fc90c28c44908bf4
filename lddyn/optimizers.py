"""One optimizer step as the sum of a gradient part, a history and a weight decay.

    Δθ = −rate · P ∘ (s g)  +  history  +  decay

g is the gradient and s the clip factor. P is a diagonal, frozen at its value in this very step
(Adam and RMSprop: from the second moment *after* it has seen g). The identity is exact, and linear
in g: the part of g that one token made is the part of the step that this token made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lddyn.errors import NonFiniteError, UnsupportedModelError
from lddyn.finite import broken_entries, is_finite

Direction = dict[str, Tensor]

_NOT_OURS = (
    "the optimizer holds none of the model's trainable parameters: was it built on another copy of "
    "the model?"
)
SUPPORTED = ("SGD", "Adam", "AdamW", "RMSprop")
# transformers' names of the same.
_NAMES = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"}
_WAY_OUT = (
    "lddyn.integrations.trl.watch(trainer, predict=1) compares the real step of any optimizer with "
    "its first order"
)


@dataclass
class Step:
    """The parts of Δθ; each Direction maps parameter names to tensors of their shapes.

    Attributes:
        gradient: g, before clipping.
        clip: s, 1 without clipping.
        rate: The learning rate, where it is one number; else 1, and P holds the rates.
        precondition: P; None: the identity.
        history: The part that the optimizer's state makes (momentum); None: zero.
        decay: The part that weight decay makes; None: zero.
    """

    gradient: Direction
    clip: float
    rate: float
    precondition: Direction | None
    history: Direction | None
    decay: Direction | None

    def gradient_part(self, gradient: Direction | None = None) -> Direction:
        """−rate · P ∘ (s g), for a part of the gradient; None: for all of it."""
        gradient = self.gradient if gradient is None else gradient
        scale = -self.rate * self.clip
        if self.precondition is None:
            return {n: scale * g for n, g in gradient.items()}
        return {n: scale * self.precondition[n] * g for n, g in gradient.items()}

    def direction(self) -> Direction:
        """The whole Δθ."""
        return self._with_rest(self.gradient_part())

    def take_direction(self) -> Direction:
        """The whole Δθ, in the memory of the gradient, which is given up."""
        scale, total = -self.rate * self.clip, self.gradient
        self.gradient = {}
        for name, value in total.items():
            if self.precondition is None:
                value.mul_(scale)
            else:
                value.mul_(scale * self.precondition[name])
        return self._with_rest(total)

    def _with_rest(self, total: Direction) -> Direction:
        """Adds history and decay to the gradient's part."""
        for extra in (self.history, self.decay):
            for name, value in (extra or {}).items():
                total[name] = total[name] + value
        return total


class Scaled(Mapping[str, Tensor]):
    """A direction times a factor; each tensor is computed when it is asked for, and not kept."""

    def __init__(self, direction: Direction, factor: float):
        self.direction, self.factor = direction, factor

    def __getitem__(self, name: str) -> Tensor:
        return self.factor * self.direction[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.direction)

    def __len__(self) -> int:
        return len(self.direction)


def make_optimizer(kind: str, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """A fresh optimizer of torch with torch's defaults.

    Args:
        kind: "sgd", "adam", "adamw" or "rmsprop".
        parameters: What it updates.
        lr: Learning rate.

    Raises:
        ValueError: If kind is another.
    """
    classes = {name.lower(): getattr(torch.optim, name) for name in SUPPORTED}
    name = _NAMES.get(kind.lower(), kind.lower())
    if name not in classes:
        raise ValueError(
            f"optimizer must be one of {sorted(classes)} or a torch.optim object, got {kind!r}; "
            f"{_WAY_OUT}"
        )
    optimizer: torch.optim.Optimizer = classes[name](parameters, lr=lr)
    return optimizer


def trainer_decays(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers' Trainer decays: neither biases nor norms."""
    from transformers import Trainer

    chooser: Callable[[object, nn.Module], list[str]] = Trainer.get_decay_parameter_names
    return set(chooser(None, model))  # it reads nothing of the trainer itself


def unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of a trainer's wrapper (accelerate's, DeepSpeed's)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def copy_optimizer(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """The same optimizer, with its hyper-parameters and state, over another copy of the parameters.

    Args:
        optimizer: Not changed.
        old: Name → parameter that it holds.
        new: Name → parameter that the copy holds. State of a parameter's shape takes its dtype.
        lr_factor: Multiplies every learning rate.

    Raises:
        ValueError: If the optimizer holds none of the old parameters.
    """
    names = {id(p): n for n, p in old.items()}
    groups = []
    for group in optimizer.param_groups:
        params = [new[names[id(p)]] for p in group["params"] if id(p) in names]
        if params:
            groups.append({**group, "params": params, "lr": float(group["lr"]) * lr_factor})
    if not groups:
        raise ValueError(_NOT_OURS)
    fresh = type(optimizer)(groups)  # type: ignore[call-arg]
    for parameter, state in optimizer.state.items():
        if id(parameter) in names:
            target = new[names[id(parameter)]]
            fresh.state[target] = {
                k: v.to(target.dtype).clone()
                if isinstance(v, Tensor) and v.shape == target.shape
                else (v.clone() if isinstance(v, Tensor) else v)
                for k, v in state.items()
            }
    return fresh


def hooked(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient after the hooks of a parameter (`register_hook`), which is what a step sees."""
    hooks: Mapping[int, Callable[[Tensor], Tensor | None]] = parameter._backward_hooks or {}
    for hook in hooks.values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


def hook_factor(name: str, parameter: Tensor) -> Tensor | None:
    """The factor by which the hooks of a parameter scale its gradient; None without hooks.

    Raises:
        UnsupportedModelError: If the hooks do more than scale every entry by a fixed number.
    """
    if not parameter._backward_hooks:
        return None
    factor = hooked(parameter, torch.ones_like(parameter)).detach().clone()
    # Hooks may change a gradient in place.
    probe = torch.linspace(-1, 1, parameter.numel(), device=parameter.device)
    probe = probe.to(parameter.dtype).view(parameter.shape)
    moved = hooked(parameter, probe.clone())
    if not torch.allclose(moved, factor * probe, rtol=1e-3, atol=1e-6):
        raise UnsupportedModelError(
            f"a gradient hook of {name} does more than scale each entry by a fixed number, so no "
            "part of a step belongs to one token: remove the hook"
        )
    return factor


def check_rate(lr: object, name: str = "lr") -> float:
    """The learning rate as a float.

    Raises:
        ValueError: If it is no finite number of at least 0.
    """
    rate = math.nan
    if isinstance(lr, int | float | Tensor) and not isinstance(lr, bool):
        try:
            rate = float(lr)
        except (OverflowError, RuntimeError):  # 10**400; several numbers
            rate = math.inf
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"{name} must be a positive number, or 0, got {lr!r:.60}")
    return rate


def clip_factor(gradient: Direction, max_norm: float | None) -> float:
    """The factor s = min(1, max_norm / (‖g‖ + 1e-6)) of torch.nn.utils.clip_grad_norm_.

    Raises:
        ValueError: If max_norm is negative.
    """
    if max_norm is None or (max_norm == 0 and not isinstance(max_norm, bool)):
        return 1.0
    if isinstance(max_norm, bool) or not max_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, got {max_norm}")
    norm: float = sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
    return min(1.0, max_norm / (norm + 1e-6))


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    gradient: Direction,
    max_grad_norm: float | None = None,
) -> Step:
    """The step that `optimizer.step()` would take on this gradient, without taking it.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop of torch, at its real state (which is not changed).
        parameters: Trainable parameters by name; those the optimizer does not hold do not move.
        gradient: The gradient by name, before clipping; it may be wider than its parameter, and
            then only the parts of the step are rounded.
        max_grad_norm: Clip the global norm first, as trainers do. None: no clipping.

    Raises:
        TypeError: For another optimizer: its step is not linear in the gradient, or is unknown.
        UnsupportedModelError: If a gradient hook of a parameter is not a fixed factor.
        NonFiniteError: If a gradient, a number of the optimizer's state or the step is NaN or
            infinite; the message names the parameter.
        ValueError: If the optimizer holds none of the parameters, or its state is on another
            device.
    """
    kind = optimizer_kind(optimizer)
    names = {id(p): n for n, p in parameters.items()}
    held = [
        (names[id(p)], p, group, optimizer.state.get(p, {}))
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names
    ]
    if not held:
        raise ValueError(_NOT_OURS)
    factors = {name: hook_factor(name, p) for name, p, *_ in held}
    seen = {n: g if (f := factors.get(n)) is None else f * g for n, g in gradient.items()}
    for name, p, group, state in held:
        _check_ingredients(name, p, seen[name], group, state)
    clip = clip_factor(seen, max_grad_norm)
    terms = {}
    for name, p, group, state in held:
        g = seen[name]
        clipped = g if clip == 1.0 else clip * g
        made = _TERMS[kind](p.detach().to(g.dtype), clipped, group, state).after(factors[name])
        del clipped
        terms[name] = made.to(p.dtype)
        _check_terms(name, p, g, terms[name], group)
    rates = {t.factor for t in terms.values() if isinstance(t.factor, float)}
    uniform = all(isinstance(t.factor, float) for t in terms.values()) and len(rates) == 1
    if uniform and len(terms) == len(parameters):
        rate, precondition = rates.pop(), None
    else:
        rate = 1.0
        precondition = {
            n: torch.as_tensor(
                terms[n].factor if n in terms else 0.0, dtype=p.dtype, device=p.device
            ).expand_as(p)
            for n, p in parameters.items()
        }
    history = {n: t.history for n, t in terms.items() if t.history is not None}
    decay = {n: t.decay for n, t in terms.items() if t.decay is not None}
    own = {n: g.to(parameters[n].dtype) for n, g in gradient.items()}
    return Step(own, clip, rate, precondition, history or None, decay or None)


# Entries of an optimizer's state that are sums of squares.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def _check_ingredients(
    name: str, parameter: Tensor, gradient: Tensor, group: _Group, state: _State
) -> None:
    """Raises a NonFiniteError for a weight, gradient or state that no step can be made of."""
    check_rate(group["lr"], "the learning rate of the optimizer")
    if not is_finite(parameter):
        raise NonFiniteError(
            f"parameter {name} has {broken_entries(parameter)}: the model is broken; go back to an "
            "earlier checkpoint"
        )
    if not is_finite(gradient):
        raise NonFiniteError(
            f"the gradient of {name} has {broken_entries(gradient)} although its weights are "
            f"finite: the backward pass overflows in {gradient.dtype}; use a wider dtype"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor | int | float):
            continue
        kept = torch.as_tensor(value)
        if kept.shape == parameter.shape and kept.device != parameter.device:
            raise ValueError(
                f"the optimizer's {key} of {name} is on {kept.device}, the parameter itself on "
                f"{parameter.device}: make the optimizer, or load its state, after the model was "
                "moved"
            )
        if not is_finite(kept):
            wrong = f"has {broken_entries(kept)}" if kept.numel() > 1 else f"is {float(kept)}"
        elif key in (*_SQUARES, "step") and kept.numel() and float(kept.min()) < 0:
            wrong = f"has the negative value {float(kept.min()):.3g}"
        else:
            continue
        raise NonFiniteError(
            f"the optimizer's {key} of {name} {wrong}: go back to an earlier checkpoint, or give "
            "an optimizer with a fresh state"
        )


def _check_terms(
    name: str, parameter: Tensor, gradient: Tensor, terms: _Terms, group: _Group
) -> None:
    """Raises a NonFiniteError if the step of a parameter is NaN, infinite, or lost to overflow."""
    factor = terms.factor if isinstance(terms.factor, Tensor) else torch.tensor(terms.factor)
    parts = [part for part in (factor, terms.history, terms.decay) if part is not None]
    if not all(map(is_finite, parts)):
        if group.get("eps") == 0 and is_finite(gradient):
            raise NonFiniteError(
                f"the step of {name} divides by 0: eps of the optimizer is 0 and some weights have "
                "no gradient; use an eps above 0"
            )
        raise NonFiniteError(
            f"the step of {name} is NaN or infinite in {parameter.dtype}: lower the learning rate "
            f"({float(group['lr']):g}), use a wider dtype, or a fresh state of the optimizer"
        )
    lost = isinstance(terms.factor, Tensor) and bool(((factor == 0) & (gradient != 0)).any())
    if lost and float(group["lr"]) > 0:
        raise NonFiniteError(
            f"the squared gradient of {name} overflows in {parameter.dtype} (gradients up to "
            f"{float(gradient.abs().max()):.3g}), so that the optimizer would not move it: scale "
            "the loss down, or use a wider dtype"
        )


def optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    """The name in `SUPPORTED` of torch's own optimizer that this is, or is derived from.

    Raises:
        TypeError: If it is another, or a derived class steps in its own way.
    """
    own = {getattr(torch.optim, name): name for name in SUPPORTED}
    for ancestor in type(optimizer).__mro__:
        if ancestor in own:
            return own[ancestor]
        if "step" in vars(ancestor):
            break
    raise TypeError(
        f"optimizer must be one of {', '.join(SUPPORTED)} of torch.optim, got "
        f"{type(optimizer).__name__}, whose step is its own ({type(optimizer).__module__}); "
        f"{_WAY_OUT}"
    )


class _Terms(NamedTuple):
    """Δθ of one parameter = −factor ∘ g + history + decay."""

    factor: float | Tensor
    history: Tensor | None
    decay: Tensor | None

    def after(self, hook: Tensor | None) -> _Terms:
        """The terms, where a hook scales g first."""
        return self if hook is None else self._replace(factor=self.factor * hook)

    def to(self, dtype: torch.dtype) -> _Terms:
        """The terms in another number type."""
        factor = self.factor.to(dtype) if isinstance(self.factor, Tensor) else self.factor
        history, decay = (x if x is None else x.to(dtype) for x in (self.history, self.decay))
        return _Terms(factor, history, decay)


_Group = Mapping[str, Any]  # a parameter group of torch: names to numbers and flags
_State = Mapping[str, Any]  # the optimizer's state of one parameter


def _sgd(p: Tensor, g: Tensor, group: _Group, state: _State) -> _Terms:
    lr, momentum, decay = float(group["lr"]), float(group["momentum"]), group["weight_decay"]
    sign = -1.0 if group.get("maximize") else 1.0
    own, history = 1.0, None
    if momentum:
        buffer = state.get("momentum_buffer")
        own = 1.0 if buffer is None else 1.0 - float(group["dampening"])
        past = momentum
        if group["nesterov"]:
            own, past = 1.0 + momentum * own, momentum * momentum
        history = None if buffer is None else -lr * past * buffer
    return _Terms(sign * lr * own, history, -lr * own * decay * p if decay else None)


def _adam(p: Tensor, g: Tensor, group: _Group, state: _State, decoupled: bool = False) -> _Terms:
    lr, decay = float(group["lr"]), group["weight_decay"]
    beta1, beta2 = (float(b) for b in group["betas"])
    sign = -1.0 if group.get("maximize") else 1.0
    decoupled = decoupled or bool(group.get("decoupled_weight_decay"))
    seen = g if sign == 1.0 else -g
    if decay and not decoupled:
        seen = seen + decay * p
    count = float(state.get("step", 0)) + 1
    first = state.get("exp_avg")
    second = seen.square().mul_(1 - beta2)
    if "exp_avg_sq" in state:
        second.add_(beta2 * state["exp_avg_sq"])
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    spread = second.sqrt_().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
    scale = lr / spread.mul_(1 - beta1**count)
    history = None if first is None else -scale * beta1 * first
    if not decay:
        decayed = None
    elif decoupled:
        decayed = -lr * decay * p
    else:
        decayed = -scale * (1 - beta1) * decay * p
    return _Terms(scale.mul_(sign * (1 - beta1)), history, decayed)


def _adamw(p: Tensor, g: Tensor, group: _Group, state: _State) -> _Terms:
    return _adam(p, g, group, state, decoupled=True)


def _rmsprop(p: Tensor, g: Tensor, group: _Group, state: _State) -> _Terms:
    lr, decay, alpha = float(group["lr"]), group["weight_decay"], float(group["alpha"])
    sign = -1.0 if group.get("maximize") else 1.0
    seen = g if sign == 1.0 else -g
    if decay:
        seen = seen + decay * p
    square = seen.square().mul_(1 - alpha)
    if "square_avg" in state:
        square.add_(alpha * state["square_avg"])
    if group["centered"]:
        mean = (1 - alpha) * seen
        if "grad_avg" in state:
            mean = mean + alpha * state["grad_avg"]
        square.sub_(mean.square())
    scale = lr / square.sqrt_().add_(group["eps"])
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    history = None if buffer is None else -lr * group["momentum"] * buffer
    return _Terms(sign * scale, history, -scale * decay * p if decay else None)


_TERMS: dict[str, Callable[[Tensor, Tensor, _Group, _State], _Terms]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adamw,
    "RMSprop": _rmsprop,
}
