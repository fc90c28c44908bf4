"""Attention for many cotangents or tangents that share one forward.

    pullback     dS = scale cap' ∘ P ∘ (dO Vᵀ − rowsum(dO ∘ O)),  dQ = dS K,  dK = dSᵀ Q,
                 dV = Pᵀ dO
    pushforward  Ṡ = scale cap' ∘ (Q̇ Kᵀ + Q K̇ᵀ),  Ȯ = P ∘ (Ṡ − rowsum(P ∘ Ṡ)) V + P V̇

One kernel computes O and the log-sum-exp of every row of scores. The others compute each tile of P
once from it and use it for BLOCK_C cotangents. Cotangents lie next to queries, c fastest: a product
with K or V has the rows (t, c), a product that sums over queries has the columns (c, s) or (c, f),
and a reshape turns one layout into the other. A program computes dQ or Ȯ of a tile of queries, or
dK and dV of a tile of keys, for which it loops over the heads of the group: there are no atomics,
and equal inputs have equal bits. A tile is skipped if it lies before the first or after the last
open key of its queries (or query of its keys), which covers causal masks, windows and padding.

Accumulation is in float32. Products are in bfloat16 for bfloat16. For float16, products of P and of
operands are in float16, products of dS in TF32, which holds all 11 bits; dS may be below the range
of float16. For float32, each product is three TF32 products, which have float32's accuracy.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Tangent hyperbolic to a few ulp (Cephes), also where 1 − 2/(exp(2x) + 1) cancels."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(z < 0.390625, x + x * z * p, tl.where(x < 0, -large, large))


@triton.jit
def _rows(ptr, offs, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Contiguous rows that begin at `offs`, of WIDTH elements, padded with zeros to BLOCK."""
    col = tl.arange(0, BLOCK)
    mask = valid[:, None] & (col < WIDTH)[None, :]
    return tl.load(ptr + offs[:, None] + col[None, :], mask=mask, other=0.0)


