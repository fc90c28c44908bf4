"""`preconditioned_push`: effect of a diagonally preconditioned (AdamW) step of each token."""

from __future__ import annotations

from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import Op, check_alike, register, specification


def _check_preconditioned_push(
    scale: Tensor, activations_o: Tensor, activations_u: Tensor, grads_u: Tensor
) -> None:
    check_alike(grads_u=grads_u, activations_o=activations_o, activations_u=activations_u)
    for name, x, shape in (
        ("scale", scale, "(d_out, d_in)"),
        ("activations_o", activations_o, "(S, d_in)"),
        ("activations_u", activations_u, "(T, d_in)"),
        ("grads_u", grads_u, "(L, T, d_out)"),
    ):
        if x.ndim != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    if not scale.is_floating_point() or scale.device != grads_u.device:
        raise TypeError(
            f"scale must be floating point on {grads_u.device}, got {scale.dtype} on {scale.device}"
        )
    d_out, d_in = scale.shape
    for name, x, axis, size in (
        ("activations_o", activations_o, 1, d_in),
        ("activations_u", activations_u, 1, d_in),
        ("grads_u", grads_u, 1, len(activations_u)),
        ("grads_u", grads_u, 2, d_out),
    ):
        if x.shape[axis] != size:
            raise ValueError(
                f"{name}.shape[{axis}] must be {size}, got {tuple(x.shape)}, with scale "
                f"{tuple(scale.shape)} and activations_u {tuple(activations_u.shape)}"
            )


def _preconditioned_push_fake(
    scale: Tensor, activations_o: Tensor, activations_u: Tensor, grads_u: Tensor
) -> Tensor:
    _check_preconditioned_push(scale, activations_o, activations_u, grads_u)
    shape = (len(grads_u), len(activations_o), grads_u.shape[2])
    return grads_u.new_empty(shape, dtype=reference.wide(grads_u.dtype))


def _preconditioned_push_triton(
    scale: Tensor, activations_o: Tensor, activations_u: Tensor, grads_u: Tensor
) -> Tensor:
    from lddyn.kernels.precondition import preconditioned_push as launch

    out: Tensor = launch(scale, activations_o, activations_u, grads_u)
    return out


_preconditioned_push = register(
    Op(
        "preconditioned_push",
        _check_preconditioned_push,
        _preconditioned_push_fake,
        {"triton": _preconditioned_push_triton, "reference": specification("preconditioned_push")},
        lambda normal: (normal(13, 5).abs(), normal(7, 5), normal(9, 5), normal(3, 9, 13)),
        leading=3,  # P may have a dtype of its own
    ),
    "(Tensor scale, Tensor activations_o, Tensor activations_u, Tensor grads_u) -> Tensor",
)


def preconditioned_push(
    scale: Tensor, activations_o: Tensor, activations_u: Tensor, grads_u: Tensor
) -> Tensor:
    """Change of a layer's output by a diagonally preconditioned step on each source token.

        E[l, s] = (P ∘ Σ_t grads_u[l, t] ⊗ activations_u[t]) activations_o[s]

    This is the tangent of y = W a under W ← W + P ∘ ∇W, the step of AdamW and RMSprop. P is no
    product of two vectors, so that every entry of a source token's d_out x d_in gradient is needed.
    On a GPU the gradient is computed tile by tile and never written.

    Args:
        scale: P, shape (d_out, d_in), any floating dtype and strides.
        activations_o: Layer input of the observed sequence, shape (S, d_in),
            float32/bfloat16/float16/float64.
        activations_u: Layer input of the updated sequence, shape (T, d_in), same dtype and device.
        grads_u: L cotangents at the layer's output, shape (L, T, d_out).

    Returns:
        Shape (L, S, d_out), float32 (float64 for float64). Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 2 L d_out d_in (T + S) flops; the lower bound of its time is that work at the
    rate of a matrix product.

    Example:
        >>> import torch
        >>> a, g = torch.eye(2), torch.ones(1, 2, 3)
        >>> preconditioned_push(torch.full((3, 2), 0.5), a, a, g)
        tensor([[[0.5000, 0.5000, 0.5000],
                 [0.5000, 0.5000, 0.5000]]])
    """
    return _preconditioned_push(scale, activations_o, activations_u, grads_u)  # type: ignore[no-any-return]
