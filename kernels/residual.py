"""Softmax residual e_y - π of each row with its statistics.

    residual[n, v] = 1[v = y] - exp(z_v - z_top) / (1 + tail),   tail = Σ_{v≠top} exp(z_v - z_top)

One program per row, with two loops over blocks of columns: the first merges the blocks' maxima and
sums, the second writes the result. It reads the logits twice and writes 4 bytes per logit, so that
bandwidth is the bound. Sums are float32 and leave the top token out, so that no digits cancel when
π_top → 1; their order is fixed, so that equal inputs have equal bits. The result is NaN for a row
with NaN or +inf, and for a row of -inf only. Of equal logits the lower token is first.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _exp(x):
    """exp(x) for x <= 0 to a few ulp (tl.exp loses |x| ulp: its argument is scaled in float32)."""
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.1219444e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def _log1p(x):
    """log(1 + x) with its digits for small x: the rounding error of 1 + x divides out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _residual_kernel(
    logits_ptr,
    targets_ptr,
    residual_ptr,
    logp_ptr,
    entropy_ptr,
    squared_norm_ptr,
    top_ptr,
    V,
    stride_n,
    stride_v,
    BLOCK_V: tl.constexpr,
):
    # index
    pid_n = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + pid_n * stride_n
    offs = tl.arange(0, BLOCK_V)
    low = -float("inf")

    # first loop: top two, tail, Σ e (z - peak), Σ e², all relative to the running peak
    peak = low
    next_peak = low
    top = tl.zeros((), tl.int64)
    runner = tl.zeros((), tl.int64)
    tail = 0.0
    moment = 0.0
    squares = 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs.to(tl.int64)
        z = tl.load(z_ptr + offs_v * stride_v, mask=offs_v < V, other=low).to(tl.float32)

        # the block's own top two and sums; its top has weight 1 and is left out of the tail
        b_peak = tl.max(z, axis=0)
        b_top = tl.min(tl.where(z == b_peak, offs_v, V), axis=0)
        others = tl.where(offs_v == b_top, low, z)
        b_next = tl.max(others, axis=0)
        b_runner = tl.min(tl.where(others == b_next, offs_v, V), axis=0)
        d = others - tl.where(b_peak == low, 0.0, b_peak)
        e = _exp(d)
        e = tl.where(others == low, 0.0, e)
        b_tail = tl.sum(e, axis=0)
        b_moment = tl.sum(tl.where(others == low, 0.0, e * d), axis=0)
        b_squares = tl.sum(e * e, axis=0)

        # merge: the smaller side is rescaled to the larger peak (a side of -inf alone has weight 0)
        wins = b_peak > peak
        gap = tl.where(wins, peak - b_peak, b_peak - peak)
        empty = (peak == low) | (b_peak == low)
        gap = tl.where(empty, 0.0, gap)
        scale = tl.where(empty, 0.0, _exp(gap))
        less_tail = tl.where(wins, tail, b_tail)
        less_moment = tl.where(wins, moment, b_moment)
        less_squares = tl.where(wins, squares, b_squares)
        tail = tl.where(wins, b_tail, tail) + scale * (1.0 + less_tail)
        moment = tl.where(wins, b_moment, moment) + scale * (less_moment + gap * (1.0 + less_tail))
        squares = tl.where(wins, b_squares, squares) + scale * scale * (1.0 + less_squares)
        # runner-up of {peak, next_peak, b_peak, b_next}; at a tie the earlier block is first
        second = tl.where(wins, tl.where(peak >= b_next, peak, b_next), next_peak)
        second_at = tl.where(wins, tl.where(peak >= b_next, top, b_runner), runner)
        late = (b_peak > next_peak) & (b_peak <= peak)
        next_peak = tl.where(late, b_peak, second)
        runner = tl.where(late, b_top, second_at)
        top = tl.where(wins, b_top, top)
        peak = tl.where(wins, b_peak, peak)

    # statistics
    runner = tl.where(next_peak == low, tl.where(top == 0, 1, 0), runner)
    bad = (peak == low) | (peak == float("inf"))
    tail = tl.where(bad, float("nan"), tail)
    partition = 1.0 + tail
    log_partition = _log1p(tail)
    y = tl.load(targets_ptr + pid_n)
    z_y = tl.load(z_ptr + y * stride_v).to(tl.float32)
    others_of_y = tl.where(y == top, tail, 1.0 + (tail - _exp(z_y - peak)))
    tl.store(logp_ptr + pid_n, (z_y - peak) - log_partition)
    tl.store(entropy_ptr + pid_n, log_partition - moment / partition)
    tl.store(squared_norm_ptr + pid_n, (1.0 + squares) / (partition * partition))
    tl.store(top_ptr + 2 * pid_n, top)
    tl.store(top_ptr + 2 * pid_n + 1, runner)

    # second loop: the residual
    out_ptr = residual_ptr + pid_n * V
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs.to(tl.int64)
        mask_v = offs_v < V
        z = tl.load(z_ptr + offs_v * stride_v, mask=mask_v, other=low).to(tl.float32)
        pi = tl.where(z == low, 0.0, _exp(z - peak)) / partition
        r = tl.where(offs_v == y, others_of_y / partition, -pi)
        tl.store(out_ptr + offs_v, r, mask=mask_v)


