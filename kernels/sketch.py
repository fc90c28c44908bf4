"""Two-sided random projections of per-token weight gradients, with signs made in registers.

    Q = S_in h,  P[c] = S_out δ[c],  out[c, r] = Σ_t P[c, r, :, t] ⊗ Q[r, :, t]

All repeats are rows of one S: row e is (r, i) with i fastest, and sign (e, j) is bit e % 64 of
number e // 64 * width + j of SplitMix64, so that one word has the signs of 64 rows. Q is computed
once for all cotangents. There is one program per cotangent, tile of tokens, and ROWS rows of S_out
(all repeats, if they fit). It reads δ once and multiplies its tile of P with the columns of Q that
belong to the same repeats, so that P is never written. A last kernel adds the tiles of tokens in
order: there are no atomics, and a cotangent's bits do not depend on the rest of the batch.

Accumulation is in float32. Products with signs are exact in the operands' dtype; P and Q are paired
in bfloat16 for bfloat16, TF32 for float16 (whose range P may exceed), IEEE float32 for float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _numbers(key, n):
    """Numbers n (from 0) of SplitMix64 seeded with key."""
    x = key.to(tl.uint64) + (n + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _projected(
    x_ptr,
    key,
    first,
    offs_t,
    T,
    D,
    stride_t,
    stride_j,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SIGN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows first … first + ROWS of S xᵀ, (ROWS, BLOCK_T)."""
    half = first // 32 + tl.arange(0, ROWS // 32)  # of a word: its bits fit in a register
    bit = tl.arange(0, 32).to(tl.uint32)
    out = tl.zeros((ROWS, BLOCK_T), tl.float32)
    for start in range(0, D, BLOCK_J):
        offs_j = (start + tl.arange(0, BLOCK_J)).to(tl.int64)
        word = _numbers(key, (half // 2).to(tl.int64)[:, None] * D + offs_j[None, :])
        word = (word >> (half % 2 * 32).to(tl.uint64)[:, None]).to(tl.uint32)
        negative = (word[:, None, :] >> bit[None, :, None]) & 1
        sign = tl.where(negative == 1, -1.0, 1.0).to(SIGN_DTYPE)
        p_x = x_ptr + offs_j[:, None] * stride_j + offs_t[None, :] * stride_t
        x = tl.load(p_x, mask=(offs_j < D)[:, None] & (offs_t < T)[None, :], other=0.0)
        sign = tl.reshape(sign, (ROWS, BLOCK_J))
        out = tl.dot(sign, x.to(SIGN_DTYPE), out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["key"])
def _project_kernel(
    x_ptr,
    out_ptr,
    key,
    T,
    D,
    E,
    stride_t,
    stride_j,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SIGN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    offs_e = first + tl.arange(0, ROWS)
    offs_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    out = _projected(
        x_ptr,
        key,
        first,
        offs_t,
        T,
        D,
        stride_t,
        stride_j,
        ROWS,
        BLOCK_T,
        BLOCK_J,
        SIGN_DTYPE,
        PRECISION,
    )
    mask = (offs_e < E)[:, None] & (offs_t < T)[None, :]
    tl.store(out_ptr + offs_e.to(tl.int64)[:, None] * T + offs_t[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["key"])
def _sketch_kernel(
    x_ptr,
    q_ptr,
    partial_ptr,
    key,
    C,
    T,
    D,
    E,
    SIZE_OUT,
    SIZE_IN,
    stride_c,
    stride_t,
    stride_j,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SIGN_DTYPE: tl.constexpr,
    PAIR_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # index: tiles of rows run fastest, so that programs that read the same x run together
    tiles_e = tl.cdiv(E, ROWS)
    pid = tl.program_id(0)
    tile_t = tl.program_id(1).to(tl.int64)
    c = (pid // tiles_e).to(tl.int64)
    first = pid % tiles_e * ROWS
    offs_e = first + tl.arange(0, ROWS)
    offs_t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)

    pushed = _projected(
        x_ptr + c * stride_c,
        key,
        first,
        offs_t,
        T,
        D,
        stride_t,
        stride_j,
        ROWS,
        BLOCK_T,
        BLOCK_J,
        SIGN_DTYPE,
        PRECISION,
    ).to(PAIR_DTYPE)

    # pair with the columns (r, b) of Q, b fastest, of the repeats r that these rows belong to
    repeat = offs_e // SIZE_OUT
    last = (tl.minimum(first + ROWS, E) - 1) // SIZE_OUT
    p_out = partial_ptr + ((tile_t * C + c) * E + offs_e)[:, None] * SIZE_IN
    for start in range(first // SIZE_OUT * SIZE_IN, (last + 1) * SIZE_IN, BLOCK_F):
        offs_f = start + tl.arange(0, BLOCK_F)
        open_f = offs_f < (last + 1) * SIZE_IN
        p_q = q_ptr + offs_f.to(tl.int64)[None, :] * T + offs_t[:, None]
        q = tl.load(p_q, mask=(offs_t < T)[:, None] & open_f[None, :], other=0.0).to(PAIR_DTYPE)
        paired = tl.dot(pushed, q, input_precision=PRECISION)
        same = (repeat[:, None] == (offs_f // SIZE_IN)[None, :]) & open_f[None, :]
        mask = same & (offs_e < E)[:, None]
        tl.store(p_out + (offs_f % SIZE_IN)[None, :], paired, mask=mask)


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, scale, SIZE, PARTS, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, PARTS):
        total += tl.load(partial_ptr + part * SIZE + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total * scale, mask=mask)


def _config(dtype: torch.dtype, interpreted: bool = False) -> dict[str, Any]:
    """Tiles by operand dtype; chosen for registers and shared memory, not yet timed on a GPU."""
    if dtype == torch.float32 or interpreted:  # the interpreter multiplies bfloat16 as integers
        tiles = {"ROWS": 64, "BLOCK_T": 32, "BLOCK_J": 16, "num_warps": 4}
        return tiles | {"SIGN_DTYPE": tl.float32, "PRECISION": "ieee"}
    tiles = {"ROWS": 128, "BLOCK_T": 64, "BLOCK_J": 64, "num_warps": 8}
    if dtype == torch.bfloat16:
        return tiles | {"SIGN_DTYPE": tl.bfloat16, "PRECISION": "ieee"}
    return tiles | {"SIGN_DTYPE": tl.float16, "PRECISION": "tf32"}


def _pairing(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the inner products, beside the tiles of a projection."""
    bfloat16 = config["SIGN_DTYPE"] == tl.bfloat16
    return {
        "BLOCK_F": 32 if bfloat16 else 16,
        "PAIR_DTYPE": tl.bfloat16 if bfloat16 else tl.float32,
    }


def sketch(activations, grads, size_out, size_in, repeats, key_out, key_in):
    """Launch: (T, d_in), (C, T, d_out), sizes, two seeds → (C, repeats, size_out, size_in)."""
    (c, t, d_out), d_in = grads.shape, activations.shape[1]
    shape = (c, repeats, size_out, size_in)
    if 0 in (c, t, d_out, d_in):
        return grads.new_zeros(shape, dtype=torch.float32)
    config = _config(grads.dtype, not grads.is_cuda)
    pairing = _pairing(config)
    tiles_t = triton.cdiv(t, config["BLOCK_T"])
    rows_in, rows_out = repeats * size_in, repeats * size_out

    projected = grads.new_empty(
        rows_in, t, dtype=torch.bfloat16 if pairing["PAIR_DTYPE"] == tl.bfloat16 else torch.float32
    )
    _project_kernel[(triton.cdiv(rows_in, config["ROWS"]), tiles_t)](
        activations, projected, key_in, t, d_in, rows_in, *activations.stride(), **config
    )
    partial = grads.new_empty(tiles_t, *shape, dtype=torch.float32)
    _sketch_kernel[(c * triton.cdiv(rows_out, config["ROWS"]), tiles_t)](
        grads,
        projected,
        partial,
        key_out,
        c,
        t,
        d_out,
        rows_out,
        size_out,
        size_in,
        *grads.stride(),
        **config,
        **pairing,
    )
    out = grads.new_empty(shape, dtype=torch.float32)
    scale = (size_out * size_in) ** -0.5
    grid = (triton.cdiv(out.numel(), 1024),)
    _sum_kernel[grid](partial, out, scale, out.numel(), tiles_t, BLOCK=1024)
    return out
