"""Gradients of a scalar with respect to every trainable parameter, by plain backward passes.

The model runs as a whole, without replays, taps or factors: the factored engine is checked against
these gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy

Gradient = dict[str, Tensor]  # parameter name -> tensor of the parameter's shape


def gradient(
    model: nn.Module | Anatomy, examples: Sequence[Example], weights: Sequence[Tensor]
) -> Gradient:
    """Σ_l w_l ∇θ log π(y_l) over the counted tokens of several sequences.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: The sequences; each takes one backward pass of its own.
        weights: One tensor (L,) for each example.

    Returns:
        The gradient of every trainable parameter, by name; zeros where none is reached.

    Cost: 6 N T FLOPs for each sequence; one gradient the size of the trainable parameters.
    """
    anatomy = Anatomy.of(model)
    total: Gradient = {}
    for example, weight in zip(examples, weights, strict=True):
        part = _pulled_back(anatomy, anatomy.response_log_probs, example, weight)
        for name, value in part.items():
            total[name] = value if name not in total else total[name] + value
    return total


def gradient_of_loss(
    model: nn.Module | Anatomy,
    examples: Sequence[Example],
    loss: Callable[[list[Tensor]], Tensor],
) -> Gradient:
    """∇θ of a loss of the log-probs [(L_0,), (L_1,), …] of several sequences, by one backward pass.

    Cost: 6 N T FLOPs for each sequence; the graphs of all forward passes at once.
    """
    anatomy = Anatomy.of(model)
    with anatomy.analysis(), anatomy.differentiating():
        log_probs = [anatomy.response_log_probs(example) for example in examples]
        return gradient_of(loss(log_probs).reshape(()), anatomy.trainable)


def gradient_of_logits(
    model: nn.Module | Anatomy, example: Example, cotangents: Tensor
) -> Gradient:
    """Σ_l ∇θ ⟨v_l, z_l⟩ for cotangents (L, V) on the logits, by one backward pass."""
    anatomy = Anatomy.of(model)
    return _pulled_back(anatomy, anatomy.response_logits, example, cotangents)


def gradient_of_hidden(
    model: nn.Module | Anatomy, example: Example, cotangents: Tensor
) -> Gradient:
    """Σ_l ∇θ ⟨g_l, h_l⟩ for cotangents (L, d) at the head's input, by one backward pass."""
    anatomy = Anatomy.of(model)
    return _pulled_back(anatomy, anatomy.response_hidden, example, cotangents)


def _pulled_back(
    anatomy: Anatomy, forward: Callable[[Example], Tensor], example: Example, cotangents: Tensor
) -> Gradient:
    with anatomy.analysis(), anatomy.differentiating():
        value = forward(example)
        return gradient_of((value * cotangents.to(value.dtype)).sum(), anatomy.trainable)


# --------------------------------------------------------------------------- of any scalar


def gradient_of(
    value: Tensor, parameters: Mapping[str, Tensor], *, retain_graph: bool = False
) -> Gradient:
    """The gradient of a scalar by parameter name; zeros where the scalar does not depend on one."""
    parts = _partial_derivatives(value, list(parameters.values()), retain_graph)
    return dict(zip(parameters, parts, strict=True))


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar with respect to all parameters, as by `flatten`, (P,)."""
    return flatten(_partial_derivatives(value, parameters))


def flatten(parts: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
    """Tensors one after the other in one vector (P,), float32 on the CPU."""
    tensors = parts.values() if isinstance(parts, Mapping) else parts
    return torch.cat([part.detach().flatten().float().cpu() for part in tensors])


def unflatten(flat: Tensor, parameters: Mapping[str, Tensor]) -> Gradient:
    """A vector (P,) in pieces with the parameters' names, shapes, dtypes and devices."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    named = zip(parameters.items(), flat.split(sizes), strict=True)
    return {name: part.view(p.shape).to(p) for (name, p), part in named}


def _partial_derivatives(
    value: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    if not value.requires_grad:  # no parameter is on the way
        return [torch.zeros_like(parameter) for parameter in parameters]
    parts = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=retain_graph)
    return [
        torch.zeros_like(parameter) if part is None else part
        for parameter, part in zip(parameters, parts, strict=True)
    ]