@triton.jit
def _put(ptr, offs, valid, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store x to contiguous rows that begin at `offs`, of WIDTH elements."""
    col = tl.arange(0, BLOCK)
    tl.store(ptr + offs[:, None] + col[None, :], x, mask=valid[:, None] & (col < WIDTH)[None, :])


@triton.jit
def _scores(
    q,
    k,
    mask_ptr,
    offs_t,
    offs_s,
    T,
    S,
    stride_mt,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Masked scores (t, s), −inf where closed, and their slope scale cap' in Q Kᵀ."""
    inside = (offs_t < T)[:, None] & (offs_s < S)[None, :]
    p_mask = mask_ptr + offs_t[:, None] * stride_mt + offs_s[None, :]
    bias = tl.load(p_mask, mask=inside, other=-float("inf")).to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    slope = tl.full(scores.shape, 1.0, tl.float32) * scale
    if CAPPED:
        bent = _tanh(scores / softcap)
        scores = softcap * bent
        slope *= 1.0 - bent * bent
    return tl.where(bias <= -1e4, -float("inf"), scores + bias), slope


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    first_ptr,
    end_ptr,
    out_ptr,
    lse_ptr,
    T,
    S,
    REPEAT,
    stride_mh,
    stride_mt,
    stride_span,
    scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CAPPED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O (H, T, f) and lse (H, T), float32, of a tile of queries; 0 and +inf if no key is open."""
    # index
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    group = head // REPEAT
    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    q = _rows(q_ptr, (head * T + offs_t) * E, offs_t < T, E, BLOCK_E).to(DOT_DTYPE)
    mask_ptr += head * stride_mh

    peak = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    rounded = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    span = head * stride_span + tile
    for start in range(tl.load(first_ptr + span), tl.load(end_ptr + span), BLOCK_S):
        offs_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        k = _rows(k_ptr, (group * S + offs_s) * E, offs_s < S, E, BLOCK_E).to(DOT_DTYPE)
        v = _rows(v_ptr, (group * S + offs_s) * F, offs_s < S, F, BLOCK_F).to(DOT_DTYPE)
        scores, _ = _scores(
            q,
            k,
            mask_ptr,
            offs_t,
            offs_s,
            T,
            S,
            stride_mt,
            scale,
            softcap,
            CAPPED,
            PRECISION,
        )
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        shrink = tl.exp(peak - safe)
        p = tl.exp(scores - safe[:, None])
        p_dot = p.to(DOT_DTYPE)
        total = total * shrink + tl.sum(p, 1)
        # O is divided by the sum of the rounded P that its products used: then a constant V gives
        # exactly this constant.
        rounded = rounded * shrink + tl.sum(p_dot.to(tl.float32), 1)
        acc = tl.dot(p_dot, v, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, rounded)[:, None]
    _put(out_ptr, (head * T + offs_t) * F, offs_t < T, out, F, BLOCK_F)
    lse = tl.where(empty, float("inf"), peak + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + head * T + offs_t, lse, mask=offs_t < T)


@triton.jit
def _pullback_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    first_ptr,
    end_ptr,
    o_ptr,
    lse_ptr,
    grads_ptr,
    out_ptr,
    delta_ptr,
    T,
    S,
    REPEAT,
    C,
    H,
    stride_mh,
    stride_mt,
    stride_span,
    stride_gc,
    stride_gh,
    stride_gt,
    scale,
    softcap,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CAPPED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPREAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The dQ (C, H, T, e) of a tile of queries, and rowsum(dO ∘ O) (C, H, T) float32."""
    # index; rows are (t, c)
    tile = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)  # if causal, the longest first
    head = tl.program_id(1).to(tl.int64)
    group = head // REPEAT
    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.arange(0, BLOCK_T * BLOCK_C)
    row_t = tile * BLOCK_T + row // BLOCK_C
    row_c = tl.program_id(2).to(tl.int64) * BLOCK_C + row % BLOCK_C
    valid = (row_t < T) & (row_c < C)
    row_out = (row_c * H + head) * T + row_t
    mask_ptr += head * stride_mh

    q = _rows(q_ptr, (head * T + offs_t) * E, offs_t < T, E, BLOCK_E).to(DOT_DTYPE)
    lse = tl.load(lse_ptr + head * T + offs_t, mask=offs_t < T, other=float("inf"))
    offs_g = row_c * stride_gc + head * stride_gh + row_t * stride_gt
    g = _rows(grads_ptr, offs_g, valid, F, BLOCK_F)
    o = _rows(o_ptr, (head * T + row_t) * F, valid, F, BLOCK_F)
    delta = tl.sum(g.to(tl.float32) * o, 1)
    tl.store(delta_ptr + row_out, delta, mask=valid)
    g = g.to(DOT_DTYPE)

    acc = tl.zeros((BLOCK_T * BLOCK_C, BLOCK_E), tl.float32)
    span = head * stride_span + tile
    for start in range(tl.load(first_ptr + span), tl.load(end_ptr + span), BLOCK_S):
        offs_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        k = _rows(k_ptr, (group * S + offs_s) * E, offs_s < S, E, BLOCK_E).to(DOT_DTYPE)
        v = _rows(v_ptr, (group * S + offs_s) * F, offs_s < S, F, BLOCK_F).to(DOT_DTYPE)
        scores, slope = _scores(
            q,
            k,
            mask_ptr,
            offs_t,
            offs_s,
            T,
            S,
            stride_mt,
            scale,
            softcap,
            CAPPED,
            PRECISION,
        )
        weight = tl.exp(scores - lse[:, None]) * slope
        moved = tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        moved = tl.reshape(moved, (BLOCK_T, BLOCK_C, BLOCK_S)) * weight[:, None, :]
        moved = tl.reshape(moved, (BLOCK_T * BLOCK_C, BLOCK_S)).to(SPREAD_DTYPE)
        acc = tl.dot(moved, k.to(SPREAD_DTYPE), acc, input_precision=PRECISION)
    _put(out_ptr, row_out * E, valid, acc, E, BLOCK_E)


