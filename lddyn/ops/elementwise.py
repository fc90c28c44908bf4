"""Norms, gated activations and rotary embeddings, for many cotangents of one forward pass.

Every op reads a batch (C, T, n) of cotangents or tangents once. The operands of the forward pass
have no batch dimension and are shared by the whole batch. The lower bound of every op's time is its
memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import DTYPES, Normal, Op, check_alike, native, register, specification


def _check_batch(name: str, x: Tensor, shared_name: str, shared: Tensor) -> None:
    """Checks that the batch has shape (C, *shape of the shared operand)."""
    if shared.ndim != 2:
        raise ValueError(f"{shared_name} must be (T, n), got {tuple(shared.shape)}")
    if x.ndim != 3 or x.shape[1:] != shared.shape:
        raise ValueError(
            f"{name} must be (C, {shared.shape[0]}, {shared.shape[1]}), a batch of the shape of "
            f"{shared_name}, got {tuple(x.shape)}; check that both come from the same layer"
        )


def _batch(x: Tensor) -> Any:
    """A batch (C, T, n) for lddyn._C, which takes any strides but that of the rows."""
    return native().Batch(x.data_ptr(), x.stride(0), x.stride(1))


def _sizes(x: Tensor) -> Any:
    return native().Sizes(*x.shape, DTYPES[x.dtype])


def _with_rows(x: Tensor) -> Tensor:
    """The tensor with contiguous rows: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _triton(name: str) -> Callable[..., Any]:
    """The launcher of one kernel, imported at its first call."""

    def launch(*operands: Any) -> Any:
        from lddyn.kernels import elementwise

        return getattr(elementwise, name)(*operands)

    return launch


# --------------------------------------------------------------------------- gated activations


def _check_gated(value: Tensor, slope: Tensor, **batches: Tensor) -> None:
    check_alike(value=value, slope=slope, **batches)
    if slope.shape != value.shape:
        raise ValueError(
            f"slope must have the shape of value {tuple(value.shape)}, got {tuple(slope.shape)}"
        )
    for name, x in batches.items():
        _check_batch(name, x, "value", value)


def _check_gated_pullback(value: Tensor, slope: Tensor, grads: Tensor) -> None:
    _check_gated(value, slope, grads=grads)


