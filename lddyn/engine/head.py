"""Products with the output head, in chunks that fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lddyn import ops


def project(hidden: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """Hidden (n, d) · weightᵀ (d, V) -> (n, V) in hidden's dtype; weight is cast in parts."""
    if weight.dtype == hidden.dtype:
        return ops.product(hidden, weight.T)
    rows = max(1, budget // (weight.shape[1] * hidden.element_size()))
    return torch.cat([hidden @ w.to(hidden.dtype).T for w in weight.split(rows)], dim=1)


def back_project(rows: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """Rows (n, V) · weight (V, d) -> (n, d) in rows' dtype; weight is cast in parts."""
    if weight.dtype == rows.dtype:
        return ops.product(rows, weight)
    size = max(1, budget // (weight.shape[1] * rows.element_size()))
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], size):
        part = weight[start : start + size].to(rows.dtype)
        out += rows[:, start : start + size] @ part
    return out
