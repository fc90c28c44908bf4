"""One optimizer step as a sum of a gradient part, a history and a decay.

    Δθ = −rate · P ∘ (s g)  +  history  +  decay

g is the gradient, s the clip factor, P a diagonal frozen at its value in this very step (Adam's
and RMSprop's second moment *after* it has seen g), so the identity is exact and linear in g: token
l owns the part of g that it made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Direction = dict[str, Tensor]

_NOT_OURS = (
    "the optimizer holds none of the model's trainable parameters: was it built on another copy of "
    "the model?"
)
SUPPORTED = ("SGD", "Adam", "AdamW", "RMSprop")


@dataclass
class Step:
    """The parts of Δθ; each Direction maps parameter names to tensors of their shapes."""

    gradient: Direction
    clip: float
    rate: float
    precondition: Direction | None  # None: the identity
    history: Direction | None  # None: zero
    decay: Direction | None

    def gradient_part(self, gradient: Direction | None = None) -> Direction:
        """−rate · P ∘ (s g) for the step's own gradient or a part of it."""
        gradient = self.gradient if gradient is None else gradient
        scale = -self.rate * self.clip
        if self.precondition is None:
            return {n: scale * g for n, g in gradient.items()}
        return {n: scale * self.precondition[n] * g for n, g in gradient.items()}

    def direction(self) -> Direction:
        """The whole Δθ."""
        total = self.gradient_part()
        for extra in (self.history, self.decay):
            for name, value in (extra or {}).items():
                total[name] = total[name] + value
        return total


def make_optimizer(kind: str, parameters: Any, lr: float) -> torch.optim.Optimizer:
    """A fresh optimizer of torch with its defaults: "sgd", "adam", "adamw" or "rmsprop"."""
    classes = {name.lower(): getattr(torch.optim, name) for name in SUPPORTED}
    if kind.lower() not in classes:
        raise ValueError(
            f"optimizer must be one of {sorted(classes)} or a torch.optim object, got {kind!r}"
        )
    optimizer: torch.optim.Optimizer = classes[kind.lower()](parameters, lr=lr)
    return optimizer


def copy_optimizer(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """The same optimizer, hyper-parameters and state, over another copy of the parameters.

    State tensors of a parameter's shape take the dtype of the new parameter.
    """
    names = {id(p): n for n, p in old.items()}
    groups = []
    for group in optimizer.param_groups:
        params = [new[names[id(p)]] for p in group["params"] if id(p) in names]
        if params:
            groups.append({**group, "params": params, "lr": float(group["lr"]) * lr_factor})
    if not groups:
        raise ValueError(_NOT_OURS)
    if not groups:
        raise ValueError(
            "the optimizer holds none of the model's trainable parameters: was it built on "
            "another copy of the model?"
        )
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


def clip_factor(gradient: Direction, max_norm: float | None) -> float:
    """S = min(1, max_norm / (‖g‖ + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    if max_norm is None:
        return 1.0
    if not max_norm > 0:
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
        parameters: Trainable parameters by name; those the optimizer does not hold stay put.
        gradient: The gradient by name, before clipping.
        max_grad_norm: Clip the global norm first, as trainers do.

    Raises:
        TypeError: For another optimizer: its step is not linear in the gradient, or not known here.
        ValueError: If the optimizer holds none of the parameters.
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
    clip = clip_factor(gradient, max_grad_norm)
    terms = {
        name: _TERMS[kind](p.detach(), clip * gradient[name], group, state)
        for name, p, group, state in held
    }
    rates = {float(t[0]) for t in terms.values() if not isinstance(t[0], Tensor)}
    uniform = all(not isinstance(t[0], Tensor) for t in terms.values()) and len(rates) == 1
    if uniform and len(terms) == len(parameters):
        rate, precondition = rates.pop(), None
    else:
        rate = 1.0
        precondition = {
            n: torch.as_tensor(
                terms[n][0] if n in terms else 0.0, dtype=p.dtype, device=p.device
            ).expand_as(p)
            for n, p in parameters.items()
        }
    history = {n: t[1] for n, t in terms.items() if t[1] is not None}
    decay = {n: t[2] for n, t in terms.items() if t[2] is not None}
    return Step(gradient, clip, rate, precondition, history or None, decay or None)


def optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    """Which of torch's own optimizers this is; a subclass must not step in a way of its own."""
    own = {getattr(torch.optim, name): name for name in SUPPORTED}
    for ancestor in type(optimizer).__mro__:
        if ancestor in own:
            return own[ancestor]
        if "step" in vars(ancestor):
            break
    raise TypeError(
        f"optimizer must be one of {', '.join(SUPPORTED)} of torch.optim, got "
        f"{type(optimizer).__name__}, whose step is its own ({type(optimizer).__module__})"
    )


# Each returns (factor on −g: a number or a tensor, history, decay), the last two as parts of Δθ.
_Terms = tuple[Any, Tensor | None, Tensor | None]


def _sgd(p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> _Terms:
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
    return sign * lr * own, history, -lr * own * decay * p if decay else None


def _adam(
    p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any], decoupled: bool = False
) -> _Terms:
    lr, decay = float(group["lr"]), group["weight_decay"]
    beta1, beta2 = (float(b) for b in group["betas"])
    sign = -1.0 if group.get("maximize") else 1.0
    decoupled = decoupled or bool(group.get("decoupled_weight_decay"))
    seen = sign * g if decoupled or not decay else sign * g + decay * p
    count = float(state.get("step", 0)) + 1
    first = state.get("exp_avg")
    second = (1 - beta2) * seen.square()
    if "exp_avg_sq" in state:
        second = second + beta2 * state["exp_avg_sq"]
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    spread = second.sqrt() / (1 - beta2**count) ** 0.5 + group["eps"]
    scale = lr / ((1 - beta1**count) * spread)
    history = None if first is None else -scale * beta1 * first
    if not decay:
        decayed = None
    elif decoupled:
        decayed = -lr * decay * p
    else:
        decayed = -scale * (1 - beta1) * decay * p
    return sign * (1 - beta1) * scale, history, decayed


def _adamw(p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> _Terms:
    return _adam(p, g, group, state, decoupled=True)


def _rmsprop(p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> _Terms:
    lr, decay, alpha = float(group["lr"]), group["weight_decay"], float(group["alpha"])
    sign = -1.0 if group.get("maximize") else 1.0
    seen = sign * g + decay * p if decay else sign * g
    square = (1 - alpha) * seen.square()
    if "square_avg" in state:
        square = square + alpha * state["square_avg"]
    if group["centered"]:
        mean = (1 - alpha) * seen
        if "grad_avg" in state:
            mean = mean + alpha * state["grad_avg"]
        square = square - mean.square()
    scale = lr / (square.sqrt() + group["eps"])
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    history = None if buffer is None else -lr * group["momentum"] * buffer
    return sign * scale, history, -scale * decay * p if decay else None


_TERMS = {"SGD": _sgd, "Adam": _adam, "AdamW": _adamw, "RMSprop": _rmsprop}
