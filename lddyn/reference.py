"""Every op in plain torch: its specification, and its CPU backend where BLAS does the work.

Inputs are not checked here but in `lddyn.ops`. Products and sums are in float64 for float64 inputs
and in float32 for all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Most elements of the workspace of `gram`, that is of a chunk of pushed rows (32 MiB in float32).
_WORKSPACE = 8 << 20

GramOrder = Literal["push_o", "push_u", "materialise"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def residual(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax residual e_y - π and its statistics; see `lddyn.ops.residual`.

    All exponents are relative to the top token, z_v - z_top <= 0. The partition function is
    1 + tail with tail = Σ exp(z_v - z_top) over v != top, so that no digits cancel when π_top → 1.
    """
    z = logits.to(wide(logits.dtype))
    peak, top = z.max(dim=1, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), torch.nan)  # a row with +inf, or of -inf only, is NaN
    rest = z.scatter(1, top, -torch.inf)
    runner = rest.argmax(dim=1, keepdim=True)
    runner = torch.where(runner == top, 1, runner)  # if top is 0 and all others are masked
    z = z - peak
    weight = rest.sub_(peak).exp_()  # exp(z - peak), 0 at top
    tail = weight.sum(dim=1, keepdim=True)
    partition = 1 + tail
    weight.scatter_(1, top, 1.0)
    pi = weight.div_(partition)
    log_partition = torch.log1p(tail)

    y = targets.unsqueeze(1)
    logp = z.gather(1, y) - log_partition
    masked = z == -torch.inf
    entropy = log_partition - (pi * z.masked_fill_(masked, 0.0)).sum(dim=1, keepdim=True)
    squared_norm = (pi * pi).sum(dim=1)
    complement = torch.where(y == top, tail / partition, 1 - pi.gather(1, y))
    out = pi.neg_().scatter_(1, y, complement)
    return out, logp.squeeze(1), entropy.squeeze(1), squared_norm, torch.cat([top, runner], dim=1)


def gram_order(s: int, t: int, d_in: int, d_out: int, m: int, n: int) -> GramOrder:
    """The order of contraction of `gram` that takes the fewest FLOPs.

    There are m cotangents on s observed tokens and n on t updated tokens. ``push_o`` maps the
    observed gradients to the updated tokens by S = a_o a_uᵀ and takes inner products there;
    ``push_u`` does the same with the sides exchanged; ``materialise`` forms all m + n gradient
    matrices.

    >>> gram_order(128, 128, 768, 768, 128, 128)
    'push_o'
    >>> gram_order(512, 512, 8, 1024, 64, 64)
    'materialise'
    """
    flops: dict[GramOrder, int] = {
        "push_o": s * t * d_in + m * t * d_out * (s + n),
        "push_u": s * t * d_in + n * s * d_out * (t + m),
        "materialise": d_in * d_out * (m * s + n * t + m * n),
    }
    return min(flops, key=flops.__getitem__)


def gram(
    activations_o: Tensor,
    grads_o: Tensor,
    activations_u: Tensor,
    grads_u: Tensor,
    lengths_o: Tensor | None = None,
    lengths_u: Tensor | None = None,
) -> Tensor:
    """Inner products of one linear layer's token gradients; see `lddyn.ops.gram`."""
    (s, d_in), (t, _) = activations_o.shape, activations_u.shape
    m, n, d_out = len(grads_o), len(grads_u), grads_o.shape[2]
    order = gram_order(s, t, d_in, d_out, m, n)
    if order == "materialise":
        return _gram_materialise(activations_o, grads_o, activations_u, grads_u)
    if order == "push_u":
        return _gram_push(activations_u, grads_u, activations_o, grads_o, lengths_o).T.contiguous()
    return _gram_push(activations_o, grads_o, activations_u, grads_u, lengths_u)