def _config(vocabulary: int) -> dict[str, int]:
    """Block size and warps; not measured on a GPU yet, so one size for all."""
    return {"BLOCK_V": min(4096, triton.next_power_of_2(vocabulary)), "num_warps": 8}


def residual(logits, targets):
    """Launch: logits (N, V), targets (N,) → the five results of the op, float32."""
    n, vocabulary = logits.shape
    assert vocabulary >= 2 and targets.is_contiguous()
    out = logits.new_empty(n, vocabulary, dtype=torch.float32)
    logp, entropy, squared_norm = (logits.new_empty(n, dtype=torch.float32) for _ in range(3))
    top = targets.new_empty(n, 2)
    if n:
        _residual_kernel[(n,)](
            logits,
            targets,
            out,
            logp,
            entropy,
            squared_norm,
            top,
            vocabulary,
            *logits.stride(),
            **_config(vocabulary),
        )
    return out, logp, entropy, squared_norm, top


# --------------------------------------------------------------------------- residual_gram


@triton.jit
def _gram_statistics_kernel(
    logits_ptr,
    targets_ptr,
    peak_ptr,
    others_ptr,
    V,
    stride_n,
    stride_v,
    BLOCK_V: tl.constexpr,
):
    """Of all columns but the target's: the largest logit, and Σ exp(z - peak)."""
    pid_n = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + pid_n * stride_n
    offs = tl.arange(0, BLOCK_V)
    low = -float("inf")
    y = tl.load(targets_ptr + pid_n)

    peak = low
    others = 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs.to(tl.int64)
        mask = (offs_v < V) & (offs_v != y)
        z = tl.load(z_ptr + offs_v * stride_v, mask=mask, other=low).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, axis=0))
        level = tl.where(higher == low, 0.0, higher)
        scale = tl.where(peak == low, 0.0, _exp(tl.where(peak == low, 0.0, peak - level)))
        others = others * scale + tl.sum(tl.where(z == low, 0.0, _exp(z - level)), axis=0)
        peak = higher

    own = tl.load(z_ptr + y * stride_v).to(tl.float32)
    peak = tl.where(peak == low, own, peak)  # all others are masked
    bad = (tl.abs(peak) == float("inf")) | (own == float("inf"))
    tl.store(peak_ptr + pid_n, tl.where(bad, float("nan"), peak))
    tl.store(others_ptr + pid_n, others)


@triton.jit
def _gram_weights(z, peak, y, offs_v, mask):
    """Tile of exp(z - peak), 0 for targets, masked tokens and what is outside."""
    z = z.to(tl.float32)
    kept = mask & (offs_v[None, :] != y[:, None]) & (z != -float("inf"))
    return tl.where(kept, _exp(tl.where(kept, z - peak[:, None], 0.0)), 0.0)


