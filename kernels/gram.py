"""Inner products of one linear layer's token gradients, with S = a_u a_oᵀ from the caller.

    E[m, t, j] = Σ_s S[t, s] g_o[m, s, j],  G[m, l] = Σ_{t,j} E[m, t, j] g_u[l, t, j]

Two tiled products, a chunk of columns j at a time: every operand is read once, and E stays in
cache. The second product is split over tokens t. Each split keeps its own partial G, and these are
summed in a fixed order: there are no atomics, and equal inputs have equal bits. Tiles that the
lengths declare to be zero are neither read nor multiplied; inside a tile such entries are masked.

Accumulation is in float32. Products: bfloat16 for bfloat16 (S and E are rounded to it), TF32 for
float16 (it holds all 11 bits, and S may exceed the range of float16), IEEE float32 for float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _push_kernel(
    s_ptr,
    go_ptr,
    e_ptr,
    lengths_o_ptr,
    reach_u_ptr,
    S,
    T,
    WIDTH,
    PITCH,
    stride_st,
    stride_om,
    stride_os,
    HAS_O: tl.constexpr,
    HAS_U: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # index
    pid = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    tiles_j = tl.cdiv(WIDTH, BLOCK_J)
    start_t = pid // tiles_j * BLOCK_T
    offs_t = start_t.to(tl.int64) + tl.arange(0, BLOCK_T)
    offs_j = pid % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J).to(tl.int64)

    # zeros are skipped: s beyond the length of m, and t beyond the lengths of all sources
    depth = S
    if HAS_O:
        depth = tl.minimum(tl.load(lengths_o_ptr + m), S)
    if HAS_U:
        depth = tl.where(start_t < tl.load(reach_u_ptr), depth, 0)

    # push: E (t, j) = Σ_s S (t, s) g_o (s, j)
    acc = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    for start_s in range(0, depth, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S).to(tl.int64)
        mask_s = (offs_t < T)[:, None] & (offs_s < stride_st)[None, :]  # padded with zeros
        p_s = s_ptr + offs_t[:, None] * stride_st + offs_s[None, :]
        sim = tl.load(p_s, mask=mask_s, other=0.0)
        mask_o = (offs_s < depth)[:, None] & (offs_j < WIDTH)[None, :]
        p_o = go_ptr + m * stride_om + offs_s[:, None] * stride_os + offs_j[None, :]
        g_o = tl.load(p_o, mask=mask_o, other=0.0)
        acc = tl.dot(sim.to(DOT_DTYPE), g_o.to(DOT_DTYPE), acc, input_precision=PRECISION)

    # columns from WIDTH to PITCH are zero; the second product reads them
    p_e = e_ptr + (m * T + offs_t)[:, None] * PITCH + offs_j[None, :]
    mask_e = (offs_t < T)[:, None] & (offs_j < PITCH)[None, :]
    tl.store(p_e, acc.to(e_ptr.dtype.element_ty), mask=mask_e)


@triton.jit
def _pair_kernel(
    e_ptr,
    gu_ptr,
    out_ptr,
    lengths_u_ptr,
    T,
    WIDTH,
    PITCH,
    M,
    L,
    SPLITS,
    stride_ul,
    stride_ut,
    HAS_U: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # index; a split has the tokens split, split + SPLITS, ...: late tokens have few sources
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    tiles_l = tl.cdiv(L, BLOCK_L)
    offs_m = pid // tiles_l * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_l = pid % tiles_l * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)

    # zeros are skipped: t beyond the longest source of the tile
    end = T
    if HAS_U:
        reach = tl.load(lengths_u_ptr + offs_l, mask=offs_l < L, other=0)
        end = tl.minimum(tl.max(reach, 0), T)
    tiles_k = tl.cdiv(WIDTH, BLOCK_K)
    steps = tl.maximum(0, tl.cdiv(end - split, SPLITS)) * tiles_k

    # pair: G (m, l) += Σ_k E (m, k) g_u (k, l), k = (t, j)
    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for step in range(0, steps):
        t = split + (step // tiles_k).to(tl.int64) * SPLITS
        j = step % tiles_k * BLOCK_K + offs_k
        p_e = e_ptr + ((offs_m * T + t) * PITCH)[:, None] + j[None, :]
        e = tl.load(p_e, mask=(offs_m < M)[:, None] & (j < PITCH)[None, :], other=0.0)
        mask_u = (j < WIDTH)[:, None] & (offs_l < L)[None, :]
        if HAS_U:
            mask_u = mask_u & (t < reach)[None, :]
        p_u = gu_ptr + t * stride_ut + j[:, None] + offs_l[None, :] * stride_ul
        g_u = tl.load(p_u, mask=mask_u, other=0.0)
        acc = tl.dot(e.to(DOT_DTYPE), g_u.to(DOT_DTYPE), acc, input_precision=PRECISION)

    # whole tiles, padding included: their offsets are known at compile time
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L)
    p_tile = out_ptr + (split * tl.num_programs(0) + pid) * (BLOCK_M * BLOCK_L)
    p_out = p_tile + row[:, None] * BLOCK_L + column[None, :]
    if not FIRST:
        acc += tl.load(p_out)
    tl.store(p_out, acc)


def _config(
    dtype: torch.dtype, aligned: bool, interpreted: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles of the push and of the pair, by operand dtype; not yet timed on a GPU.

    Rows that do not begin on 16 bytes are read element by element: smaller tiles save registers.
    """
    options: dict[str, Any] = {"DOT_DTYPE": tl.float32, "PRECISION": "ieee", "num_warps": 8}
    tile = (64, 64, 32)
    if interpreted:  # the interpreter multiplies bfloat16 as integers
        tile = (16, 16, 16)
    elif dtype == torch.float16:
        options["PRECISION"] = "tf32"
    elif dtype == torch.bfloat16:
        options["DOT_DTYPE"] = tl.bfloat16
        tile = (128, 128, 64) if aligned else tile
    elif not aligned:
        tile = (64, 32, 32)
    return (
        dict(zip(("BLOCK_T", "BLOCK_J", "BLOCK_S"), tile, strict=True)) | options,
        dict(zip(("BLOCK_M", "BLOCK_L", "BLOCK_K"), tile, strict=True)) | options,
    )


