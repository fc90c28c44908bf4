"""`gram`: inner products of per-token weight gradients, from their factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import DTYPES, Normal, Op, check_alike, launched, native, register, stream

_Lengths = Tensor | None


def _check_gram(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> None:
    check_alike(activations_o=a_o, grads_o=g_o, activations_u=a_u, grads_u=g_u)
    for name, x, shape in (
        ("activations_o", a_o, "(S, d_in)"),
        ("grads_o", g_o, "(M, S, d_out)"),
        ("activations_u", a_u, "(T, d_in)"),
        ("grads_u", g_u, "(L, T, d_out)"),
    ):
        if x.ndim != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    for name, x, axis, other_name, other, other_axis in (
        ("grads_o", g_o, 1, "activations_o", a_o, 0),
        ("grads_u", g_u, 1, "activations_u", a_u, 0),
        ("activations_u", a_u, 1, "activations_o", a_o, 1),
        ("grads_u", g_u, 2, "grads_o", g_o, 2),
    ):
        if x.shape[axis] != other.shape[other_axis]:
            raise ValueError(
                f"{name}.shape[{axis}] must equal {other_name}.shape[{other_axis}], "
                f"got {name} {tuple(x.shape)} and {other_name} {tuple(other.shape)}; "
                "check that both come from the same layer and sequence"
            )
    for name, lengths, grads in (("lengths_o", lengths_o, g_o), ("lengths_u", lengths_u, g_u)):
        if lengths is not None and (
            lengths.dtype != torch.int64
            or lengths.shape != grads.shape[:1]
            or lengths.device != grads.device
        ):
            raise ValueError(
                f"{name} must be int64 of shape ({len(grads)},) on {grads.device}, got "
                f"{lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
            )


def _gram_fake(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    _check_gram(a_o, g_o, a_u, g_u, lengths_o, lengths_u)
    return g_o.new_empty(g_o.shape[0], g_u.shape[0], dtype=reference.wide(g_o.dtype))


def _gram_triton(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    from lddyn.kernels.gram import gram as launch

    out: Tensor = launch(a_o, g_o, a_u, g_u)
    return out


# Elements of the pushed gradients that one CUDA launch keeps: 512 MiB in bfloat16.
_PUSHED = 1 << 28


def _gram_cuda(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    out = _gram_fake(a_o, g_o, a_u, g_u)
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    if 0 in (m, n, s, t, a_o.shape[1], d_out):
        return out.zero_()
    a_o, g_o, a_u, g_u = (x.contiguous() for x in (a_o, g_o, a_u, g_u))
    rows = min(m, 65535, max(1, _PUSHED // (t * d_out)))
    splits = min(512, -(-t * d_out // 1024))  # at least 1024 products a split, in a fixed order
    workspace = g_o.dtype if g_o.dtype == torch.bfloat16 else torch.float32
    similarity = g_o.new_empty(t, s, dtype=workspace)
    pushed = g_o.new_empty(rows, t, d_out, dtype=workspace)
    partial = out.new_empty(splits, rows, n)
    with torch.cuda.device(out.device):
        for lo in range(0, m, rows):
            chunk, chunk_out = g_o[lo : lo + rows], out[lo : lo + rows]
            tensors = (a_o, chunk, a_u, g_u, similarity, pushed, partial, chunk_out)
            sizes = (s, t, a_o.shape[1], d_out, len(chunk), n, splits, DTYPES[g_o.dtype])
            operands = native().Gram(*(x.data_ptr() for x in tensors), *sizes)
            launched(native().gram_cuda(operands, stream(out)))
    return out


def _gram_sample(normal: Normal) -> tuple[Any, ...]:
    return normal(17, 5), normal(3, 17, 13), normal(9, 5), normal(7, 9, 13)


_gram = register(
    Op(
        "gram",
        _check_gram,
        _gram_fake,
        {"cuda": _gram_cuda, "triton": _gram_triton, "reference": reference.gram},
        _gram_sample,
    ),
    "(Tensor activations_o, Tensor grads_o, Tensor activations_u, Tensor grads_u, "
    "Tensor? lengths_o=None, Tensor? lengths_u=None) -> Tensor",
)


def gram(
    activations_o: Tensor,
    grads_o: Tensor,
    activations_u: Tensor,
    grads_u: Tensor,
    lengths_o: Tensor | None = None,
    lengths_u: Tensor | None = None,
) -> Tensor:
    """Token Gram of one linear layer, from its inputs and the gradients at its output.

        G[m, l] = Σ_{s,t} <a_o[s], a_u[t]> <g_o[m,s], g_u[l,t]>

    The inner product of the weight gradients Σ_s g_o[m,s] ⊗ a_o[s] and Σ_t g_u[l,t] ⊗ a_u[t], which
    need not be formed: S = a_o a_uᵀ pushes one side's gradients onto the other's tokens, where they
    are paired. On CPU this is dense products alone, so BLAS does it in plain torch (there is no C++
    for it), in the order that `lddyn.reference.gram_order` finds cheapest.

    Args:
        activations_o: Layer input of the observed sequence, shape (S, d_in),
            float32/bfloat16/float16/float64, any strides.
        grads_o: M cotangents at the layer's output, shape (M, S, d_out), same dtype and device.
        activations_u: Layer input of the updated sequence, shape (T, d_in).
        grads_u: L cotangents, shape (L, T, d_out).
        lengths_o: A promise, int64 of shape (M,): grads_o[m, s] = 0 for s >= lengths_o[m], as
            causality has it. Rows beyond it need not be read; fastest if sorted.
        lengths_u: The same for grads_u, shape (L,).

    Returns:
        Shape (M, L), float32, accumulated in float32 (float64 for float64). Zeros if S or T is 0.
        Not differentiable: a backward, or forward mode, raises.

    Raises:
        ValueError: If shapes or devices disagree. The message gives both shapes.
        TypeError: If dtypes differ or are not supported.

    Cost: the least of 2STd_in + 2 M T d_out (S + L), the same with the sides exchanged, and
    2 d_in d_out (MS + LT + ML) flops; 32 MiB of workspace, and a float32 copy of low-precision
    grads on CPU.

    Example:
        >>> a, g = torch.eye(2), torch.ones(3, 2, 4)
        >>> gram(a, g, a, g)
        tensor([[8., 8., 8.],
                [8., 8., 8.],
                [8., 8., 8.]])
    """
    return _gram(  # type: ignore[no-any-return]
        activations_o, grads_o, activations_u, grads_u, lengths_o, lengths_u
    )
