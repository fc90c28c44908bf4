"""A step on 16-bit weights in float32: loss, weights of its tokens, and gradient.

Adam divides every token's part of an entry by the size of the whole entry. Where the parts cancel,
a gradient in 16 bits is mostly rounding, or exactly 0, and the quotients become huge. With coupled
weight decay the gradient may cancel against the decay: then weights ∂L/∂log π from log-probs in 16
bits, 1 % off, are too coarse as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.engine.anatomy import Anatomy
from lddyn.engine.backward_check import trust
from lddyn.engine.door import copied
from lddyn.engine.guard import evaluating
from lddyn.engine.quantised import dequantise
from lddyn.engine.streamed import is_streamed
from lddyn.objectives.objective import Objective
from lddyn.optimizers import optimizer_kind

__all__ = ["coarse", "copy_in", "is_widened", "prepared", "wide_anatomy"]

_COARSE = (torch.bfloat16, torch.float16)


def coarse(parameters: Mapping[Any, Tensor]) -> torch.dtype | None:
    """The 16-bit number type of the parameters; None: none has one."""
    return next((p.dtype for p in parameters.values() if p.dtype in _COARSE), None)


def copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in another number type; quantised layers become plain ones.

    Cost: memory for all weights in that type.
    """
    wide = copied(model)
    with evaluating(wide):
        dequantise(wide)
    return wide.to(dtype)


def is_widened(anatomy: Anatomy, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is made on a copy of the model in float32.

    It is where the optimizer divides by the gradient's size and weights have 16 bits; streamed
    models are not copied.
    """
    streamed = any(map(is_streamed, anatomy.model.parameters()))
    divides = optimizer_kind(optimizer) != "SGD"
    return divides and not streamed and coarse(anatomy.trainable) is not None


def _plain(model: nn.Module) -> bool:
    """Whether all weights have 16 bits: a copy in float32 is twice as large, and no more."""
    return all(p.dtype in _COARSE and not is_streamed(p) for p in model.parameters())


def wide_anatomy(anatomy: Anatomy, optimizer: torch.optim.Optimizer) -> Anatomy:
    """The model that a step's gradient is taken from: itself, or a copy of it in float32.

    Args:
        anatomy: The model.
        optimizer: What makes the step; see `is_widened`.

    Cost: nothing, or memory for all weights in float32.
    """
    if not is_widened(anatomy, optimizer):
        return anatomy
    wide = Anatomy(copy_in(anatomy.model, torch.float32), anatomy.attention)
    trust(wide, anatomy)
    return wide


def prepared(update: Objective, anatomy: Anatomy, optimizer: torch.optim.Optimizer) -> Objective:
    """`update.prepare(anatomy)`, where the log-probs of the reference are as exact as the step's.

    Cost: that of `prepare`; and memory for a copy of the policy, or of its reference model, in
    float32, where `wide_anatomy` makes one.
    """
    reference: object = getattr(update, "reference", None)
    if isinstance(reference, str) or isinstance(getattr(update, "old", None), str):
        return update.prepare(wide_anatomy(anatomy, optimizer))  # log-probs of the policy
    if not isinstance(reference, nn.Module | Anatomy):
        return update.prepare(anatomy)
    model = Anatomy.module_of(reference)
    if not (is_widened(anatomy, optimizer) and _plain(model)):
        return update.prepare(anatomy)
    given: Any = copy.copy(update)
    wide = copy_in(model, torch.float32)
    given.reference = Anatomy(wide, anatomy.attention, allow_frozen=True)
    known: Any = given.prepare(anatomy)
    known.reference = reference
    return known  # type: ignore[no-any-return]
