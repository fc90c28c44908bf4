"""NaN and infinite numbers: found without memory of a tensor's size, and said with what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lddyn.errors import NonFiniteError

__all__ = ["broken_entries", "checked", "is_finite"]


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; needs no memory of the tensor's size."""
    return not tensor.numel() or all(math.isfinite(float(x)) for x in tensor.detach().aminmax())


def broken_entries(tensor: Tensor) -> str:
    """How many entries are NaN or infinite, in words."""
    count = int((~torch.isfinite(tensor.detach())).sum())
    return f"{count:,} NaN or infinite of {tensor.numel():,} values"


def checked(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """The values as they are.

    Args:
        values: Computed from a model whose weights and logits are finite.
        what: Their name, such as "the Gram matrix".
        dtype: In which the model computes.

    Raises:
        NonFiniteError: If one of them is NaN or infinite.
    """
    if is_finite(values):
        return values
    raise NonFiniteError(
        f"{what} has {broken_entries(values)} although the model's weights and logits are finite: "
        f"gradients or their products overflow in {dtype}; use a wider dtype"
    )