def _check_gated_pushforward(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> None:
    _check_gated(value, slope, gate=gate, up=up)
    if up.shape != gate.shape:
        raise ValueError(
            f"up must have the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}"
        )


def _gated_pullback_fake(value: Tensor, slope: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    _check_gated_pullback(value, slope, grads)
    return grads.new_empty(grads.shape), grads.new_empty(grads.shape)


def _gated_pushforward_fake(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    _check_gated_pushforward(value, slope, gate, up)
    return gate.new_empty(gate.shape)


def _gated_pullback_cpp(value: Tensor, slope: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    value, slope, grads = value.contiguous(), slope.contiguous(), _with_rows(grads)
    gate, up = grads.new_empty(grads.shape), grads.new_empty(grads.shape)
    native().gated_pullback_cpu(
        value.data_ptr(),
        slope.data_ptr(),
        _batch(grads),
        gate.data_ptr(),
        up.data_ptr(),
        _sizes(grads),
        torch.get_num_threads(),
    )
    return gate, up


def _gated_pushforward_cpp(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    value, slope = value.contiguous(), slope.contiguous()
    gate, up = _with_rows(gate), _with_rows(up)
    out = gate.new_empty(gate.shape)
    native().gated_pushforward_cpu(
        value.data_ptr(),
        slope.data_ptr(),
        _batch(gate),
        _batch(up),
        out.data_ptr(),
        _sizes(gate),
        torch.get_num_threads(),
    )
    return out


_gated_pullback = register(
    Op(
        "gated_pullback",
        _check_gated_pullback,
        _gated_pullback_fake,
        {
            "triton": _triton("gated_pullback"),
            "cpp": _gated_pullback_cpp,
            "reference": specification("gated_pullback"),
        },
        lambda normal: (normal(5, 7), normal(5, 7), normal(3, 5, 7)),
    ),
    "(Tensor value, Tensor slope, Tensor grads) -> (Tensor gate, Tensor up)",
)
_gated_pushforward = register(
    Op(
        "gated_pushforward",
        _check_gated_pushforward,
        _gated_pushforward_fake,
        {
            "triton": _triton("gated_pushforward"),
            "cpp": _gated_pushforward_cpp,
            "reference": specification("gated_pushforward"),
        },
        lambda normal: (normal(5, 7), normal(5, 7), normal(3, 5, 7), normal(3, 5, 7)),
    ),
    "(Tensor value, Tensor slope, Tensor gate, Tensor up) -> Tensor",
)


def gated_pullback(value: Tensor, slope: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of a gated activation y = φ(a) ∘ u, for any elementwise φ.

        grad_a = grads ∘ slope,   slope = φ'(a) ∘ u;      grad_u = grads ∘ value,   value = φ(a)

    Args:
        value: φ(a), shape (T, n), float32/bfloat16/float16/float64, any strides.
        slope: φ'(a) ∘ u, shape (T, n), same dtype and device.
        grads: C cotangents of y, shape (C, T, n).

    Returns:
        Cotangents of a and of u, both (C, T, n) in the dtype of grads. Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 2 C T n flops; the lower bound of its time is the traffic, 3 C T n elements.

    Example:
        >>> import torch
        >>> gate, up = gated_pullback(torch.ones(1, 2), 2 * torch.ones(1, 2), torch.ones(3, 1, 2))
        >>> gate.sum(), up.sum()
        (tensor(12.), tensor(6.))
    """
    return _gated_pullback(value, slope, grads)  # type: ignore[no-any-return]


def gated_pushforward(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Tangents of a gated activation y = φ(a) ∘ u: gate ∘ slope + up ∘ value.

    Args:
        value: φ(a), shape (T, n), float32/bfloat16/float16/float64, any strides.
        slope: φ'(a) ∘ u, shape (T, n), same dtype and device.
        gate: C tangents of a, shape (C, T, n).
        up: C tangents of u, shape (C, T, n).

    Returns:
        Tangents of y, (C, T, n). Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 3 C T n flops; the lower bound of its time is the traffic, 3 C T n elements.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 2)
        >>> gated_pushforward(torch.ones(1, 2), 2 * torch.ones(1, 2), one, one)
        tensor([[[3., 3.]]])
    """
    return _gated_pushforward(value, slope, gate, up)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- norms


def _check_norm(
    normalized: Tensor, rstd: Tensor, weight: Tensor, batch: Tensor, centred: bool
) -> None:
    check_alike(normalized=normalized, weight=weight, batch=batch)
    _check_batch("batch", batch, "normalized", normalized)
    if rstd.dtype != reference.wide(normalized.dtype):
        raise TypeError(
            f"rstd must be {reference.wide(normalized.dtype)} for {normalized.dtype} activations, "
            f"got {rstd.dtype}"
        )
    for name, x, size in (
        ("rstd", rstd, normalized.shape[0]),
        ("weight", weight, normalized.shape[1]),
    ):
        if x.shape != (size,):
            raise ValueError(f"{name} must be ({size},), got {tuple(x.shape)}")
        if x.device != normalized.device:
            raise ValueError(f"{name} must be on {normalized.device}, got {x.device}; move it")


def _norm_pullback_fake(
    normalized: Tensor, rstd: Tensor, weight: Tensor, grads: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    _check_norm(normalized, rstd, weight, grads, centred)
    return grads.new_empty(grads.shape), rstd.new_empty(grads.shape[0], grads.shape[2])


def _norm_pushforward_fake(
    normalized: Tensor, rstd: Tensor, weight: Tensor, tangents: Tensor, centred: bool
) -> Tensor:
    _check_norm(normalized, rstd, weight, tangents, centred)
    return tangents.new_empty(tangents.shape)


def _norm_pullback_cpp(
    normalized: Tensor, rstd: Tensor, weight: Tensor, grads: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    normalized, rstd, weight = normalized.contiguous(), rstd.contiguous(), weight.contiguous()
    grads = _with_rows(grads)
    grad_input = grads.new_empty(grads.shape)
    grad_weight = rstd.new_zeros(grads.shape[0], grads.shape[2])
    native().norm_pullback_cpu(
        normalized.data_ptr(),
        rstd.data_ptr(),
        weight.data_ptr(),
        _batch(grads),
        grad_input.data_ptr(),
        grad_weight.data_ptr(),
        centred,
        _sizes(grads),
        torch.get_num_threads(),
    )
    return grad_input, grad_weight


def _norm_pushforward_cpp(
    normalized: Tensor, rstd: Tensor, weight: Tensor, tangents: Tensor, centred: bool
) -> Tensor:
    normalized, rstd, weight = normalized.contiguous(), rstd.contiguous(), weight.contiguous()
    tangents = _with_rows(tangents)
    out = tangents.new_empty(tangents.shape)
    native().norm_pushforward_cpu(
        normalized.data_ptr(),
        rstd.data_ptr(),
        weight.data_ptr(),
        _batch(tangents),
        out.data_ptr(),
        centred,
        _sizes(tangents),
        torch.get_num_threads(),
    )
    return out


def _norm_sample(normal: Normal) -> tuple[Any, ...]:
    rstd = normal(5).to(reference.wide(normal(1).dtype)).abs()
    return normal(5, 7), rstd, normal(7), normal(3, 5, 7), True


_norm_pullback = register(
    Op(
        "norm_pullback",
        _check_norm,
        _norm_pullback_fake,
        {
            "triton": _triton("norm_pullback"),
            "cpp": _norm_pullback_cpp,
            "reference": specification("norm_pullback"),
        },
        _norm_sample,
    ),
    "(Tensor normalized, Tensor rstd, Tensor weight, Tensor grads, bool centred) -> "
    "(Tensor grad_input, Tensor grad_weight)",
)
_norm_pushforward = register(
    Op(
        "norm_pushforward",
        _check_norm,
        _norm_pushforward_fake,
        {
            "triton": _triton("norm_pushforward"),
            "cpp": _norm_pushforward_cpp,
            "reference": specification("norm_pushforward"),
        },
        _norm_sample,
    ),
    "(Tensor normalized, Tensor rstd, Tensor weight, Tensor tangents, bool centred) -> Tensor",
)


def norm_pullback(
    normalized: Tensor, rstd: Tensor, weight: Tensor, grads: Tensor, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Cotangents of an RMSNorm or LayerNorm, y = x̂ ∘ w [+ b], and of its gain.

        v = w ∘ grads[c, t],   grad_x = r_t (v − x̂_t mean(x̂_t ∘ v) [− mean(v)])
        grad_w = Σ_t grads[c, t] ∘ x̂_t

    with x̂ = r x, r = (mean x² + ε)^(−1/2), or x̂ = r (x − mean x) and the term in brackets for
    LayerNorm. ε is in r; the formula is exact for any ε.

    Args:
        normalized: x̂, shape (T, n), float32/bfloat16/float16/float64, any strides.
        rstd: r, shape (T,), float32 (float64 for float64).
        weight: w, shape (n,), dtype of normalized.
        grads: C cotangents of y, shape (C, T, n), dtype of normalized.
        centred: True for LayerNorm.

    Returns:
        grad_x (C, T, n) in the dtype of grads, and grad_w (C, n) in that of rstd. Not
        differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 9 C T n flops; the lower bound of its time is the traffic, 2 C T n elements.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> r = x.square().mean(1).rsqrt()
        >>> norm_pullback(x * r[:, None], r, torch.ones(2), x[None])[0].abs().max() < 1e-6
        tensor(True)
    """
    return _norm_pullback(normalized, rstd, weight, grads, centred)  # type: ignore[no-any-return]


def norm_pushforward(
    normalized: Tensor, rstd: Tensor, weight: Tensor, tangents: Tensor, centred: bool = False
) -> Tensor:
    """Tangents of an RMSNorm or LayerNorm from those of its input.

        out = w ∘ r_t (v − x̂_t mean(x̂_t ∘ v) [− mean(v)]),   v = tangents[c, t]

    Args:
        normalized: x̂, shape (T, n), float32/bfloat16/float16/float64, any strides.
        rstd: r, shape (T,), float32 (float64 for float64).
        weight: w, shape (n,), dtype of normalized.
        tangents: C tangents of x, shape (C, T, n), dtype of normalized.
        centred: True for LayerNorm (the term in brackets).

    Returns:
        Tangents of y, (C, T, n). Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 7 C T n flops; the lower bound of its time is the traffic, 2 C T n elements.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> r = x.square().mean(1).rsqrt()
        >>> norm_pushforward(x * r[:, None], r, torch.ones(2), x[None]).abs().max() < 1e-6
        tensor(True)
    """
    return _norm_pushforward(normalized, rstd, weight, tangents, centred)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- rotary embedding


def _check_rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> None:
    check_alike(x=x, cos=cos, sin=sin)
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"x must be (C, H, T, e) with an even e, got {tuple(x.shape)}")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != x.shape[2:]:
            raise ValueError(
                f"{name} must be (T, e) = {tuple(x.shape[2:])}, got {tuple(angle.shape)}"
            )


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    _check_rotary(x, cos, sin, transpose)
    c, h, t, e = x.shape
    return x.new_empty(c, t, h, e).transpose(1, 2)


def _rotary_cpp(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    x, cos, sin = _with_rows(x), cos.contiguous(), sin.contiguous()
    c, heads, t, e = x.shape
    out = x.new_empty(c, t, heads, e)
    native().rotary_cpu(
        native().Batch(x.data_ptr(), x.stride(0), x.stride(2)),
        heads,
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        transpose,
        native().Sizes(c, t, e, DTYPES[x.dtype]),
        torch.get_num_threads(),
    )
    return out.transpose(1, 2)


_rotary = register(
    Op(
        "rotary",
        _check_rotary,
        _rotary_fake,
        {"triton": _triton("rotary"), "cpp": _rotary_cpp, "reference": specification("rotary")},
        lambda normal: (normal(3, 2, 5, 6), normal(5, 6), normal(5, 6), True),
    ),
    "(Tensor x, Tensor cos, Tensor sin, bool transpose) -> Tensor",
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool = False) -> Tensor:
    """Rotary position embedding by halves, or its transpose (the pullback; the map is linear).

        y = x ∘ cos + R(x) ∘ sin,   R(x) = (−x₂, x₁) for x = (x₁, x₂)
        transposed: x ∘ cos + Rᵀ(x ∘ sin)

    Args:
        x: Shape (C, H, T, e), e even, float32/bfloat16/float16/float64, any strides.
        cos: Shape (T, e), same dtype and device.
        sin: Shape (T, e), same dtype and device.
        transpose: Apply the transpose.

    Returns:
        Shape (C, H, T, e), laid out as (C, T, H, e) in memory, which is how the products around it
        read and write. Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 3 C H T e flops; the lower bound of its time is the traffic, 2 C H T e elements.

    Example:
        >>> import torch
        >>> x, zero, one = torch.tensor([[[[1.0, 2.0]]]]), torch.zeros(1, 2), torch.ones(1, 2)
        >>> rotary(x, zero, one), rotary(x, zero, one, transpose=True)
        (tensor([[[[-2.,  1.]]]]), tensor([[[[ 2., -1.]]]]))
    """
    return _rotary(x, cos, sin, transpose)  # type: ignore[no-any-return]