@triton.jit
def _gram_kernel(
    logits_o_ptr,
    targets_o_ptr,
    peak_o_ptr,
    logits_u_ptr,
    targets_u_ptr,
    peak_u_ptr,
    out_ptr,
    M,
    L,
    V,
    stride_m,
    stride_mv,
    stride_l,
    stride_lv,
    PER_SPLIT,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Products of unnormalised tiles over one split of the columns."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_l = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    split = tl.program_id(2).to(tl.int64)
    mask_m, mask_l = offs_m < M, offs_l < L
    peak_o = tl.load(peak_o_ptr + offs_m, mask=mask_m, other=0.0)
    peak_u = tl.load(peak_u_ptr + offs_l, mask=mask_l, other=0.0)
    y_o = tl.load(targets_o_ptr + offs_m, mask=mask_m, other=-1)
    y_u = tl.load(targets_u_ptr + offs_l, mask=mask_l, other=-1)

    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    first = split * PER_SPLIT
    for start in range(first, tl.minimum(first + PER_SPLIT, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
        mask_o = mask_m[:, None] & (offs_v < V)[None, :]
        p_o = logits_o_ptr + offs_m[:, None] * stride_m + offs_v[None, :] * stride_mv
        w_o = tl.load(p_o, mask=mask_o, other=0.0)
        w_o = _gram_weights(w_o, peak_o, y_o, offs_v, mask_o)
        mask_u = mask_l[:, None] & (offs_v < V)[None, :]
        p_u = logits_u_ptr + offs_l[:, None] * stride_l + offs_v[None, :] * stride_lv
        w_u = tl.load(p_u, mask=mask_u, other=0.0)
        w_u = _gram_weights(w_u, peak_u, y_u, offs_v, mask_u)
        acc = tl.dot(w_o, tl.trans(w_u), acc, input_precision="tf32x3")
    p_out = out_ptr + (split * M + offs_m)[:, None] * L + offs_l[None, :]
    tl.store(p_out, acc, mask=mask_m[:, None] & mask_l[None, :])


def _gram_config(interpreted: bool = False) -> dict[str, int]:
    """Tiles; three TF32 products keep the digits of float32. Not measured on a GPU yet."""
    block_v = 256 if interpreted else 32
    return {"BLOCK_M": 32, "BLOCK_L": 32, "BLOCK_V": block_v, "num_warps": 4}


def residual_gram(logits_o, targets_o, logits_u, targets_u):
    """Launch: Σ_v w_o w_u over columns, w = exp(z - peak) without targets; and both sides' sums.

    Returns the product (M, L), then (peak, Σ w) of o and of u; `lddyn.ops.residual` finishes.
    """
    sums = []
    for logits, targets in ((logits_o, targets_o), (logits_u, targets_u)):
        n, vocabulary = logits.shape
        peak, others = logits.new_empty(2, n, dtype=torch.float32)
        if n:
            _gram_statistics_kernel[(n,)](
                logits, targets, peak, others, vocabulary, *logits.stride(), **_config(vocabulary)
            )
        sums.append((peak, others))
    (m, vocabulary), n = logits_o.shape, len(logits_u)
    if 0 in (m, n):
        return logits_o.new_zeros(m, n, dtype=torch.float32), *sums

    config = _gram_config(not logits_o.is_cuda)
    blocks_m, blocks_l = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_L"])
    programs = 512 if logits_o.is_cuda else 2  # enough to fill a large GPU a few times over
    tiles = triton.cdiv(vocabulary, config["BLOCK_V"])
    per_split = triton.cdiv(tiles, max(1, programs // (blocks_m * blocks_l)))
    splits = triton.cdiv(tiles, per_split)
    partial = logits_o.new_empty(splits, m, n, dtype=torch.float32)
    _gram_kernel[blocks_m, blocks_l, splits](
        logits_o,
        targets_o,
        sums[0][0],
        logits_u,
        targets_u,
        sums[1][0],
        partial,
        m,
        n,
        vocabulary,
        *logits_o.stride(),
        *logits_u.stride(),
        per_split * config["BLOCK_V"],
        **config,
    )
    return partial.sum(0), *sums
