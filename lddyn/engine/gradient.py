"""Gradients of one scalar with respect to every trainable parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.pullback import Gradient


def gradient(anatomy: Anatomy, examples: Sequence[Example], weights: Sequence[Tensor]) -> Gradient:
    """Σ_l w_l ∇θ log π(y_l) over several sequences, by one plain backward pass each.

    The model runs as a whole, without replays, taps or factors: what the factored engine says is
    checked against this. Returns name -> tensor for every trainable parameter.

    Cost: 6 N T FLOPs a sequence; one gradient the size of the trainable parameters.
    """
    total: Gradient = {}
    for example, weight in zip(examples, weights, strict=True):
        part = _backward(anatomy, anatomy.response_log_probs, example, weight)
        for name, value in part.items():
            total[name] = value if name not in total else total[name] + value
    return total


def gradient_of_logits(anatomy: Anatomy, example: Example, rows: Tensor) -> Gradient:
    """Σ_l ∇θ ⟨v_l, z_l⟩ for cotangents (L, V) on the logits, by one plain backward pass."""
    return _backward(anatomy, anatomy.response_logits, example, rows)


def gradient_of_hidden(anatomy: Anatomy, example: Example, rows: Tensor) -> Gradient:
    """Σ_l ∇θ ⟨g_l, h_l⟩ for cotangents (L, d) at the head's input, by one plain backward pass."""
    return _backward(anatomy, anatomy.response_hidden, example, rows)


def _backward(
    anatomy: Anatomy, forward: Callable[[Example], Tensor], example: Example, cotangent: Tensor
) -> Gradient:
    parameters = list(anatomy.trainable.values())
    with anatomy.analysis():
        for parameter in parameters:
            parameter.requires_grad_(True)
        value = forward(example)
        scalar = (value * cotangent.to(value.dtype)).sum()
        if not scalar.requires_grad:  # no trainable parameter is on the way
            return {n: torch.zeros_like(p) for n, p in anatomy.trainable.items()}
        parts = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if part is None else part
        for (name, parameter), part in zip(anatomy.trainable.items(), parts, strict=True)
    }
