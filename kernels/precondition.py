"""Change of a layer's output by a diagonally preconditioned step on each source token.

    E[l, s] = (P ∘ G[l]) a_o[s],  G[l] = Σ_t g_u[l, t] ⊗ a_u[t]

One program per source l, BLOCK_O output features and BLOCK_S observed tokens. It loops over d_in:
it computes a tile of G in registers (dot over t), multiplies it by the tile of P, and applies it at
once (dot over d_in), so that G is never written. G is computed again for each of the S/BLOCK_S
tiles of tokens; a tile therefore has as many tokens as the registers hold. Sources are the fastest
index: programs that run together read the same rows of P, and a_u and a_o, from cache. There 4
bytes of P for 2 (T + BLOCK_S) flops take no time of their own.

Accumulation is in float32, in a fixed order: a source's bits do not depend on the rest of the
batch. G is formed from products in the operands' dtype and applied in bfloat16 for bfloat16, TF32
for float16 (whose range P ∘ G may exceed), IEEE float32 for float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _push_kernel(
    scale_ptr,
    ao_ptr,
    au_ptr,
    gu_ptr,
    out_ptr,
    L,
    S,
    T,
    D_OUT,
    D_IN,
    stride_po,
    stride_pi,
    stride_os,
    stride_oi,
    stride_ut,
    stride_ui,
    stride_gl,
    stride_gt,
    stride_go,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FORM_DTYPE: tl.constexpr,
    APPLY_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # index
    pid = tl.program_id(0)
    pid_l = (pid % L).to(tl.int64)
    offs_o = (pid // L).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_s = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    open_o = (offs_o < D_OUT)[:, None]
    open_s = (offs_s < S)[None, :]

    acc = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
    for start_i in range(0, D_IN, BLOCK_I):
        offs_i = (start_i + tl.arange(0, BLOCK_I)).to(tl.int64)
        open_i = offs_i < D_IN

        # form: G (o, i) = Σ_t g_u (o, t) a_u (t, i)
        formed = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start_t in range(0, T, BLOCK_T):
            offs_t = (start_t + tl.arange(0, BLOCK_T)).to(tl.int64)
            open_t = offs_t < T
            p_g = gu_ptr + pid_l * stride_gl
            p_g += offs_o[:, None] * stride_go + offs_t[None, :] * stride_gt
            g = tl.load(p_g, mask=open_o & open_t[None, :], other=0.0).to(FORM_DTYPE)
            p_u = au_ptr + offs_t[:, None] * stride_ut + offs_i[None, :] * stride_ui
            a = tl.load(p_u, mask=open_t[:, None] & open_i[None, :], other=0.0).to(FORM_DTYPE)
            formed = tl.dot(g, a, formed, input_precision=PRECISION)

        # weigh and apply: E (o, s) += Σ_i (P ∘ G) (o, i) a_o (i, s)
        p_p = scale_ptr + offs_o[:, None] * stride_po + offs_i[None, :] * stride_pi
        scale = tl.load(p_p, mask=open_o & open_i[None, :], other=0.0).to(tl.float32)
        p_o = ao_ptr + offs_i[:, None] * stride_oi + offs_s[None, :] * stride_os
        a = tl.load(p_o, mask=open_i[:, None] & open_s, other=0.0).to(APPLY_DTYPE)
        acc = tl.dot((formed * scale).to(APPLY_DTYPE), a, acc, input_precision=PRECISION)

    p_out = out_ptr + (pid_l * S + offs_s)[None, :] * D_OUT + offs_o[:, None]
    tl.store(p_out, acc, mask=open_o & open_s)


def _config(dtype: torch.dtype, tokens: int, interpreted: bool = False) -> dict[str, Any]:
    """Tiles by operand dtype and observed tokens; for registers, not yet timed on a GPU."""
    tiles = {"BLOCK_S": 64 if tokens <= 64 else 256, "num_warps": 8}
    if dtype == torch.float32 or interpreted:  # the interpreter multiplies bfloat16 as integers
        tiles |= {"BLOCK_O": 32, "BLOCK_I": 16, "BLOCK_T": 16}
        return tiles | {"FORM_DTYPE": tl.float32, "APPLY_DTYPE": tl.float32, "PRECISION": "ieee"}
    tiles |= {"BLOCK_O": 64, "BLOCK_I": 32, "BLOCK_T": 32}
    if dtype == torch.bfloat16:
        return tiles | {"FORM_DTYPE": tl.bfloat16, "APPLY_DTYPE": tl.bfloat16, "PRECISION": "ieee"}
    return tiles | {"FORM_DTYPE": tl.float16, "APPLY_DTYPE": tl.float32, "PRECISION": "tf32"}


def preconditioned_push(scale, activations_o, activations_u, grads_u):
    """Launch: (d_out, d_in), (S, d_in), (T, d_in), (L, T, d_out) → (L, S, d_out) float32."""
    (n, t, d_out), (s, d_in) = grads_u.shape, activations_o.shape
    out = grads_u.new_empty(n, s, d_out, dtype=torch.float32)
    if out.numel():
        config = _config(grads_u.dtype, s, not grads_u.is_cuda)
        grid = (n * triton.cdiv(d_out, config["BLOCK_O"]), triton.cdiv(s, config["BLOCK_S"]))
        _push_kernel[grid](
            scale,
            activations_o,
            activations_u,
            grads_u,
            out,
            n,
            s,
            t,
            d_out,
            d_in,
            *scale.stride(),
            *activations_o.stride(),
            *activations_u.stride(),
            *grads_u.stride(),
            **config,
        )
    return out
