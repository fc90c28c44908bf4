"""Token Gram of one linear layer: push, then pair.

    S = a_u a_oᵀ,  E[m, t, j] = Σ_s S[t, s] g_o[m, s, j],  G[m, l] = Σ_{t,j} E[m, t, j] g_u[l, t, j]

S is one small GEMM left to torch. One program per (BLOCK_M, BLOCK_L) tile of G and per split of the
(t, j) tiles: it pushes a tile of E into registers (dot over s) and pairs it at once (dot over t and
j), so E is never written. Each split writes its own partial G, and their sum follows: no atomics, a
fixed order, equal bits for equal inputs. g_o is read T/BLOCK_T times (from cache), g_u M/BLOCK_M
times; E is formed anew for each of L/BLOCK_L columns of tiles.

Accumulation is in float32. Products: bfloat16 for bfloat16 (S and E are rounded to it), TF32 for
float16 (it holds all 11 bits, and S may exceed the range of float16), IEEE float32 for float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _gram_kernel(
    s_ptr,
    go_ptr,
    gu_ptr,
    out_ptr,
    S,
    T,
    D,
    M,
    L,
    stride_st,
    stride_ss,
    stride_om,
    stride_os,
    stride_oj,
    stride_ul,
    stride_ut,
    stride_uj,
    TILES,
    TILES_PER_SPLIT,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # index; rows of E are (m, j) with j fastest, columns are t, and k = (j, t) with t fastest
    pid_m = tl.program_id(0).to(tl.int64)
    pid_l = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M * BLOCK_J)
    offs_m = pid_m * BLOCK_M + row // BLOCK_J
    offs_l = pid_l * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.arange(0, BLOCK_J * BLOCK_T)
    tiles_t = tl.cdiv(T, BLOCK_T)

    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    first = split * TILES_PER_SPLIT
    for tile in range(first, tl.minimum(first + TILES_PER_SPLIT, TILES)):
        start_t = (tile % tiles_t) * BLOCK_T
        start_j = (tile // tiles_t) * BLOCK_J
        offs_t = (start_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        offs_j = start_j + row % BLOCK_J

        # push: E (m j, t) = Σ_s g_o (m j, s) S (s, t)
        pushed = tl.zeros((BLOCK_M * BLOCK_J, BLOCK_T), tl.float32)
        for start_s in range(0, S, BLOCK_S):
            offs_s = (start_s + tl.arange(0, BLOCK_S)).to(tl.int64)
            mask_o = ((offs_m < M) & (offs_j < D))[:, None] & (offs_s < S)[None, :]
            p_o = go_ptr + (offs_m * stride_om + offs_j * stride_oj)[:, None]
            g_o = tl.load(p_o + offs_s[None, :] * stride_os, mask=mask_o, other=0.0)
            mask_s = (offs_s < S)[:, None] & (offs_t < T)[None, :]
            p_s = s_ptr + offs_s[:, None] * stride_ss + offs_t[None, :] * stride_st
            sim = tl.load(p_s, mask=mask_s, other=0.0)
            g_o, sim = g_o.to(DOT_DTYPE), sim.to(DOT_DTYPE)
            pushed = tl.dot(g_o, sim, pushed, input_precision=PRECISION)

        # pair: G (m, l) += Σ_k E (m, k) g_u (k, l)
        e = tl.reshape(pushed.to(DOT_DTYPE), (BLOCK_M, BLOCK_J * BLOCK_T))
        k_t = (start_t + k % BLOCK_T).to(tl.int64)
        k_j = (start_j + k // BLOCK_T).to(tl.int64)
        mask_u = ((k_t < T) & (k_j < D))[:, None] & (offs_l < L)[None, :]
        p_u = gu_ptr + (k_t * stride_ut + k_j * stride_uj)[:, None] + offs_l[None, :] * stride_ul
        g_u = tl.load(p_u, mask=mask_u, other=0.0)
        acc = tl.dot(e, g_u.to(DOT_DTYPE), acc, input_precision=PRECISION)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_out = out_ptr + (split * M + offs_m)[:, None] * L + offs_l[None, :]
    tl.store(p_out, acc, mask=(offs_m < M)[:, None] & (offs_l < L)[None, :])


def _config(dtype: torch.dtype, interpreted: bool = False) -> dict[str, Any]:
    """Tiles by operand dtype; chosen for registers and shared memory, not yet timed on a GPU."""
    small = {"BLOCK_M": 16, "BLOCK_L": 16, "BLOCK_T": 16, "BLOCK_J": 8, "BLOCK_S": 16}
    large = {"BLOCK_M": 16, "BLOCK_L": 64, "BLOCK_T": 32, "BLOCK_J": 8, "BLOCK_S": 32}
    if dtype == torch.bfloat16 and not interpreted:  # the interpreter multiplies its bit patterns
        return large | {"DOT_DTYPE": tl.bfloat16, "PRECISION": "ieee", "num_warps": 8}
    precision = "tf32" if dtype == torch.float16 else "ieee"
    return small | {"DOT_DTYPE": tl.float32, "PRECISION": precision, "num_warps": 4}


def gram(activations_o, grads_o, activations_u, grads_u):
    """Launch: (S, d_in), (M, S, d_out), (T, d_in), (L, T, d_out) → (M, L) float32."""
    m, s, d_out = grads_o.shape
    n, t, _ = grads_u.shape
    if 0 in (m, n, s, t, d_out):
        return grads_o.new_zeros(m, n, dtype=torch.float32)
    interpreted = not grads_o.is_cuda
    config = _config(grads_o.dtype, interpreted)
    similarity = activations_u.float() @ activations_o.float().T

    blocks_m, blocks_l = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_L"])
    tiles = triton.cdiv(t, config["BLOCK_T"]) * triton.cdiv(d_out, config["BLOCK_J"])
    programs = 4 if interpreted else 512  # enough to fill a large GPU a few times over
    splits = min(tiles, max(1, programs // (blocks_m * blocks_l)))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    partial = grads_o.new_empty(splits, m, n, dtype=torch.float32)
    _gram_kernel[(blocks_m, blocks_l, splits)](
        similarity,
        grads_o,
        grads_u,
        partial,
        s,
        t,
        d_out,
        m,
        n,
        *similarity.stride(),
        *grads_o.stride(),
        *grads_u.stride(),
        tiles,
        per_split,
        **config,
    )
    return partial.sum(0)
