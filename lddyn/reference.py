"""Every op in plain torch: the specification, and the CPU path where BLAS does the work.

Inputs are trusted: `lddyn.ops` checks them. Low-precision inputs are widened, so that products and
sums are in float32; float64 stays float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Largest float32 workspace of `gram` in elements (32 MiB): what a chunk of pushed rows may take.
_WORKSPACE = 8 << 20

GramOrder = Literal["push_o", "push_u", "materialise"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulation and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def residual(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax residual e_y - π and its statistics; see `lddyn.ops.residual`.

    Everything is measured from the top token, z_v - z_top <= 0, with the partition function as
    1 + tail, tail = sum over v != top of exp(z_v - z_top): nothing cancels when π_top → 1.
    """
    z = logits.to(wide(logits.dtype))
    peak, top = z.max(dim=1, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), torch.nan)  # +inf, or nothing but -inf: a NaN row
    rest = z.scatter(1, top, -torch.inf)
    runner = rest.argmax(dim=1, keepdim=True)
    runner = torch.where(runner == top, 1, runner)  # top is 0 and all others are masked
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
    """Cheapest contraction order of `gram` by FLOP count (m and n cotangents on s and t tokens).

    ``push_o`` pushes the observed gradients onto the updated tokens through S = a_o a_uᵀ and pairs
    them there; ``push_u`` is its mirror; ``materialise`` forms the m + n gradient matrices.

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
    """Token Gram of one linear layer from its factors; see `lddyn.ops.gram`."""
    (s, d_in), (t, _) = activations_o.shape, activations_u.shape
    m, n, d_out = len(grads_o), len(grads_u), grads_o.shape[2]
    order = gram_order(s, t, d_in, d_out, m, n)
    if order == "materialise":
        return _gram_materialise(activations_o, grads_o, activations_u, grads_u)
    if order == "push_u":
        return _gram_push(activations_u, grads_u, activations_o, grads_o).T.contiguous()
    return _gram_push(activations_o, grads_o, activations_u, grads_u)


def _gram_push(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    """G = <Sᵀ g_o, g_u> with S = a_o a_uᵀ, a chunk of rows of g_o at a time."""
    dtype = wide(g_o.dtype)
    m, t = len(g_o), len(a_u)
    similarity = a_u.to(dtype) @ a_o.to(dtype).T  # (t, s)
    paired = g_u.to(dtype).flatten(1).T  # (t * d_out, n)
    out = torch.empty(m, len(g_u), dtype=dtype, device=g_o.device)
    rows = max(1, _WORKSPACE // max(1, t * g_o.shape[2]))
    for lo in range(0, m, rows):
        chunk = g_o[lo : lo + rows].to(dtype)
        pushed = torch.bmm(similarity.expand(len(chunk), -1, -1), chunk)  # (rows, t, d_out)
        torch.mm(pushed.flatten(1), paired, out=out[lo : lo + rows])
    return out


def _gram_materialise(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    """G = <a_oᵀ g_o, a_uᵀ g_u>, a chunk of input features at a time."""
    dtype = wide(g_o.dtype)
    g_o, g_u = g_o.to(dtype), g_u.to(dtype)
    out = torch.zeros(len(g_o), len(g_u), dtype=dtype, device=g_o.device)
    rows = max(1, _WORKSPACE // max(1, (len(g_o) + len(g_u)) * g_o.shape[2]))
    for lo in range(0, a_o.shape[1], rows):
        # a.T from the left keeps d_out contiguous: five times faster than g.mT @ a at d_in = 8.
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
    """(P ∘ Σ_t g_u[l,t] ⊗ a_u[t]) a_o[s], source by source; see `lddyn.ops.preconditioned_push`."""
    dtype = wide(grads_u.dtype)
    scale, a_o, a_u = (x.to(dtype) for x in (scale, activations_o, activations_u))
    out = torch.empty(len(grads_u), len(a_o), grads_u.shape[2], dtype=dtype, device=grads_u.device)
    for row, result in zip(grads_u, out, strict=True):
        torch.mm(a_o, (row.to(dtype).T @ a_u).mul_(scale).T, out=result)
    return out


def signs(seed: int, side: int, repeats: int, size: int, width: int) -> Tensor:
    """Random signs ±1 (repeats, size, width), int8, from a counter: SplitMix64.

    Sign (r, i, j) is bit i % 64 of word number (r * width + j) * ceil(size / 64) + i // 64 of the
    stream (seed, side); side 0 is the activations', 1 the gradients'. A set bit is −1.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # a logical shift of signed words

    def mixed(x: Tensor) -> Tensor:
        x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return x ^ shifted(x, 31)

    words = -(-size // 64)
    key = mixed(torch.tensor([seed]) + torch.tensor([side + 1]) * golden)  # products wrap around
    count = torch.arange(1, repeats * width * words + 1, dtype=torch.int64)
    word = mixed(key + count * golden).view(repeats, width, words, 1)
    bits = (word >> torch.arange(64)) & 1
    return (1 - 2 * bits.view(repeats, width, 64 * words)[..., :size]).mT.to(torch.int8)


def sketch(
    activations: Tensor, grads: Tensor, size_out: int, size_in: int, repeats: int, seed: int
) -> Tensor:
    """Two-sided random projections of per-token weight gradients; see `lddyn.ops.sketch`."""
    dtype, device = wide(grads.dtype), grads.device
    left = signs(seed, 1, repeats, size_out, grads.shape[2]).to(device, dtype) / size_out**0.5
    right = signs(seed, 0, repeats, size_in, activations.shape[1]).to(device, dtype) / size_in**0.5
    projected = torch.einsum("ti,rbi->rtb", activations.to(dtype), right)
    return torch.einsum("ctj,raj,rtb->crab", grads.to(dtype), left, projected)


# --------------------------------------------------------------------------- elementwise layers


def gated_pullback(value: Tensor, slope: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """(g ∘ slope, g ∘ value); see `lddyn.ops.gated_pullback`."""
    return grads * slope, grads * value


def gated_pushforward(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The product gate ∘ slope + up ∘ value; see `lddyn.ops.gated_pushforward`."""
    return gate * slope + up * value


def _normalize_tangent(normalized: Tensor, rstd: Tensor, x: Tensor, centred: bool) -> Tensor:
    """The symmetric Jacobian of the normalisation: r (x − x̂ mean(x̂ ∘ x) [− mean(x)])."""
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
    return moved.to(grads.dtype), torch.einsum("ctd,td->cd", wide_grads, x_hat)


def norm_pushforward(
    normalized: Tensor, rstd: Tensor, weight: Tensor, tangents: Tensor, centred: bool
) -> Tensor:
    """Tangent of a norm's output from that of its input; see `lddyn.ops.norm_pushforward`."""
    x_hat = normalized.to(rstd.dtype)
    moved = _normalize_tangent(x_hat, rstd, tangents.to(rstd.dtype), centred)
    return (moved * weight.to(rstd.dtype)).to(tangents.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    """Rotary embedding, or its transpose, laid out as (C, T, H, e); see `lddyn.ops.rotary`."""
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
    rows = query.to(dtype).reshape(groups, -1, query.shape[-1])
    scores = (rows @ key.to(dtype).mT).view(heads, -1, key.shape[1]) * scale
    slope: Tensor | float = 1.0
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    return torch.softmax(scores + mask.to(dtype), dim=-1), slope


def attention_pullback(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    grads: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for many cotangents; see `lddyn.ops.attention_pullback`."""
    dtype, groups = wide(grads.dtype), len(key)
    probabilities, slope = attention(query, key, mask, scale, softcap)

    def grouped(x: Tensor) -> Tensor:  # (…, H, T, n) -> (…, G, H/G * T, n)
        return x.reshape(*x.shape[:-3], groups, -1, x.shape[-1])

    g = grads.to(dtype)
    p, slope = grouped(probabilities), slope if isinstance(slope, float) else grouped(slope)
    moved = grouped(g) @ value.to(dtype).mT
    moved = p * (moved - (p * moved).sum(-1, keepdim=True)) * slope * scale
    grad_query = (moved @ key.to(dtype)).reshape(len(g), *query.shape)
    grad_key = moved.mT @ grouped(query.to(dtype))
    grad_value = p.mT @ grouped(g)
    return tuple(x.to(grads.dtype) for x in (grad_query, grad_key, grad_value))  # type: ignore[return-value]


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
    dtype, groups = wide(query.dtype), len(key)
    probabilities, slope = attention(query, key, mask, scale, softcap)

    def grouped(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x.reshape(*x.shape[:-3], groups, -1, x.shape[-1])

    p, slope = grouped(probabilities), slope if isinstance(slope, float) else grouped(slope)
    moved = grouped(tangent_query) @ key.to(dtype).mT + grouped(query) @ tangent_key.to(dtype).mT
    moved = moved * slope * scale
    moved = p * (moved - (p * moved).sum(-1, keepdim=True))
    out = moved @ value.to(dtype) + p @ tangent_value.to(dtype)
    return out.reshape(len(tangent_query), *query.shape[:2], -1).to(tangent_query.dtype)
