"""`attention_pullback` and `attention_pushforward`, for many cotangents or tangents at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import Normal, Op, check_alike, native, register, specification


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **batches: tuple[Tensor, Tensor]
) -> None:
    """Checks the shapes of one forward pass, and of batches: pairs (batch, tensor of one entry)."""
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


# Elements of the probabilities that are kept at once, of a band of queries.
_BAND = 1 << 22


def _heads(x: Tensor | None) -> tuple[int, int, int, int]:
    """A batch (C, H, T, n) for lddyn._C, which takes any strides but that of the rows."""
    if x is None:
        return 0, 0, 0, 0
    c, h, t, _ = x.stride()
    return x.data_ptr(), c, h, t


def _float_rows(x: Tensor) -> Tensor:
    """The tensor in float32 with contiguous rows: itself, or a copy."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_bands(
    run: Callable[[Any, int], None],
    forward: tuple[Tensor, Tensor, Tensor, Tensor, float, float],
    batches: Callable[[slice, slice], list[Tensor | None]],
    count: int,
    transposed: str,
) -> None:
    """Runs csrc/attention.cpp on bands of queries, whose probabilities are the reference's.

    `batches(queries, keys)` are the six batches of a band; `transposed` names the operand whose
    rows must be columns: "value", or "key".
    """
    query, key, value, mask = forward[:4]
    heads, groups = len(query), len(key)
    size = max(64, _BAND // max(1, heads * key.shape[1]) // 64 * 64)
    opened = reference.open_keys(mask)
    for tile in reference.tiles(*forward, queries=size):
        rows, keys = query[:, tile.rows].shape[1], tile.key.shape[1]
        if keys == 0:
            continue
        seen = opened[tile.rows, tile.keys].to(torch.int8)
        first, last = seen.argmax(1), keys - seen.flip(1).argmax(1)
        closed = ~seen.bool().any(1)
        first, last = first.masked_fill(closed, keys), last.masked_fill(closed, 0)
        columns, plain = (tile.value, tile.key) if transposed == "value" else (tile.key, tile.value)
        pitch = keys + -keys % 16
        turned = columns.new_zeros(groups, columns.shape[2], pitch)
        turned[:, :, :keys] = columns.mT
        operands = [
            x.contiguous()
            for x in (tile.p, tile.weight, tile.query, plain, turned, tile.p @ tile.value)
        ]
        sizes = (count, heads, groups, rows, keys, pitch, key.shape[2], value.shape[2])
        addresses = [x.data_ptr() for x in (*operands, first, last)]
        of_band = batches(tile.rows, tile.keys)
        run(
            native().Attention(addresses, [_heads(x) for x in of_band], sizes),
            torch.get_num_threads(),
        )


def _attention_pullback_cpp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    grads: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pullback in C++, in float32, from probabilities that the reference computes."""
    if grads.dtype == torch.float64:
        return reference.attention_pullback(query, key, value, mask, grads, scale, softcap)
    g = _float_rows(grads)
    to_query, to_key, to_value = (g.new_zeros(len(g), *x.shape) for x in (query, key, value))

    def batches(rows: slice, keys: slice) -> list[Tensor | None]:
        into = to_query[:, :, rows], to_key[:, :, keys], to_value[:, :, keys]
        return [g[:, :, rows], None, None, *into]

    forward = query, key, value, mask, scale, softcap
    _by_bands(native().attention_pullback_cpu, forward, batches, len(g), "value")
    return to_query.to(grads.dtype), to_key.to(grads.dtype), to_value.to(grads.dtype)


def _attention_pushforward_cpp(
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
    """The pushforward in C++, in float32, from probabilities that the reference computes."""
    tangents = tangent_query, tangent_key, tangent_value
    forward = query, key, value, mask, scale, softcap
    if query.dtype == torch.float64:
        return reference.attention_pushforward(*forward[:4], *tangents, scale, softcap)
    t_q, t_k, t_v = (_float_rows(x) for x in tangents)
    out = t_q.new_zeros(*t_q.shape[:3], value.shape[-1])

    def batches(rows: slice, keys: slice) -> list[Tensor | None]:
        given = t_q[:, :, rows], t_k[:, :, keys], t_v[:, :, keys]
        return [*given, out[:, :, rows], None, None]

    _by_bands(native().attention_pushforward_cpu, forward, batches, len(t_q), "key")
    return out.to(tangent_query.dtype)


def _forward_sample(normal: Normal) -> tuple[Any, ...]:
    """Grouped queries, a ragged causal mask, unequal widths of keys and values."""
    mask = normal(1, 5, 5).new_full((1, 5, 5), -3e4).triu(1)
    return normal(4, 5, 6), normal(2, 5, 6), normal(2, 5, 3), mask


_attention_pullback = register(
    Op(
        "attention_pullback",
        _check_pullback,
        _pullback_fake,
        {
            "triton": _attention_pullback_triton,
            "cpp": _attention_pullback_cpp,
            "reference": specification("attention_pullback"),
        },
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
        {
            "triton": _attention_pushforward_triton,
            "cpp": _attention_pushforward_cpp,
            "reference": specification("attention_pushforward"),
        },
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

    for every cotangent; P is computed once for all of them. Causal masks, sliding
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

    Cost: 4 C H T S (e + f) flops without a mask, half of it with a causal one. The lower bound of
    its time is that work at the rate of a matrix product.

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

    Cost: 4 C H T S (e + f) flops without a mask, half of it with a causal one. The lower bound of
    its time is that work at the rate of a matrix product.

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
