"""`product`: a dense product with a weight, by the faster BLAS that torch brings along."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lddyn.ops.dispatch import overridden


@functools.cache
def _onednn() -> bool:
    """Whether oneDNN's float32 product is there and right: it is not a public function of torch."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.arange(6.0).view(2, 3)
    try:
        return torch.equal(_by_onednn(x, x.T.contiguous()), x @ x.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight.T, None, "none", [], "")
    return out.view(*x.shape[:-1], weight.shape[1])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x (…, k) with a weight (k, n): (…, n).

    On CPU in float32 it goes to oneDNN where torch has it: MKL, torch's default, does without
    AVX-512 on AMD processors and runs at half the rate there. Everything else is `x @ weight`, and
    so is all of it under ``lddyn.backend("reference")``.

    Cost: 2 k n flops a row.

    Example:
        >>> product(torch.ones(2, 3), torch.ones(3, 4)).shape
        torch.Size([2, 4])
    """
    plain = (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() == 0
        or overridden() == "reference"
        or not _onednn()
    )
    return x @ weight if plain else _by_onednn(x, weight)