def _gram_push(
    a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor, lengths_u: Tensor | None
) -> Tensor:
    """G = <Sᵀ g_o, g_u>, S = a_o a_uᵀ, by chunks of rows of g_o and stretches of tokens of u."""
    dtype = wide(g_o.dtype)
    m, d_out = len(g_o), g_o.shape[2]
    similarity = a_u.to(dtype) @ a_o.to(dtype).T  # (t, s)
    g_u = g_u.to(dtype)
    out = torch.zeros(m, len(g_u), dtype=dtype, device=g_o.device)
    for start, stop, first in _stretches(len(a_u), len(g_u), lengths_u):
        paired = g_u[first:, start:stop].flatten(1).T
        rows = max(1, _WORKSPACE // max(1, (stop - start) * d_out))
        for lo in range(0, m, rows):
            chunk = g_o[lo : lo + rows].to(dtype)
            pushed = torch.matmul(similarity[start:stop], chunk)  # (rows, stretch, d_out)
            out[lo : lo + rows, first:].addmm_(pushed.flatten(1), paired)
    return out


def _stretches(t: int, n: int, lengths: Tensor | None) -> list[tuple[int, int, int]]:
    """The t tokens in stretches (start, stop, first).

    Cotangents first, first + 1, … are not zero in tokens start … stop − 1; earlier ones are.
    """
    if lengths is None:
        return [(0, t, 0)]
    reach = [min(t, int(x)) for x in lengths.tolist()]
    if reach != sorted(reach):
        return [(0, max(reach, default=0), 0)]
    # Stretches have at least an eighth of the tokens: products of short ones are slow.
    step, stops = max(16, t // 8), list[int]()
    for length in reach:
        if len(stops) < 2 or length - stops[-2] > step:
            stops.append(length)
        else:
            stops[-1] = length
    stretches, first, start = [], 0, 0
    for stop in stops:
        if stop > start:
            stretches.append((start, stop, first))
        first = next((i for i, length in enumerate(reach) if length > stop), n)
        start = stop
    return stretches


def _gram_materialise(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    """G = <a_oᵀ g_o, a_uᵀ g_u>, a chunk of input features at a time."""
    dtype = wide(g_o.dtype)
    g_o, g_u = g_o.to(dtype), g_u.to(dtype)
    out = torch.zeros(len(g_o), len(g_u), dtype=dtype, device=g_o.device)
    rows = max(1, _WORKSPACE // max(1, (len(g_o) + len(g_u)) * g_o.shape[2]))
    for lo in range(0, a_o.shape[1], rows):
        # With a.T as the left factor d_out stays contiguous: at d_in = 8 five times faster than
        # g.mT @ a.
        left_o, left_u = (a[:, lo : lo + rows].to(dtype).T for a in (a_o, a_u))
        formed_o = torch.bmm(left_o.expand(len(g_o), -1, -1), g_o).flatten(1)
        formed_u = torch.bmm(left_u.expand(len(g_u), -1, -1), g_u).flatten(1)
        out.addmm_(formed_o, formed_u.T)
    return out


def residual_gram(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> Tensor:
    """Inner products of softmax residuals; see `lddyn.ops.residual_gram`."""
    return residual(logits_o, targets_o)[0] @ residual(logits_u, targets_u)[0].T


# --------------------------------------------------------------------------- AdamW and sketches


def preconditioned_push(
    scale: Tensor, activations_o: Tensor, activations_u: Tensor, grads_u: Tensor
) -> Tensor:
    """(P ∘ Σ_t g_u[l,t] ⊗ a_u[t]) a_o[s], one l at a time; see `lddyn.ops.preconditioned_push`."""
    dtype = wide(grads_u.dtype)
    scale, a_o, a_u = (x.to(dtype) for x in (scale, activations_o, activations_u))
    out = torch.empty(len(grads_u), len(a_o), grads_u.shape[2], dtype=dtype, device=grads_u.device)
    gradient = torch.empty_like(scale, memory_format=torch.contiguous_format)  # reused
    for row, result in zip(grads_u, out, strict=True):
        torch.mm(row.to(dtype).T, a_u, out=gradient)
        torch.mm(a_o, gradient.mul_(scale).T, out=result)
    return out


def words(seed: int, count: int) -> Tensor:
    """The first `count` numbers of SplitMix64 (Steele, Lea & Flood 2014), (count,) int64.

    The generator's numbers are unsigned; their 64 bits are stored as signed ones.
    """

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # a logical shift: no copies of the sign bit

    x = torch.arange(1, count + 1, device="cpu") * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    x = x + seed
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ shifted(x, 31)


def sign_key(seed: int, side: int) -> int:
    """SplitMix64's seed for the signs of one side: 0 is the activations, 1 the gradients.

    The user's seed is mixed twice, so that different seeds have different streams. Mixed once, the
    streams of `seed` and of `seed + 0x9E3779B97F4A7C15` would overlap.
    """
    return int(words(int(words(seed, 1)), side + 1)[side])


def signs(seed: int, side: int, repeats: int, size: int, width: int) -> Tensor:
    """Random signs ±1 (repeats, size, width), int8, each computed from its index.

    Sign (r, i, j) is bit e % 64, e = r * size + i, of number e // 64 * width + j of SplitMix64
    seeded with `sign_key(seed, side)`; a set bit is −1. The first repeats do not depend on how many
    there are.
    """
    rows = repeats * size
    blocks = -(-rows // 64)
    word = words(sign_key(seed, side), blocks * width).view(blocks, 1, width)
    byte = ((word >> torch.arange(0, 64, 8, device="cpu")[:, None]) & 255).to(torch.uint8)
    bit = (byte[:, :, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")[:, None]) & 1
    flat = (1 - 2 * bit.view(torch.int8)).view(64 * blocks, width)
    return flat[:rows].view(repeats, size, width)


def sketch(
    activations: Tensor, grads: Tensor, size_out: int, size_in: int, repeats: int, seed: int
) -> Tensor:
    """Two-sided random projections of per-token weight gradients; see `lddyn.ops.sketch`.

    Each cotangent has a product of its own, so that its bits do not depend on the others.
    """
    dtype, device = wide(grads.dtype), grads.device
    (c, t, d_out), d_in = grads.shape, activations.shape[1]
    left = signs(seed, 1, repeats, size_out, d_out).to(device, dtype).flatten(0, 1)
    right = signs(seed, 0, repeats, size_in, d_in).to(device, dtype).flatten(0, 1)
    projected = (activations.to(dtype) @ right.T).view(t, repeats, size_in).transpose(0, 1)
    projected = projected / (size_out * size_in) ** 0.5
    out = grads.new_empty(c, repeats, size_out, size_in, dtype=dtype)
    for index, row in enumerate(grads):
        pushed = (row.to(dtype) @ left.T).view(t, repeats, size_out)
        out[index] = pushed.permute(1, 2, 0) @ projected
    return out


# --------------------------------------------------------------------------- elementwise layers


def gated_pullback(value: Tensor, slope: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents (g ∘ slope, g ∘ value) of gate and up; see `lddyn.ops.gated_pullback`."""
    return (grads * slope).contiguous(), (grads * value).contiguous()


def gated_pushforward(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The product gate ∘ slope + up ∘ value; see `lddyn.ops.gated_pushforward`."""
    return (gate * slope + up * value).contiguous()


def _normalize_tangent(normalized: Tensor, rstd: Tensor, x: Tensor, centred: bool) -> Tensor:
    """The normalisation's (symmetric) Jacobian times x: r (x − x̂ mean(x̂ ∘ x) [− mean(x)])."""
    out = x - normalized * (normalized * x).mean(-1, keepdim=True)
    if centred:
        out = out - x.mean(-1, keepdim=True)
    return out * rstd[:, None]


def norm_pullback(
    normalized: Tensor, rstd: Tensor, weight: Tensor, grads: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of a norm's input and gain; see `lddyn.ops.norm_pullback`."""
    wide_grads, x_hat = grads.to(rstd.dtype), normalized.to(rstd.dtype)
    moved = _normalize_tangent(x_hat, rstd, wide_grads * weight.to(rstd.dtype), centred)
    grad_weight = (wide_grads * x_hat).sum(1).contiguous()  # einsum takes 20 times longer
    return moved.to(grads.dtype).contiguous(), grad_weight


def norm_pushforward(
    normalized: Tensor, rstd: Tensor, weight: Tensor, tangents: Tensor, centred: bool
) -> Tensor:
    """Tangent of a norm's output for a tangent of its input; see `lddyn.ops.norm_pushforward`."""
    x_hat = normalized.to(rstd.dtype)
    moved = _normalize_tangent(x_hat, rstd, tangents.to(rstd.dtype), centred)
    return (moved * weight.to(rstd.dtype)).to(tangents.dtype).contiguous()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    """Rotary embedding or its transpose, as (C, T, H, e) in memory; see `lddyn.ops.rotary`."""
    half = x.shape[-1] // 2
    x, cos, sin = x.transpose(1, 2), cos[:, None], sin[:, None]
    if transpose:
        turned = x * sin
        turned = torch.cat([turned[..., half:], -turned[..., :half]], dim=-1)
    else:
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
    return turned.addcmul_(x, cos).transpose(1, 2)


# --------------------------------------------------------------------------- attention


def attention(
    query: Tensor, key: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor | float]:
    """Probabilities (H, T, S) of grouped-query attention, and the slope of its soft cap."""
    heads, groups = len(query), len(key)
    dtype = wide(query.dtype)
    rows = query.to(dtype).reshape(groups, heads // groups * query.shape[1], query.shape[2])
    scores = (rows @ key.to(dtype).mT).view(heads, query.shape[1], key.shape[1]) * scale
    slope: Tensor | float = 1.0
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    return torch.softmax(scores + mask.to(dtype), dim=-1), slope


# Queries in a tile of attention. Keys that the mask closes to all of them are skipped: with a
# causal mask half of all pairs.
_QUERIES = 64


class Tile(NamedTuple):
    """Some queries and the keys that the mask opens to them; R = H/G · (number of queries)."""

    rows: slice
    keys: slice
    p: Tensor  # probabilities (G, R, s)
    weight: Tensor  # scale cap' ∘ P, (G, R, 1, s)
    query: Tensor  # (G, R, e)
    key: Tensor  # (G, s, e)
    value: Tensor  # (G, s, f)


def open_keys(mask: Tensor) -> Tensor:
    """Whether a mask (1 or H, T, S) opens a key to a query in at least one head, (T, S) bool."""
    return (mask > -1e4).any(0)


def tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    queries: int = _QUERIES,
) -> Iterator[Tile]:
    """Tiles of queries, each with all keys from the first to the last one open to its queries."""
    groups = len(key)
    query, key, value = (x.to(wide(x.dtype)) for x in (query, key, value))
    opened = open_keys(mask)
    for lo in range(0, query.shape[1], queries):
        rows = slice(lo, min(lo + queries, query.shape[1]))
        seen = opened[rows].any(0).nonzero().flatten().tolist() or [0, -1]
        keys = slice(seen[0], seen[-1] + 1)
        q, k, v = query[:, rows], key[:, keys], value[:, keys]
        p, slope = attention(q, k, mask[:, rows, keys], scale, softcap)
        weight, r = p * scale * slope, len(query) // groups * q.shape[1]
        p, weight = p.reshape(groups, r, k.shape[1]), weight.reshape(groups, r, 1, k.shape[1])
        yield Tile(rows, keys, p, weight, q.reshape(groups, r, q.shape[2]), k, v)


def attention_pullback(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    grads: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for many cotangents; see `lddyn.ops.attention_pullback`.

    Operands are laid out as (G, R, C, n), so that every product is one large matrix product for
    each group.
    """
    count, dtype, groups = len(grads), wide(grads.dtype), len(key)
    results = [grads.new_zeros(count, *x.shape, dtype=dtype) for x in (query, key, value)]
    grad_query, grad_key, grad_value = results
    for rows, keys, p, weight, q, k, v in tiles(query, key, value, mask, scale, softcap):
        (_, r, s), e, f = p.shape, k.shape[-1], v.shape[-1]
        g = grads[:, :, rows].to(dtype).reshape(count, groups, r, f).permute(1, 2, 0, 3)
        g = g.contiguous()
        moved = (g.view(groups, r * count, f) @ v.mT).view(groups, r, count, s)
        moved = (moved - (g * (p @ v)[:, :, None]).sum(-1, keepdim=True)) * weight

        to_query = (moved.view(groups, r * count, s) @ k).view(groups, r, count, e)
        to_key = (moved.view(groups, r, count * s).mT @ q).view(groups, count, s, e)
        to_value = (p.mT @ g.view(groups, r, count * f)).view(groups, s, count, f)
        shape = grad_query[:, :, rows].shape
        grad_query[:, :, rows] = to_query.permute(2, 0, 1, 3).reshape(shape)
        grad_key[:, :, keys] += to_key.transpose(0, 1)
        grad_value[:, :, keys] += to_value.permute(2, 0, 1, 3)
    return tuple(x.to(grads.dtype) for x in results)  # type: ignore[return-value]


def attention_pushforward(
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
    """Tangent of attention's output for many tangents; see `lddyn.ops.attention_pushforward`."""
    count, dtype, groups = len(tangent_query), wide(query.dtype), len(key)
    out = tangent_query.new_zeros(*tangent_query.shape[:3], value.shape[-1], dtype=dtype)
    for rows, keys, p, weight, q, k, v in tiles(query, key, value, mask, scale, softcap):
        (_, r, s), e, f = p.shape, k.shape[-1], v.shape[-1]
        t_q = tangent_query[:, :, rows].to(dtype).reshape(count, groups, r, e).permute(1, 2, 0, 3)
        t_k = tangent_key[:, :, keys].to(dtype).transpose(0, 1)  # (G, C, s, e)
        t_v = tangent_value[:, :, keys].to(dtype).permute(1, 2, 0, 3)  # (G, s, C, f)

        moved = (t_q.reshape(groups, r * count, e) @ k.mT).view(groups, r, count, s)
        moved = moved + (q @ t_k.reshape(groups, count * s, e).mT).view(moved.shape)
        moved = moved * weight
        # (Ṡ∘P − P rowsum(P∘Ṡ)) V; the second term is rowsum(P∘Ṡ) times P V
        tangent = (moved.view(groups, r * count, s) @ v).view(groups, r, count, f)
        tangent = tangent - moved.sum(-1, keepdim=True) * (p @ v)[:, :, None]
        tangent = tangent + (p @ t_v.reshape(groups, s, count * f)).view(tangent.shape)
        out[:, :, rows] = tangent.permute(2, 0, 1, 3).reshape(out[:, :, rows].shape)
    return out.to(tangent_query.dtype)
