"""Gated activations, norms and rotary embeddings for many cotangents of one forward pass.

A program loads the forward activations of its position once and applies them to a tile of GROUP
cotangents; in the pullback of norms it applies those of several positions to one cotangent. Every
element of the batch is read once and written once, so that bandwidth is the bound. Arithmetic is in
float32, and results are rounded once. Tiles depend on the length of a row only, and sums run in a
fixed order: a cotangent has the same bits alone and in a batch.
"""

from typing import Any

import triton
import triton.language as tl

# --------------------------------------------------------------------------- gated activations


@triton.jit
def _gated_pullback_kernel(
    value_ptr,
    slope_ptr,
    grads_ptr,
    gate_ptr,
    up_ptr,
    C,
    T,
    N,
    stride_c,
    stride_t,
    stride_n,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    pid_t = tl.program_id(0).to(tl.int64) // tiles
    offs_n = tl.program_id(0).to(tl.int64) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask_n = offs_n < N
    mask = (offs_c < C)[:, None] & mask_n[None, :]

    value = tl.load(value_ptr + pid_t * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    slope = tl.load(slope_ptr + pid_t * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    p_grads = grads_ptr + offs_c[:, None] * stride_c + pid_t * stride_t + offs_n[None, :] * stride_n
    grads = tl.load(p_grads, mask=mask, other=0.0).to(tl.float32)
    out = (offs_c[:, None] * T + pid_t) * N + offs_n[None, :]
    tl.store(gate_ptr + out, (grads * slope[None, :]).to(gate_ptr.dtype.element_ty), mask=mask)
    tl.store(up_ptr + out, (grads * value[None, :]).to(up_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_pushforward_kernel(
    value_ptr,
    slope_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    C,
    T,
    N,
    stride_gc,
    stride_gt,
    stride_gn,
    stride_uc,
    stride_ut,
    stride_un,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    pid_t = tl.program_id(0).to(tl.int64) // tiles
    offs_n = tl.program_id(0).to(tl.int64) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask_n = offs_n < N
    mask = (offs_c < C)[:, None] & mask_n[None, :]

    value = tl.load(value_ptr + pid_t * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    slope = tl.load(slope_ptr + pid_t * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    p_gate = gate_ptr + offs_c[:, None] * stride_gc + pid_t * stride_gt
    gate = tl.load(p_gate + offs_n[None, :] * stride_gn, mask=mask, other=0.0).to(tl.float32)
    p_up = up_ptr + offs_c[:, None] * stride_uc + pid_t * stride_ut
    up = tl.load(p_up + offs_n[None, :] * stride_un, mask=mask, other=0.0).to(tl.float32)
    moved = gate * slope[None, :] + up * value[None, :]
    p_out = out_ptr + (offs_c[:, None] * T + pid_t) * N + offs_n[None, :]
    tl.store(p_out, moved.to(out_ptr.dtype.element_ty), mask=mask)


def _config(columns: int) -> dict[str, Any]:
    """Cotangents and columns of a tile; not measured on a GPU yet."""
    return {
        "GROUP": 4,
        "BLOCK_N": min(256, triton.next_power_of_2(columns)),
        "num_warps": 4,
    }


def gated_pullback(value, slope, grads):
    """Launch: (T, n), (T, n), (C, T, n) → two of (C, T, n)."""
    gate, up = grads.new_empty(grads.shape), grads.new_empty(grads.shape)
    if grads.numel():
        c, t, n = grads.shape
        config = _config(n)
        grid = t * triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(c, config["GROUP"])
        _gated_pullback_kernel[grid](
            value.contiguous(),
            slope.contiguous(),
            grads,
            gate,
            up,
            *grads.shape,
            *grads.stride(),
            **config,
        )
    return gate, up


def gated_pushforward(value, slope, gate, up):
    """Launch: (T, n), (T, n), (C, T, n), (C, T, n) → (C, T, n)."""
    out = gate.new_empty(gate.shape)
    if gate.numel():
        c, t, n = gate.shape
        config = _config(n)
        grid = t * triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(c, config["GROUP"])
        _gated_pushforward_kernel[grid](
            value.contiguous(),
            slope.contiguous(),
            gate,
            up,
            out,
            *gate.shape,
            *gate.stride(),
            *up.stride(),
            **config,
        )
    return out


# --------------------------------------------------------------------------- norms


@triton.jit
def _norm_pullback_kernel(
    normalized_ptr,
    rstd_ptr,
    weight_ptr,
    grads_ptr,
    grad_input_ptr,
    partial_ptr,
    C,
    T,
    N,
    stride_c,
    stride_t,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # index: one cotangent on ROWS positions, whole rows in registers. Programs with the same
    # positions are neighbours, so that x_hat comes from L2. Registers hold the sum instead of a
    # tile of cotangents
    pid_c = tl.program_id(0).to(tl.int64)
    pid_slab = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    mask = offs < N

    grad_weight = tl.zeros((BLOCK_N,), tl.float32)
    first = pid_slab * ROWS
    for t in range(first, tl.minimum(first + ROWS, T)):
        hat = tl.load(normalized_ptr + t * N + offs, mask=mask, other=0.0).to(tl.float32)
        p_grads = grads_ptr + (pid_c * stride_c + t * stride_t)
        grads = tl.load(p_grads + offs, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        v = grads * weight
        moved = v - hat * (tl.sum(v * hat, axis=0) / N)
        if CENTRED:
            moved -= tl.sum(v, axis=0) / N
        moved *= tl.load(rstd_ptr + t)
        p_out = grad_input_ptr + (pid_c * T + t) * N
        tl.store(p_out + offs, moved.to(grad_input_ptr.dtype.element_ty), mask=mask)
        grad_weight += grads * hat
    p_partial = partial_ptr + (pid_slab * C + pid_c) * N
    tl.store(p_partial + offs, grad_weight, mask=mask)


@triton.jit
def _norm_pushforward_kernel(
    normalized_ptr,
    rstd_ptr,
    weight_ptr,
    tangents_ptr,
    out_ptr,
    C,
    T,
    N,
    stride_c,
    stride_t,
    CENTRED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_c < C)[:, None] & mask_n[None, :]

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    hat = tl.load(normalized_ptr + pid_t * N + offs_n, mask=mask_n, other=0.0)
    hat = hat.to(tl.float32)[None, :]
    p_v = tangents_ptr + offs_c[:, None] * stride_c + pid_t * stride_t + offs_n[None, :]
    v = tl.load(p_v, mask=mask, other=0.0).to(tl.float32)
    moved = v - hat * (tl.sum(v * hat, axis=1) / N)[:, None]
    if CENTRED:
        moved -= (tl.sum(v, axis=1) / N)[:, None]
    moved *= tl.load(rstd_ptr + pid_t) * weight
    p_out = out_ptr + (offs_c[:, None] * T + pid_t) * N + offs_n[None, :]
    tl.store(p_out, moved.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, SLABS, SIZE, BLOCK: tl.constexpr):
    """Sum of the slabs, in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    p_partial = partial_ptr + offs
    for _ in range(0, SLABS):
        total += tl.load(p_partial, mask=mask, other=0.0)
        p_partial += SIZE
    tl.store(out_ptr + offs, total, mask=mask)


def _pullback_config(columns: int) -> dict[str, Any]:
    """Whole rows in registers, 8 elements a thread up to 8,192 columns."""
    block = max(16, triton.next_power_of_2(columns))
    return {"ROWS": 16, "BLOCK_N": block, "num_warps": max(1, min(32, block // 256))}


def _pushforward_config(columns: int) -> dict[str, Any]:
    """Whole rows in registers, up to 4 cotangents, 8 elements a thread up to 8,192 columns."""
    block = max(16, triton.next_power_of_2(columns))
    group = max(1, min(4, 2048 // block))
    return {"GROUP": group, "BLOCK_N": block, "num_warps": max(1, min(32, group * block // 256))}


def norm_pullback(normalized, rstd, weight, grads, centred):
    """Launch: (T, n), (T), (n), (C, T, n) → (C, T, n) and (C, n) float32."""
    grads = grads if grads.stride(2) == 1 else grads.contiguous()
    grad_input = grads.new_empty(grads.shape)
    c, t, n = grads.shape
    if not grads.numel():
        return grad_input, rstd.new_zeros(c, n)
    config = _pullback_config(n)
    slabs = triton.cdiv(t, config["ROWS"])
    partial = rstd.new_empty(slabs, c, n)
    _norm_pullback_kernel[c, slabs](
        normalized.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
        grads,
        grad_input,
        partial,
        *grads.shape,
        *grads.stride()[:2],
        CENTRED=centred,
        **config,
    )
    if slabs == 1:
        return grad_input, partial[0]
    grad_weight = partial.new_empty(c, n)
    _sum_kernel[(triton.cdiv(c * n, 1024),)](partial, grad_weight, slabs, c * n, BLOCK=1024)
    return grad_input, grad_weight


def norm_pushforward(normalized, rstd, weight, tangents, centred):
    """Launch: (T, n), (T), (n), (C, T, n) → (C, T, n)."""
    tangents = tangents if tangents.stride(2) == 1 else tangents.contiguous()
    out = tangents.new_empty(tangents.shape)
    c, t, n = tangents.shape
    if tangents.numel():
        config = _pushforward_config(n)
        _norm_pushforward_kernel[t, triton.cdiv(c, config["GROUP"])](
            normalized.contiguous(),
            rstd.contiguous(),
            weight.contiguous(),
            tangents,
            out,
            *tangents.shape,
            *tangents.stride()[:2],
            CENTRED=centred,
            **config,
        )
    return out


# --------------------------------------------------------------------------- rotary embedding


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    C,
    H,
    T,
    E,
    stride_c,
    stride_h,
    stride_t,
    stride_e,
    TRANSPOSE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # index: one position, GROUP rows (c, h), both halves of each
    pid_t = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    half = E // 2
    offs = tl.arange(0, BLOCK_E).to(tl.int64)
    mask_e = offs < half
    mask = (rows < C * H)[:, None] & mask_e[None, :]

    angle = pid_t * E + offs
    cos_1 = tl.load(cos_ptr + angle, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + angle + half, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + angle, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + angle + half, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    p_x = x_ptr + (rows // H * stride_c + rows % H * stride_h)[:, None] + pid_t * stride_t
    x_1 = tl.load(p_x + offs[None, :] * stride_e, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(p_x + (offs + half)[None, :] * stride_e, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSE:
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
    p_out = out_ptr + ((rows // H * T + pid_t) * H + rows % H)[:, None] * E + offs[None, :]
    tl.store(p_out, y_1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(p_out + half, y_2.to(out_ptr.dtype.element_ty), mask=mask)


def _rotary_config(size: int) -> dict[str, Any]:
    """Tiles of about 1,024 pairs; not measured on a GPU yet."""
    block = triton.next_power_of_2(size // 2)
    return {"GROUP": max(1, 1024 // block), "BLOCK_E": block, "num_warps": 4}


def rotary(x, cos, sin, transpose):
    """Launch: (C, H, T, e), (T, e), (T, e) → (C, H, T, e), laid out as (C, T, H, e)."""
    c, h, t, e = x.shape
    out = x.new_empty(c, t, h, e)
    if x.numel():
        config = _rotary_config(e)
        _rotary_kernel[t, triton.cdiv(c * h, config["GROUP"])](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            *x.shape,
            *x.stride(),
            TRANSPOSE=transpose,
            **config,
        )
    return out.transpose(1, 2)
