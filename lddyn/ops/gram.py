"""`gram`: inner products of per-token weight gradients, from their factors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import (
    DTYPES,
    Normal,
    Op,
    check_alike,
    launched,
    native,
    register,
    specification,
    stream,
)

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


# Most elements of pushed gradients at a time: 64 MiB in bfloat16, the size of a large cache.
_PUSHED = 1 << 25
_PUSHED_CPU = 1 << 22  # 16 MiB in float32: a workspace that small budgets hold
_TILE = 128  # of cotangents, in both kernels

# (similarity, grads_o, grads_u, lengths_o, lengths_u, workspace, splits) -> out (m, n)
_Launch = Callable[[Tensor, Tensor, Tensor, _Lengths, _Lengths, Tensor, int], Tensor]


def _workspace(dtype: torch.dtype) -> torch.dtype:
    """Dtype of S and of pushed gradients in kernels: float32 for float16, whose range is small."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _formed(grads: Tensor) -> torch.dtype:
    """The same for torch's products, which on a CPU are of float32."""
    return _workspace(grads.dtype) if grads.is_cuda else torch.float32


def _product(x: Tensor, y: Tensor) -> Tensor:
    """A product of matrices, or of batches of them, accumulated and returned in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        product = torch.bmm if x.ndim == 3 else torch.mm
        return product(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def _push(
    launch: _Launch,
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths,
    lengths_u: _Lengths,
) -> Tensor:
    """S = a_u a_oᵀ, then `launch` on chunks of observed cotangents whose workspaces are bounded."""
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    similarity = g_o.new_zeros(t, s + -s % 16, dtype=_workspace(g_o.dtype))  # aligned rows
    similarity[:, :s] = _product(a_u, a_o.T)
    columns = max(64, min(d_out + -d_out % 64, _PUSHED // (m * t) // 64 * 64))
    rows = min(m, 65535, max(1, _PUSHED // (t * columns)))
    # Tokens t are split so that the second product has a block for each multiprocessor.
    splits = max(1, min(t, 128 // (-(-rows // _TILE) * -(-n // _TILE))))
    pushed = similarity.new_empty(rows, t, columns)
    out = g_o.new_empty(m, n, dtype=torch.float32)
    for lo in range(0, m, rows):
        chunk = slice(lo, lo + rows)
        lengths = None if lengths_o is None else lengths_o[chunk]
        out[chunk] = launch(similarity, g_o[chunk], g_u, lengths, lengths_u, pushed, splits)
    return out


def _materialise(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    """<a_oᵀ g_o, a_uᵀ g_u> by torch's products, a chunk of input features at a time."""
    out = g_o.new_zeros(len(g_o), len(g_u), dtype=torch.float32)
    most = _PUSHED if g_o.is_cuda else _PUSHED_CPU
    rows = max(1, most // ((len(g_o) + len(g_u)) * g_o.shape[2]))
    for lo in range(0, a_o.shape[1], rows):
        formed = (
            _product(a[:, lo : lo + rows].T.expand(len(g), -1, -1), g).to(_formed(g))
            for a, g in ((a_o, g_o), (a_u, g_u))
        )
        left, right = (x.flatten(1) for x in formed)
        out += _product(left, right.T)
    return out


def _cheapest(
    push: Callable[..., Tensor],
    materialise: Callable[..., Tensor],
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths,
    lengths_u: _Lengths,
) -> Tensor:
    """Gram in the order of contraction that `reference.gram_order` names as cheapest."""
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    order = reference.gram_order(s, t, a_o.shape[1], d_out, m, n)
    if order == "materialise":
        return materialise(a_o, g_o, a_u, g_u)
    if order == "push_u":
        return push(a_u, g_u, a_o, g_o, lengths_u, lengths_o).T.contiguous()
    return push(a_o, g_o, a_u, g_u, lengths_o, lengths_u)


def _gram_on_gpu(
    launch: _Launch,
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths,
    lengths_u: _Lengths,
) -> Tensor:
    """Gram in the cheapest order of contraction; `launch` is a kernel that pushes and pairs."""
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    if 0 in (m, n, s, t, a_o.shape[1], d_out):
        return g_o.new_zeros(m, n, dtype=torch.float32)
    return _cheapest(partial(_push, launch), _materialise, a_o, g_o, a_u, g_u, lengths_o, lengths_u)


def _gram_triton(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    from lddyn.kernels.gram import gram as launch

    g_o, g_u = (x if x.stride(2) == 1 else x.contiguous() for x in (g_o, g_u))
    return _gram_on_gpu(launch, a_o, g_o, a_u, g_u, lengths_o, lengths_u)


def _launch_cuda(
    similarity: Tensor,
    g_o: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths,
    lengths_u: _Lengths,
    pushed: Tensor,
    splits: int,
) -> Tensor:
    """csrc/gram.cu on contiguous operands; similarity may have longer rows."""
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    out = g_o.new_empty(m, n, dtype=torch.float32)
    partial = out.new_empty(splits, m, n)
    lengths_o, lengths_u = (x if x is None else x.contiguous() for x in (lengths_o, lengths_u))
    reach_u = None if lengths_u is None else lengths_u.amax()
    tensors = (similarity, g_o, g_u, lengths_o, lengths_u, reach_u, pushed, partial, out)
    pointers = (0 if x is None else x.data_ptr() for x in tensors)
    sizes = (s, t, d_out, m, n, similarity.shape[1], pushed.shape[2], splits, DTYPES[g_o.dtype])
    with torch.cuda.device(out.device):
        launched(native().gram_cuda(native().Gram(*pointers, *sizes), stream(out)))
    return out


def _gram_cuda(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    g_o, g_u = g_o.contiguous(), g_u.contiguous()
    return _gram_on_gpu(_launch_cuda, a_o, g_o, a_u, g_u, lengths_o, lengths_u)


def _gram_cpp(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    """Gram in C++ (float32, push and pair fused), or by BLAS where another order is cheaper."""
    if g_o.dtype == torch.float64:
        return reference.gram(a_o, g_o, a_u, g_u, lengths_o, lengths_u)
    return _cheapest(_push_cpp, reference.gram, a_o, g_o, a_u, g_u, lengths_o, lengths_u)


def _push_cpp(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths,
    lengths_u: _Lengths,
) -> Tensor:
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    similarity = a_u.float() @ a_o.float().T
    g_o, g_u = g_o.float().contiguous(), g_u.float().contiguous()
    lengths_o, lengths_u = (x if x is None else x.contiguous() for x in (lengths_o, lengths_u))
    out = g_o.new_empty(m, n)
    tensors = (similarity, g_o, g_u, lengths_o, lengths_u, out)
    pointers = (0 if x is None else x.data_ptr() for x in tensors)
    native().gram_cpu(*pointers, s, t, d_out, m, n, torch.get_num_threads())
    return out


def _gram_blas(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths = None,
    lengths_u: _Lengths = None,
) -> Tensor:
    """Gram by two dense products that skip nothing: the fastest way, causal or not.

    On an H200, and on a CPU (AMD EPYC): 64 GFLOP/s of 83 for one product there, where a C++ kernel
    that skips what causality makes zero reached the speed of 15.
    """
    if g_o.dtype == torch.float64:
        return reference.gram(a_o, g_o, a_u, g_u, lengths_o, lengths_u)
    if 0 in (*g_o.shape, *g_u.shape, a_o.shape[1]):
        return g_o.new_zeros(len(g_o), len(g_u), dtype=torch.float32)
    return _cheapest(_push_blas, _materialise, a_o, g_o, a_u, g_u, lengths_o, lengths_u)


def _push_blas(
    a_o: Tensor,
    g_o: Tensor,
    a_u: Tensor,
    g_u: Tensor,
    lengths_o: _Lengths,
    lengths_u: _Lengths,
) -> Tensor:
    (m, _, d_out), (n, t, _) = g_o.shape, g_u.shape
    dtype = _formed(g_o)
    similarity, right = _product(a_u, a_o.T).to(dtype), g_u.to(dtype).reshape(n, t * d_out)
    out = g_o.new_empty(m, n, dtype=torch.float32)
    most = 4 * _PUSHED if g_o.is_cuda else _PUSHED_CPU
    rows = max(1, most // (t * d_out))
    for lo in range(0, m, rows):
        pushed = torch.matmul(similarity, g_o[lo : lo + rows].to(dtype))
        out[lo : lo + rows] = _product(pushed.flatten(1), right.T)
    return out


def _gram_sample(normal: Normal) -> tuple[Any, ...]:
    return normal(17, 5), normal(3, 17, 13), normal(9, 5), normal(7, 9, 13)


_gram = register(
    Op(
        "gram",
        _check_gram,
        _gram_fake,
        {
            "blas": _gram_blas,
            "cuda": _gram_cuda,
            "triton": _gram_triton,
            "cpp": _gram_cpp,
            "reference": specification("gram"),
        },
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
    """Inner products of one linear layer's token gradients, (M, L).

        G[m, l] = Σ_{s,t} <a_o[s], a_u[t]> <g_o[m,s], g_u[l,t]>

    This is the inner product of the weight gradients Σ_s g_o[m,s] ⊗ a_o[s] and
    Σ_t g_u[l,t] ⊗ a_u[t], which need not be computed: S = a_o a_uᵀ maps one side's gradients to the
    other side's tokens, where inner products are taken. The order of contraction is the one that
    `lddyn.reference.gram_order` finds cheapest. BLAS makes all products.

    Args:
        activations_o: Layer input of the observed sequence, shape (S, d_in),
            float32/bfloat16/float16/float64, any strides.
        grads_o: M cotangents at the layer's output, shape (M, S, d_out), same dtype and device.
        activations_u: Layer input of the updated sequence, shape (T, d_in).
        grads_u: L cotangents, shape (L, T, d_out).
        lengths_o: Shape (M,), int64. The caller guarantees grads_o[m, s] = 0 for s >= lengths_o[m],
            as causality implies; these rows need not be read. Sorted lengths are fastest. On a GPU
            the values are not copied to the host. None: no guarantee.
        lengths_u: The same for grads_u, shape (L,).

    Returns:
        Shape (M, L), float32, accumulated in float32 (float64 for float64). Zeros if S or T is 0.
        Not differentiable: a backward, or forward mode, raises.

    Raises:
        ValueError: If shapes or devices disagree. The message has both shapes.
        TypeError: If dtypes differ or are not supported.

    Cost: the least of 2STd_in + 2 M T d_out (S + L), the same with the sides exchanged, and
    2 d_in d_out (MS + LT + ML) flops. Workspace: S T similarities and tens of MiB; on CPU also a
    float32 copy of low-precision grads.

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
