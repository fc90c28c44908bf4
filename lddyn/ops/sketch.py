"""`sketch`: two-sided random projections of per-token weight gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import (
    DTYPES,
    Op,
    check_alike,
    launched,
    native,
    register,
    specification,
    stream,
)


def _check_sketch(
    activations: Tensor, grads: Tensor, size_out: int, size_in: int, repeats: int, seed: int
) -> None:
    check_alike(activations=activations, grads=grads)
    if activations.ndim != 2:
        raise ValueError(f"activations must be (T, d_in), got {tuple(activations.shape)}")
    if grads.ndim != 3 or grads.shape[1] != len(activations):
        raise ValueError(
            f"grads must be (C, T, d_out) with the T = {len(activations)} of activations, got "
            f"{tuple(grads.shape)}; check that both come from the same layer and sequence"
        )
    for name, size in (("size_out", size_out), ("size_in", size_in), ("repeats", repeats)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _sketch_fake(
    activations: Tensor, grads: Tensor, size_out: int, size_in: int, repeats: int, seed: int
) -> Tensor:
    _check_sketch(activations, grads, size_out, size_in, repeats, seed)
    shape = (len(grads), repeats, size_out, size_in)
    return grads.new_empty(shape, dtype=reference.wide(grads.dtype))


def _sketch_triton(
    activations: Tensor, grads: Tensor, size_out: int, size_in: int, repeats: int, seed: int
) -> Tensor:
    from lddyn.kernels.sketch import sketch as launch

    keys = reference.sign_key(seed, 1), reference.sign_key(seed, 0)
    out: Tensor = launch(activations, grads, size_out, size_in, repeats, *keys)
    return out


# Elements of the projected cotangents that one CUDA launch keeps: 512 MiB.
_PUSHED = 1 << 27


def _launch_cuda(
    activations: Tensor, grads: Tensor, size_out: int, size_in: int, repeats: int, seed: int
) -> Tensor:
    out = _sketch_fake(activations, grads, size_out, size_in, repeats, seed)
    (c, t, d_out), d_in = grads.shape, activations.shape[1]
    if 0 in (c, t, d_out, d_in):
        return out.zero_()
    activations, grads = activations.contiguous(), grads.contiguous()
    rows = min(c, 65535, max(1, _PUSHED // (t * repeats * size_out)))
    projected = out.new_empty(repeats * size_in, t)
    pushed = out.new_empty(rows, repeats * size_out, t)
    keys = reference.sign_key(seed, 1), reference.sign_key(seed, 0)
    scale = (size_out * size_in) ** -0.5
    with torch.cuda.device(out.device):
        for lo in range(0, c, rows):
            chunk, result = grads[lo : lo + rows], out[lo : lo + rows]
            pointers = [x.data_ptr() for x in (activations, chunk, projected, pushed, result)]
            sizes = (len(chunk), t, d_in, d_out, size_out, size_in, repeats)
            operands = native().Sketch(*pointers, *sizes, *keys, scale, DTYPES[grads.dtype])
            launched(native().sketch_cuda(operands, stream(out)))
    return out


_sketch = register(
    Op(
        "sketch",
        _check_sketch,
        _sketch_fake,
        {"cuda": _launch_cuda, "triton": _sketch_triton, "reference": specification("sketch")},
        lambda normal: (normal(9, 5), normal(3, 9, 13), 4, 3, 2, 7),
    ),
    "(Tensor activations, Tensor grads, SymInt size_out, SymInt size_in, SymInt repeats, "
    "int seed) -> Tensor",
)


def sketch(
    activations: Tensor,
    grads: Tensor,
    size_out: int,
    size_in: int,
    repeats: int = 1,
    seed: int = 0,
) -> Tensor:
    """Random projections of C weight gradients Σ_t grads[c, t] ⊗ activations[t], never formed.

        out[c, r] = Σ_t (S_out[r] grads[c, t]) ⊗ (S_in[r] activations[t])

    S_out[r] is size_out x d_out and S_in[r] size_in x d_in, of independent signs ±1 / √size, so
    that ⟨out[c, r], out[c', r]⟩ is an unbiased estimate of the inner product of the gradients of c
    and c', and the repeats r give its standard error. The signs come from a counter
    (`lddyn.reference.signs`): the same seed has the same signs on every backend and device, and
    a cotangent's sketch does not depend on what else is in the batch.

    Args:
        activations: Layer input, shape (T, d_in), float32/bfloat16/float16/float64, any strides.
        grads: C cotangents at the layer's output, shape (C, T, d_out), same dtype and device.
        size_out: Rows of S_out.
        size_in: Rows of S_in.
        repeats: Independent sketches.
        seed: Any 64-bit integer; use another one for every layer.

    Returns:
        Shape (C, repeats, size_out, size_in), float32 (float64 for float64). Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree, or a size is below 1.
        TypeError: If dtypes differ or are not supported.

    Cost: 2 C T R size_out (d_out + size_in) + 2 T R size_in d_in flops; the lower bound of its
    time is reading C T d_out elements once.

    Example:
        >>> import torch
        >>> a, g = torch.randn(4, 6), torch.randn(2, 4, 8)
        >>> sketch(a, g, size_out=3, size_in=2, repeats=5).shape
        torch.Size([2, 5, 3, 2])
    """
    return _sketch(activations, grads, size_out, size_in, repeats, seed)  # type: ignore[no-any-return]
