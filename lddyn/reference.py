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


def gram(activations_o: Tensor, grads_o: Tensor, activations_u: Tensor, grads_u: Tensor) -> Tensor:
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
