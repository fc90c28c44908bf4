"""`attention_pullback` and `attention_pushforward`: many cotangents or tangents, one forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import Normal, Op, check_alike, register


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **batches: tuple[Tensor, Tensor]
) -> None:
    """Shapes of one forward pass, and of batches given as (batch, what it is a batch of)."""
    check_alike(query=query, key=key, value=value, **{n: x for n, (x, _) in batches.items()})
    for name, x, shape in (
        ("query", query, "(H, T, e)"),
        ("key", key, "(G, S, e)"),
        ("value", value, "(G, S, f)"),
        ("mask", mask, "(1 or H, T, S)"),
    ):
        if x.ndim != 3:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    if not mask.is_floating_point() or mask.device != query.device:
        raise TypeError(
            f"mask must be floating point, added to the scores, on {query.device}; got "
            f"{mask.dtype} on {mask.device}"
        )
    if len(key) == 0 or len(query) % len(key):
        raise ValueError(
            f"the heads of query must be a multiple of those of key, got {len(query)} and "
            f"{len(key)}"
        )
    expected = {
        "key": (key, (len(key), key.shape[1], query.shape[2])),
        "value": (value, (len(key), key.shape[1], value.shape[2])),
        "mask": (mask, (len(mask), query.shape[1], key.shape[1])),
    }
    for name, (x, wanted) in expected.items():
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(x.shape)}")
    if len(mask) not in (1, len(query)):
        raise ValueError(f"mask must have 1 or {len(query)} heads, got {len(mask)}")
    count = next(iter(batches.values()))[0].shape[:1]
    for name, (x, like) in batches.items():
        if x.shape != (*count, *like.shape):
            raise ValueError(
                f"{name} must be (C, {', '.join(map(str, like.shape))}), with one C for all, got "
                f"{tuple(x.shape)}"
            )


def _check_pullback(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    grads: Tensor,
    scale: float,
    softcap: float,
) -> None:
    output = value.new_empty(()).expand(*query.shape[:2], value.shape[-1])
    _check_attention(query, key, value, mask, grads=(grads, output))


def _check_pushforward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    scale: float,
    softcap: float,
) -> None:
    batches = {
        "tangent_query": (tangent_query, query),
        "tangent_key": (tangent_key, key),
        "tangent_value": (tangent_value, value),
    }
    _check_attention(query, key, value, mask, **batches)


def _pullback_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    grads: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_pullback(query, key, value, mask, grads, scale, softcap)
    query, key, value = (grads.new_empty(len(grads), *x.shape) for x in (query, key, value))
    return query, key, value


def _pushforward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    tangents = tangent_query, tangent_key, tangent_value
    _check_pushforward(query, key, value, mask, *tangents, scale, softcap)
    return tangent_query.new_empty(*tangent_query.shape[:3], value.shape[-1])


def _attention_pullback_triton(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    from lddyn.kernels.attention import attention_pullback as launch

    results: tuple[Tensor, Tensor, Tensor] = launch(*operands)
    return results


def _attention_pushforward_triton(*operands: Any) -> Tensor:
    from lddyn.kernels.attention import attention_pushforward as launch

    out: Tensor = launch(*operands)
    return out


def _forward_sample(normal: Normal) -> tuple[Any, ...]:
    """Grouped queries, a ragged causal mask, unequal widths of keys and values."""
    mask = normal(1, 5, 5).new_full((1, 5, 5), -3e4).triu(1)
    return normal(4, 5, 6), normal(2, 5, 6), normal(2, 5, 3), mask


_attention_pullback = register(
    Op(
        "attention_pullback",
        _check_pullback,
        _pullback_fake,
        {"triton": _attention_pullback_triton, "reference": reference.attention_pullback},
        lambda normal: (*_forward_sample(normal), normal(3, 4, 5, 3), 0.4, 2.0),
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor grads, float scale, "
    "float softcap) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)
_attention_pushforward = register(
    Op(
        "attention_pushforward",
        _check_pushforward,
        _pushforward_fake,
        {"triton": _attention_pushforward_triton, "reference": reference.attention_pushforward},
        lambda normal: (
            *_forward_sample(normal),
            normal(3, 4, 5, 6),
            normal(3, 2, 5, 6),
            normal(3, 2, 5, 3),
            0.4,
            2.0,
        ),
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor tangent_query, "
    "Tensor tangent_key, Tensor tangent_value, float scale, float softcap) -> Tensor",
)


def attention_pullback(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    grads: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of query, key and value for C cotangents of attention's output.

        P = softmax(cap(scale Q Kᵀ) + mask),   O = P V
        dS = scale cap' ∘ P ∘ (dO Vᵀ − rowsum(dO ∘ O)),   dQ = dS K,   dK = dSᵀ Q,   dV = Pᵀ dO

    for every cotangent; P is computed once and shared by all of them. Causal masks, sliding
    windows, padding and linear biases are all additive masks; keys that the mask closes to a whole
    tile of queries are skipped.

    Args:
        query: Shape (H, T, e), float32/bfloat16/float16/float64, any strides.
        key: Shape (G, S, e), G a divisor of H: query head h reads key head h // (H / G).
        value: Shape (G, S, f).
        mask: Added to the scores, shape (1 or H, T, S), floating point. An entry at or below −1e4
            closes a key. Every query must have at least one open key.
        grads: C cotangents of O, shape (C, H, T, f).
        scale: Factor on Q Kᵀ.
        softcap: c of the cap c tanh(s / c); 0 for none.

    Returns:
        Cotangents (C, H, T, e), (C, G, S, e) and (C, G, S, f) in the dtype of grads. Not
        differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 8 C H T S (e + f) / 2 flops dense, half of it if causal; its floor is that work at the
    rate of a matrix product.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 2, 2)
        >>> mask, grads = torch.zeros(1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> attention_pullback(q, q, q, mask, grads, scale=1.0)[2]
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    return _attention_pullback(query, key, value, mask, grads, scale, softcap)  # type: ignore[no-any-return]


def attention_pushforward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Tangents of attention's output for C tangents of query, key and value.

        Ṡ = scale cap' ∘ (Q̇ Kᵀ + Q K̇ᵀ),   Ṗ = P ∘ (Ṡ − rowsum(P ∘ Ṡ)),   Ȯ = Ṗ V + P V̇

    Args:
        query: Shape (H, T, e), float32/bfloat16/float16/float64, any strides.
        key: Shape (G, S, e), G a divisor of H.
        value: Shape (G, S, f).
        mask: Added to the scores, shape (1 or H, T, S); see `attention_pullback`.
        tangent_query: Shape (C, H, T, e).
        tangent_key: Shape (C, G, S, e).
        tangent_value: Shape (C, G, S, f).
        scale: Factor on Q Kᵀ.
        softcap: c of the cap c tanh(s / c); 0 for none.

    Returns:
        Tangents of O, (C, H, T, f). Not differentiable.

    Raises:
        ValueError: If shapes or devices disagree.
        TypeError: If dtypes differ or are not supported.

    Cost: 8 C H T S (e + f) / 2 flops dense, half of it if causal; its floor is that work at the
    rate of a matrix product.

    Example:
        >>> import torch
        >>> q, mask = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
        >>> zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> attention_pushforward(q, q, q, mask, zero, zero, one, 1.0)
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    return _attention_pushforward(  # type: ignore[no-any-return]
        query, key, value, mask, tangent_query, tangent_key, tangent_value, scale, softcap
    )