@triton.jit
def _pullback_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    first_ptr,
    end_ptr,
    delta_ptr,
    lse_ptr,
    grads_ptr,
    key_out_ptr,
    value_out_ptr,
    T,
    S,
    REPEAT,
    C,
    H,
    stride_mh,
    stride_mt,
    stride_span,
    stride_gc,
    stride_gh,
    stride_gt,
    scale,
    softcap,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CAPPED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPREAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The dK (C, G, S, e) and dV (C, G, S, f) of a tile of keys, over the heads of its group."""
    # index; rows are (t, c), columns (c, s) or (c, f)
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    start_c = tl.program_id(2).to(tl.int64) * BLOCK_C
    offs_s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.arange(0, BLOCK_T * BLOCK_C)
    row_c = start_c + row % BLOCK_C
    k = _rows(k_ptr, (group * S + offs_s) * E, offs_s < S, E, BLOCK_E).to(DOT_DTYPE)
    v = _rows(v_ptr, (group * S + offs_s) * F, offs_s < S, F, BLOCK_F).to(DOT_DTYPE)

    acc_k = tl.zeros((BLOCK_E, BLOCK_C * BLOCK_S), tl.float32)  # dKᵀ
    acc_v = tl.zeros((BLOCK_S, BLOCK_C * BLOCK_F), tl.float32)
    for head in range(group * REPEAT, (group + 1) * REPEAT):
        span = head * stride_span + tile
        for start in range(tl.load(first_ptr + span), tl.load(end_ptr + span), BLOCK_T):
            offs_t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            row_t = (start + row // BLOCK_C).to(tl.int64)
            valid = (row_t < T) & (row_c < C)
            q = _rows(q_ptr, (head * T + offs_t) * E, offs_t < T, E, BLOCK_E).to(DOT_DTYPE)
            lse = tl.load(lse_ptr + head * T + offs_t, mask=offs_t < T, other=float("inf"))
            offs_g = row_c * stride_gc + head * stride_gh + row_t * stride_gt
            g = _rows(grads_ptr, offs_g, valid, F, BLOCK_F).to(DOT_DTYPE)
            delta = tl.load(delta_ptr + (row_c * H + head) * T + row_t, mask=valid, other=0.0)
            scores, slope = _scores(
                q,
                k,
                mask_ptr + head * stride_mh,
                offs_t,
                offs_s,
                T,
                S,
                stride_mt,
                scale,
                softcap,
                CAPPED,
                PRECISION,
            )
            p = tl.exp(scores - lse[:, None])
            moved = tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            moved = tl.reshape(moved, (BLOCK_T, BLOCK_C, BLOCK_S)) * (p * slope)[:, None, :]
            moved = tl.reshape(moved, (BLOCK_T, BLOCK_C * BLOCK_S)).to(SPREAD_DTYPE)
            acc_k = tl.dot(tl.trans(q.to(SPREAD_DTYPE)), moved, acc_k, input_precision=PRECISION)
            g = tl.reshape(g, (BLOCK_T, BLOCK_C * BLOCK_F))
            acc_v = tl.dot(tl.trans(p.to(DOT_DTYPE)), g, acc_v, input_precision=PRECISION)

    col = tl.arange(0, BLOCK_C * BLOCK_S)
    col_c = start_c + col // BLOCK_S
    col_s = tile * BLOCK_S + col % BLOCK_S
    offs_k = ((col_c * tl.num_programs(1) + group) * S + col_s) * E
    _put(key_out_ptr, offs_k, (col_c < C) & (col_s < S), tl.trans(acc_k), E, BLOCK_E)
    col = tl.arange(0, BLOCK_C * BLOCK_F)
    col_c = start_c + col // BLOCK_F
    col_f = col % BLOCK_F
    offs_v = (col_c * tl.num_programs(1) + group) * S * F + col_f
    mask_v = (offs_s < S)[:, None] & ((col_c < C) & (col_f < F))[None, :]
    tl.store(value_out_ptr + offs_s[:, None] * F + offs_v[None, :], acc_v, mask=mask_v)


@triton.jit
def _pushforward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    first_ptr,
    end_ptr,
    o_ptr,
    lse_ptr,
    tq_ptr,
    tk_ptr,
    tv_ptr,
    out_ptr,
    T,
    S,
    REPEAT,
    C,
    H,
    stride_mh,
    stride_mt,
    stride_span,
    stride_qc,
    stride_qh,
    stride_qt,
    stride_kc,
    stride_kg,
    stride_ks,
    stride_vc,
    stride_vg,
    stride_vs,
    scale,
    softcap,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CAPPED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPREAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Ȯ (C, H, T, f) of a tile of queries.

    P ∘ (Ṡ − rowsum(P ∘ Ṡ)) does not change if a number a is subtracted from a row of Ṡ. With a the
    mean over the first tile, the common part of the row is removed before anything is rounded.
    """
    # index; rows are (t, c), columns (c, s) or (c, f)
    tile = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)  # if causal, the longest first
    head = tl.program_id(1).to(tl.int64)
    group = head // REPEAT
    start_c = tl.program_id(2).to(tl.int64) * BLOCK_C
    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.arange(0, BLOCK_T * BLOCK_C)
    row_t = tile * BLOCK_T + row // BLOCK_C
    row_c = start_c + row % BLOCK_C
    valid = (row_t < T) & (row_c < C)
    col = tl.arange(0, BLOCK_C * BLOCK_S)
    col_c = start_c + col // BLOCK_S
    col_v = tl.arange(0, BLOCK_C * BLOCK_F)
    col_vc = start_c + col_v // BLOCK_F
    col_vf = col_v % BLOCK_F
    offs_vcf = col_vc * stride_vc + col_vf + group * stride_vg
    mask_ptr += head * stride_mh

    q = _rows(q_ptr, (head * T + offs_t) * E, offs_t < T, E, BLOCK_E).to(DOT_DTYPE)
    lse = tl.load(lse_ptr + head * T + offs_t, mask=offs_t < T, other=float("inf"))
    offs_q = row_c * stride_qc + head * stride_qh + row_t * stride_qt
    tq = _rows(tq_ptr, offs_q, valid, E, BLOCK_E).to(DOT_DTYPE)

    acc = tl.zeros((BLOCK_T * BLOCK_C, BLOCK_F), tl.float32)  # P ∘ (Ṡ − a) V
    acc_v = tl.zeros((BLOCK_T, BLOCK_C * BLOCK_F), tl.float32)  # P V̇
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)  # rowsum(P ∘ (Ṡ − a))
    common = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)  # a
    span = head * stride_span + tile
    first = tl.load(first_ptr + span)
    for start in range(first, tl.load(end_ptr + span), BLOCK_S):
        offs_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        k = _rows(k_ptr, (group * S + offs_s) * E, offs_s < S, E, BLOCK_E).to(DOT_DTYPE)
        v = _rows(v_ptr, (group * S + offs_s) * F, offs_s < S, F, BLOCK_F).to(SPREAD_DTYPE)
        scores, slope = _scores(
            q,
            k,
            mask_ptr,
            offs_t,
            offs_s,
            T,
            S,
            stride_mt,
            scale,
            softcap,
            CAPPED,
            PRECISION,
        )
        p = tl.exp(scores - lse[:, None])

        col_s = (start + col % BLOCK_S).to(tl.int64)
        offs_k = col_c * stride_kc + group * stride_kg + col_s * stride_ks
        tk = _rows(tk_ptr, offs_k, (col_c < C) & (col_s < S), E, BLOCK_E).to(DOT_DTYPE)
        moved = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        moved_k = tl.dot(q, tl.trans(tk), input_precision=PRECISION)
        moved = tl.reshape(moved, (BLOCK_T, BLOCK_C, BLOCK_S))
        moved += tl.reshape(moved_k, (BLOCK_T, BLOCK_C, BLOCK_S))
        moved *= slope[:, None, :]
        if start == first:
            opened = (scores > -float("inf")).to(tl.float32)
            count = tl.maximum(tl.sum(opened, 1), 1.0)
            common = tl.sum(moved * opened[:, None, :], 2) / count[:, None]
        moved = (moved - common[:, :, None]) * p[:, None, :]
        total += tl.sum(moved, 2)
        moved = tl.reshape(moved, (BLOCK_T * BLOCK_C, BLOCK_S)).to(SPREAD_DTYPE)
        acc = tl.dot(moved, v, acc, input_precision=PRECISION)

        mask_v = (offs_s < S)[:, None] & ((col_vc < C) & (col_vf < F))[None, :]
        p_v = tv_ptr + offs_s[:, None] * stride_vs + offs_vcf[None, :]
        tv = tl.load(p_v, mask=mask_v, other=0.0).to(DOT_DTYPE)
        acc_v = tl.dot(p.to(DOT_DTYPE), tv, acc_v, input_precision=PRECISION)

    o = _rows(o_ptr, (head * T + row_t) * F, valid, F, BLOCK_F)
    acc -= o * tl.reshape(total, (BLOCK_T * BLOCK_C,))[:, None]
    acc += tl.reshape(acc_v, (BLOCK_T * BLOCK_C, BLOCK_F))
    _put(out_ptr, ((row_c * H + head) * T + row_t) * F, valid, acc, F, BLOCK_F)


