"""Products with the output head's weight W (V, d), which is cast to a wider dtype in parts.

A whole copy of W in float32 would cost V d numbers: 2.2 GiB at V = 152,064, d = 3,840.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lddyn import ops


def project(hidden: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """H Wᵀ (n, V) in the dtype of H (n, d); W is cast in parts of at most `budget` bytes."""
    if weight.dtype == hidden.dtype:
        return ops.product(hidden, weight.T)
    rows = max(1, budget // (weight.shape[1] * hidden.element_size()))
    return torch.cat([hidden @ w.to(hidden.dtype).T for w in weight.split(rows)], dim=1)


def back_project(rows: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """R W (n, d) in the dtype of R (n, V); W is cast in parts of at most `budget` bytes."""
    if weight.dtype == rows.dtype:
        return ops.product(rows, weight)
    size = max(1, budget // (weight.shape[1] * rows.element_size()))
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], size):
        part = weight[start : start + size].to(rows.dtype)
        out += rows[:, start : start + size] @ part
    return out