def gram(similarity, grads_o, grads_u, lengths_o, lengths_u, pushed, splits):
    """Launch: S (T, ≥ S: zeros), (M, S, d_out), (L, T, d_out), lengths or None → (M, L) float32.

    The last axis of grads is contiguous. pushed is a workspace, (≥ M, T, columns) in the dtype of
    S; columns a multiple of 64.
    """
    m, s, d_out = grads_o.shape
    n, t, _ = grads_u.shape
    steps = (*grads_o.stride()[:2], *grads_u.stride()[:2], d_out)
    addresses = (grads_o.data_ptr(), grads_u.data_ptr())
    aligned = all(x % 16 == 0 for x in (*steps, *addresses))
    interpreted = not grads_o.is_cuda
    push, pair = _config(grads_o.dtype, aligned, interpreted)
    splits = min(splits, 3) if interpreted else splits  # its programs run one after the other
    tiles_m, tiles_l = triton.cdiv(m, pair["BLOCK_M"]), triton.cdiv(n, pair["BLOCK_L"])
    sizes = (splits, tiles_m, tiles_l, pair["BLOCK_M"], pair["BLOCK_L"])
    partial = grads_o.new_empty(sizes, dtype=torch.float32)
    reach_u = None if lengths_u is None else lengths_u.amax()
    lengths_o, lengths_u = (x if x is None else x.contiguous() for x in (lengths_o, lengths_u))
    none = partial  # a pointer that is never read
    for first in range(0, d_out, pushed.shape[2]):
        chunk_o = grads_o[:, :, first : first + pushed.shape[2]]
        chunk_u = grads_u[:, :, first : first + pushed.shape[2]]
        width = chunk_o.shape[2]
        tiles = triton.cdiv(t, push["BLOCK_T"]) * triton.cdiv(width, push["BLOCK_J"])
        _push_kernel[(tiles, m)](
            similarity,
            chunk_o,
            pushed,
            none if lengths_o is None else lengths_o,
            none if reach_u is None else reach_u,
            s,
            t,
            width,
            pushed.shape[2],
            similarity.stride(0),
            *chunk_o.stride()[:2],
            HAS_O=lengths_o is not None,
            HAS_U=reach_u is not None,
            **push,
        )
        _pair_kernel[(tiles_m * tiles_l, splits)](
            pushed,
            chunk_u,
            partial,
            none if lengths_u is None else lengths_u,
            t,
            width,
            pushed.shape[2],
            m,
            n,
            splits,
            *chunk_u.stride()[:2],
            HAS_U=lengths_u is not None,
            FIRST=first == 0,
            **pair,
        )
    return partial.sum(0).transpose(1, 2).flatten(0, 1).flatten(1)[:m, :n].contiguous()