Config = dict[str, Any]


def _config(kernel: str, dtype: torch.dtype, e: int, f: int, count: int, capability: int) -> Config:
    """Tiles of a kernel by dtype, head widths, cotangents and chip (80, 90, …; 0: interpreted).

    Chosen so that registers suffice (on sm_80 they also hold operands); not yet timed on a GPU.
    """
    block_e, block_f = (max(16, triton.next_power_of_2(x)) for x in (e, f))
    config: Config = {"E": e, "F": f, "BLOCK_E": block_e, "BLOCK_F": block_f}
    if dtype == torch.float32 or not capability:  # the interpreter multiplies bfloat16 as integers
        config |= {"DOT_DTYPE": tl.float32, "SPREAD_DTYPE": tl.float32, "PRECISION": "tf32x3"}
    elif dtype == torch.bfloat16:
        config |= {"DOT_DTYPE": tl.bfloat16, "SPREAD_DTYPE": tl.bfloat16, "PRECISION": "tf32"}
    else:
        config |= {"DOT_DTYPE": tl.float16, "SPREAD_DTYPE": tl.float32, "PRECISION": "tf32"}

    width = max(block_e, block_f, 64)
    new = capability >= 90
    if dtype == torch.float32 or width > 128:
        tile_t, tile_s, columns, stages = {
            "forward": (32, 32, 0, 2),
            "pullback_query": (32, 16, 128, 2),
            "pullback_key": (16, 32, 64, 2 if new else 1),
            "pushforward": (16, 32, 64, 2),
        }[kernel]
    else:
        tile_t, tile_s, columns, stages = {
            "forward": (64, 64, 0, 3),
            "pullback_query": (64 if new else 32, 32, 256, 3),
            "pullback_key": (32, 64, 128, 3 if new else 1),
            "pushforward": (64 if new else 32, 32, 128, 3),
        }[kernel]
    block_c = min(columns // width, triton.next_power_of_2(count))
    if not capability:
        tile_t, tile_s, block_c = 16, 16, min(2, count)
    config |= {"BLOCK_T": tile_t, "BLOCK_S": tile_s, "num_warps": 8, "num_stages": stages}
    if kernel == "forward":
        del config["SPREAD_DTYPE"]
    else:
        config["BLOCK_C"] = max(1, block_c)
    return config


def _spans(opened, block, other):
    """First and end of the columns open to each tile of `block` rows of (H, rows, cols), int32.

    The first is rounded down to a multiple of `other`; both are 0 if no column is open.
    """
    heads, rows, cols = opened.shape
    opened = torch.nn.functional.pad(opened, (0, 0, 0, -rows % block))
    opened = opened.view(heads, -1, block, cols).any(2).to(torch.uint8)
    first, last = opened.argmax(2), cols - 1 - opened.flip(2).argmax(2)
    first, end = first // other * other, (last + 1) * opened.any(2)
    return first.int(), end.int()


def _capability(x) -> int:
    """80 for sm_80 and so on; 0 on CPU, where kernels are interpreted."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _unit(x):
    """The tensor itself if its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Forward:
    """The part that all launches share: contiguous operands, O and lse, and the launch itself."""

    def __init__(self, query, key, value, mask, scale: float, softcap: float, count: int):
        (heads, t, _), (groups, s, f) = query.shape, value.shape
        self.operands = [x.contiguous() for x in (query, key, value)]
        self.mask = _unit(mask).expand(heads, t, s)
        self.opened = mask > -1e4
        self.count, self.capability = count, _capability(query)
        self.sizes = (t, s, heads // groups)
        self.bend = (scale, softcap)
        self.out = query.new_empty(heads, t, f, dtype=torch.float32)
        self.lse = query.new_empty(heads, t, dtype=torch.float32)
        self.launch("forward", _forward_kernel, (heads,), [self.out, self.lse], ())

    def config(self, kernel: str) -> Config:
        query, _, value = self.operands
        widths = query.shape[-1], value.shape[-1]
        return _config(kernel, query.dtype, *widths, self.count, self.capability)

    def launch(self, name: str, kernel, grid, tensors, strides, of_keys: bool = False) -> None:
        """Launch over (tiles, *grid), with the tensors after the operands."""
        config = self.config(name) | {"CAPPED": self.bend[1] != 0}
        if of_keys:
            spans = _spans(self.opened.mT, config["BLOCK_S"], config["BLOCK_T"])
        else:
            spans = _spans(self.opened, config["BLOCK_T"], config["BLOCK_S"])
        first, end = spans
        span = first.stride(0) if len(first) > 1 else 0
        kernel[(first.shape[1], *grid)](
            *self.operands,
            self.mask,
            first,
            end,
            *tensors,
            *self.sizes,
            *((self.count, len(self.operands[0])) if strides else ()),
            *self.mask.stride()[:2],
            span,
            *strides,
            *self.bend,
            **config,
        )


def attention_pullback(query, key, value, mask, grads, scale, softcap):
    """Launch: (H, T, e), (G, S, e), (G, S, f), (1 or H, T, S), (C, H, T, f) → dQ, dK, dV."""
    count, heads, groups = len(grads), len(query), len(key)
    results = [grads.new_empty(count, *x.shape) for x in (query, key, value)]
    if 0 in (grads.numel(), key.shape[1]):
        return tuple(x.zero_() for x in results)
    forward = _Forward(query, key, value, mask, scale, softcap, count)
    delta = grads.new_empty(grads.shape[:3], dtype=torch.float32)
    grads = _unit(grads)
    strides = grads.stride()[:3]

    name = "pullback_query"
    blocks = triton.cdiv(count, forward.config(name)["BLOCK_C"])
    tensors = [forward.out, forward.lse, grads, results[0], delta]
    forward.launch(name, _pullback_query_kernel, (heads, blocks), tensors, strides)
    name = "pullback_key"
    blocks = triton.cdiv(count, forward.config(name)["BLOCK_C"])
    tensors = [delta, forward.lse, grads, results[1], results[2]]
    forward.launch(name, _pullback_key_kernel, (groups, blocks), tensors, strides, of_keys=True)
    return tuple(results)


def attention_pushforward(
    query, key, value, mask, tangent_query, tangent_key, tangent_value, scale, softcap
):
    """Launch: the forward's operands and their tangents (C, …) → Ȯ (C, H, T, f)."""
    count, heads, t, _ = tangent_query.shape
    out = tangent_query.new_empty(count, heads, t, value.shape[2])
    if 0 in (out.numel(), key.shape[1]):
        return out.zero_()
    forward = _Forward(query, key, value, mask, scale, softcap, count)
    tangents = [_unit(x) for x in (tangent_query, tangent_key, tangent_value)]
    strides = [step for x in tangents for step in x.stride()[:3]]
    blocks = triton.cdiv(count, forward.config("pushforward")["BLOCK_C"])
    tensors = [forward.out, forward.lse, *tangents, out]
    forward.launch("pushforward", _pushforward_kernel, (heads, blocks), tensors, strides)
    return out
