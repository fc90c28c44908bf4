"""`product`: a dense product with a weight, by the faster of the BLAS libraries in torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lddyn.ops.dispatch import differentiated, overridden

# Rows of one call of oneDNN. For every new shape it compiles a kernel and keeps about 1 MiB, so
# that only a few sizes are used, whatever the lengths of the sequences. Whole blocks, or a prefix
# in steps of 16 tokens, are one call without a copy; the remaining rows go to the default BLAS.
_BLOCKS = (256, 32)
_WHOLE = 4096
_STEP = 16


@functools.cache
def _onednn() -> bool:
    """True if torch has oneDNN's float32 product, a private function, and its result is right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.arange(96, dtype=torch.float32, device="cpu").view(32, 3)
    try:
        return torch.equal(_by_onednn(x, x.T.contiguous()), x @ x.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    rows, width = x.reshape(-1, x.shape[-1]), weight.shape[1]
    block = torch.ops.mkldnn._linear_pointwise
    step = _STEP if len(rows) < _BLOCKS[0] else _BLOCKS[0]
    if len(rows) <= _WHOLE and len(rows) % step == 0:
        whole: Tensor = block(rows, weight.T, None, "none", [], "")
        return whole.view(*x.shape[:-1], width)
    out = x.new_empty(len(rows), width)
    start = 0
    for size in _BLOCKS:
        while start + size <= len(rows):
            stop = start + size
            out[start:stop] = block(rows[start:stop], weight.T, None, "none", [], "")
            start = stop
    torch.mm(rows[start:], weight, out=out[start:])
    return out.view(*x.shape[:-1], width)


def product(x: Tensor, weight: Tensor, rows: int | None = None) -> Tensor:
    """The product of x (…, k) with a weight (k, n): (…, n).

    With `rows`, each call of BLAS takes this many rows, so that all calls have the same shape: the
    bits of one sequence's rows then do not depend on the other sequences of the batch.

    In float32 on CPU, oneDNN computes it if torch has oneDNN. MKL, torch's default, does not use
    AVX-512 on AMD processors and has half the rate there. In all other cases this is `x @ weight`,
    and so it is under ``lddyn.backend("reference")`` and where a derivative is needed.

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
        or torch._C._are_functorch_transforms_active()
        or differentiated(x, weight)  # oneDNN's product has no derivative
        or not _onednn()
    )
    one = torch.matmul if plain else _by_onednn
    if rows is None or rows * x.shape[-1] >= x.numel():
        return one(x, weight)
    out = x.new_empty(*x.shape[:-1], weight.shape[1])
    parts = (y.view(-1, y.shape[-1]).split(rows) for y in (x.contiguous(), out))
    for part, place in zip(*parts, strict=True):
        place.copy_(one(part, weight))
    return out
