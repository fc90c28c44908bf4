"""The gradient of a step on 16-bit weights, in float32: optimizers divide by small entries of it.

Adam divides every token's part of an entry by the size of the whole entry. Where the parts cancel,
a gradient in 16 bits is mostly rounding, or exactly 0, and the quotients become huge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.backward_check import trust
from lddyn.engine.door import copied
from lddyn.engine.gradient import Gradient, gradient
from lddyn.engine.guard import evaluating
from lddyn.engine.quantised import dequantise
from lddyn.engine.streamed import is_streamed

__all__ = ["coarse", "copy_in", "is_widened", "wide_gradient"]

_COARSE = (torch.bfloat16, torch.float16)


def coarse(parameters: Mapping[Any, Tensor]) -> torch.dtype | None:
    """The 16-bit number type of the parameters; None: none has one."""
    return next((p.dtype for p in parameters.values() if p.dtype in _COARSE), None)


def copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in another number type; quantised layers become plain ones.

    Cost: memory for all weights in that type.
    """
    copy = copied(model)
    with evaluating(copy):
        dequantise(copy)
    return copy.to(dtype)


def is_widened(anatomy: Anatomy, divided: bool) -> bool:
    """Whether a gradient is taken on a copy of the model in float32; `divided`: see below."""
    streamed = any(map(is_streamed, anatomy.model.parameters()))
    return divided and not streamed and coarse(anatomy.trainable) is not None


def wide_gradient(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor],
    *,
    divided: bool,
    most: int | None = None,
    recompute: bool = False,
) -> Gradient:
    """Σ_l w_l ∇θ log π(y_l), in float32 where that matters.

    Args:
        anatomy: The model.
        examples: The sequences.
        weights: One tensor (L,) for each.
        divided: Whether the optimizer divides by the gradient's size.
        most: As of `gradient`.
        recompute: As of `gradient`.

    Cost: that of `gradient`; if weights have 16 bits and `divided`, also memory for a copy of the
    model in float32.
    """
    if not is_widened(anatomy, divided):
        return gradient(anatomy, examples, weights, most=most, recompute=recompute)
    copy = Anatomy(copy_in(anatomy.model, torch.float32), anatomy.attention)
    trust(copy, anatomy)
    return gradient(copy, examples, weights, most=most, recompute=recompute)
