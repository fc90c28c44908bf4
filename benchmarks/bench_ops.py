"""Each op against what a user would write without it: ``pytest benchmarks``."""

import pytest
import torch

import lddyn
from lddyn import ops, reference

# (N, V): a toy vocabulary, Llama 2, Qwen 2.5.
RESIDUAL_SIZES = [(64, 2_048), (64, 32_000), (32, 151_936)]
# (S = T, M = L, d_in, d_out): shapes of small models on CPU, then a LoRA factor.
GRAM_SIZES = [
    (96, 64, 64, 64),
    (128, 64, 256, 256),
    (256, 16, 1024, 256),
    (512, 8, 1024, 1024),
    (512, 64, 256, 256),
    (128, 64, 8, 1024),
]


# (C, H, G, T, e): short and wide, long, grouped keys.
ATTENTION_SIZES = [(64, 8, 8, 128, 64), (16, 4, 4, 512, 64), (16, 8, 2, 256, 64)]
# (C, T, d_in, d_out, size of each side).
SKETCH_SIZES = [(64, 128, 256, 256, 16), (32, 128, 1024, 512, 16)]
# (L, S = T, d_in, d_out).
PRECONDITION_SIZES = [(16, 128, 512, 512), (8, 128, 1024, 1024), (8, 512, 512, 512)]
# (M = L, V): few and many rows of Qwen 2.5's vocabulary.
RESIDUAL_GRAM_SIZES = [(16, 151_936), (64, 151_936)]
# (C, T, n): norms and gates of small models; beyond 32 MiB, fresh pages cost more than the op.
ELEMENTWISE_SIZES = [(16, 96, 512), (16, 96, 1360), (16, 256, 1024)]
# (C, H, T, e).
ROTARY_SIZES = [(16, 8, 96, 64), (16, 16, 256, 64)]


def way_to_call(op, way, opponents, device, dtype, small=False):
    """The op on a backend, its compiled reference, or an opponent; skips what cannot run here."""
    if way in opponents:
        return opponents[way]
    if way == "compile":
        torch.compiler.reset()
        # A smoke run traces; it does not wait for a compiler.
        return torch.compile(getattr(reference, op), backend="eager" if small else "inductor")
    reason = ops.OPS[op].refusal(way, torch.device(device), dtype)
    if reason or (way == "triton" and device == "cpu"):
        pytest.skip(reason or "the Triton interpreter is no opponent")

    def call(*args):
        with lddyn.backend(way):
            return getattr(ops, op)(*args)

    return call


# --------------------------------------------------------------------------- residual


def eager_residual(logits, targets):
    """The first output alone, as everyone writes it (and without its digits when π_y → 1)."""
    pi = logits.float().softmax(1)
    return torch.nn.functional.one_hot(targets, logits.shape[1]) - pi


def eager_statistics(logits, targets):
    """All five outputs in as few passes as torch has them (digits are lost as above)."""
    logp = logits.float().log_softmax(1)
    pi = logp.exp()
    entropy, squared_norm = -(pi * logp).sum(1), pi.square().sum(1)
    top = pi.topk(2, 1).indices
    own = targets[:, None]
    residual = pi.neg_().scatter_add_(1, own, torch.ones_like(own, dtype=pi.dtype))
    return residual, logp.gather(1, own).squeeze(1), entropy, squared_norm, top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", RESIDUAL_SIZES, ids="N{0[0]}-V{0[1]}".format)
@pytest.mark.parametrize(
    "way", ["cuda", "triton", "cpp", "reference", "compile", "softmax-onehot", "log-softmax"]
)
def bench_residual(benchmark, run, device, small, size, dtype, way):
    n, vocabulary = (2, 300) if small else size
    logits = (3 * torch.randn(n, vocabulary, device=device)).to(dtype)
    targets = torch.randint(0, vocabulary, (n,), device=device)
    benchmark.group = f"residual N={n} V={vocabulary} {dtype}"
    opponents = {"softmax-onehot": eager_residual, "log-softmax": eager_statistics}
    call = way_to_call("residual", way, opponents, device, dtype, small)
    run(
        lambda: call(logits, targets),
        truth=reference.residual(logits.double(), targets)[0],
        plain=eager_residual(logits, targets),
        dtype=torch.float32,  # low-precision logits are widened exactly
        flops=8 * n * vocabulary,
        traffic=n * vocabulary * (logits.element_size() + 4),
        bound="bytes",
        must_match=way not in opponents,
    )


# --------------------------------------------------------------------------- gram


def gradient_gram(a_o, g_o, a_u, g_u):
    """Weight gradients, token by token, then their Gram (order A, always)."""
    left = torch.einsum("si,msj->mij", a_o, g_o).flatten(1)
    right = torch.einsum("ti,ltj->lij", a_u, g_u).flatten(1)
    return left @ right.T


def ghost_gram(a_o, g_o, a_u, g_u):
    """The ghost product of activations and gradients (order B): an (M, L, S, T) tensor."""
    similarity = a_o @ a_u.T
    paired = torch.einsum("msj,ltj->mlst", g_o, g_u)
    return torch.einsum("st,mlst->ml", similarity, paired)


def gram_flops(s, d_in, d_out, m):
    """FLOPs of the cheapest order; S = T and M = L."""
    push = s * s * d_in + m * s * d_out * (s + m)
    return 2 * min(push, d_in * d_out * (2 * m * s + m * m))


@pytest.mark.parametrize("size", GRAM_SIZES, ids="S{0[0]}-M{0[1]}-d{0[2]}x{0[3]}".format)
@pytest.mark.parametrize(
    "way", ["cuda", "triton", "cpp", "reference", "compile", "gradients", "ghost"]
)
def bench_gram(benchmark, run, device, small, size, way):
    s, m, d_in, d_out = (8, 3, 5, 7) if small else size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = ((s, d_in), (m, s, d_out), (s, d_in), (m, s, d_out))
    args = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if way == "ghost" and m * m * s * s * args[0].element_size() > 2 << 30:
        pytest.skip("the (M, L, S, T) tensor is beyond 2 GiB")
    benchmark.group = f"gram S=T={s} M=L={m} d_in={d_in} d_out={d_out} {dtype}"
    opponents = {"gradients": gradient_gram, "ghost": ghost_gram}
    call = way_to_call("gram", way, opponents, device, dtype, small)
    run(
        lambda: call(*args),
        truth=gradient_gram(*(x.double() for x in args)),
        plain=gradient_gram(*args),
        dtype=dtype,
        flops=gram_flops(s, d_in, d_out, m),
        traffic=args[0].element_size() * sum(x.numel() for x in args),
        bound="flops",
        must_match=way not in opponents,
    )


# --------------------------------------------------------------------------- attention_pullback


def looped_sdpa(query, key, value, mask, grads, scale):
    """One backward pass of torch's fused attention per cotangent, through one forward pass."""
    leaves = [x.detach()[None].requires_grad_() for x in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=True, scale=scale, enable_gqa=len(key) != len(query)
    )
    rows = [torch.autograd.grad(out, leaves, g[None], retain_graph=True) for g in grads]
    return tuple(torch.cat(x) for x in zip(*rows, strict=True))


def expanded_sdpa(query, key, value, mask, grads, scale):
    """The same attention once per cotangent in a batch, and one backward pass."""
    leaves = [
        x.detach().expand(len(grads), -1, -1, -1).contiguous().requires_grad_()
        for x in (query, key, value)
    ]
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=True, scale=scale, enable_gqa=len(key) != len(query)
    )
    return torch.autograd.grad(out, leaves, grads)


@pytest.mark.parametrize("size", ATTENTION_SIZES, ids="C{0[0]}-H{0[1]}-G{0[2]}-T{0[3]}".format)
@pytest.mark.parametrize(
    "way", ["cuda", "triton", "cpp", "reference", "compile", "looped", "expanded"]
)
def bench_attention_pullback(benchmark, run, device, small, size, way):
    c, heads, groups, t, e = (2, 4, 2, 7, 4) if small else size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = ((heads, t, e), (groups, t, e), (groups, t, e))
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    grads = torch.randn(c, heads, t, e, device=device).to(dtype)
    mask = torch.full((1, t, t), -torch.inf, device=device, dtype=dtype).triu(1)
    args = (q, k, v, mask, grads, e**-0.5)
    benchmark.group = f"attention_pullback C={c} H={heads} G={groups} T={t} e={e} {dtype}"
    opponents = {"looped": looped_sdpa, "expanded": expanded_sdpa}
    call = way_to_call("attention_pullback", way, opponents, device, dtype, small)
    exact = (x.double() if isinstance(x, torch.Tensor) else x for x in args)
    capped = () if way in opponents else (0.0,)
    run(
        lambda: call(*args, *capped),
        truth=reference.attention_pullback(*exact, 0.0),
        plain=expanded_sdpa(*args),
        dtype=dtype,
        flops=4 * c * heads * t * t * e,  # four products, half of each closed
        traffic=grads.element_size() * 3 * grads.numel(),
        bound="flops",
        must_match=way not in opponents,
    )


def forward_mode(query, key, value, mask, t_query, t_key, t_value, scale, softcap):
    """torch's forward mode through attention written out: fused attention has none."""

    def attend(q, k, v):
        k, v = (x.repeat_interleave(len(query) // len(key), 0) for x in (k, v))
        return torch.softmax(q @ k.mT * scale + mask, -1) @ v

    def push(*tangents):
        return torch.func.jvp(attend, (query, key, value), tangents)[1]

    return torch.func.vmap(push)(t_query, t_key, t_value)


@pytest.mark.parametrize("size", ATTENTION_SIZES, ids="C{0[0]}-H{0[1]}-G{0[2]}-T{0[3]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile", "jvp"])
def bench_attention_pushforward(benchmark, run, device, small, size, way):
    c, heads, groups, t, e = (2, 4, 2, 7, 4) if small else size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = ((heads, t, e), (groups, t, e), (groups, t, e))
    forward = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    tangents = [torch.randn(c, *shape, device=device).to(dtype) for shape in shapes]
    mask = torch.full((1, t, t), -torch.inf, device=device, dtype=dtype).triu(1)
    args = (*forward, mask, *tangents, e**-0.5, 0.0)
    benchmark.group = f"attention_pushforward C={c} H={heads} G={groups} T={t} e={e} {dtype}"
    call = way_to_call("attention_pushforward", way, {"jvp": forward_mode}, device, dtype, small)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    run(
        lambda: call(*args),
        truth=reference.attention_pushforward(*exact),
        plain=forward_mode(*args),
        dtype=dtype,
        flops=4 * c * heads * t * t * e,
        traffic=tangents[0].element_size()
        * (tangents[0].numel() + sum(x.numel() for x in tangents)),
        bound="flops",
        must_match=way != "jvp",
    )


# --------------------------------------------------------------------------- sketch


@pytest.mark.parametrize("size", SKETCH_SIZES, ids="C{0[0]}-T{0[1]}-d{0[2]}x{0[3]}".format)
# No "compile": inductor overflows on the 64-bit constants of SplitMix64 (torch 2.13).
@pytest.mark.parametrize("way", ["cuda", "triton", "cpp", "reference", "dense"])
def bench_sketch(benchmark, run, device, small, size, way):
    c, t, d_in, d_out, k = (2, 5, 6, 7, 3) if small else size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a = torch.randn(t, d_in, device=device).to(dtype)
    g = torch.randn(c, t, d_out, device=device).to(dtype)
    args = (a, g, k, k, 1, 7)
    dense = None
    if way == "dense":
        if 4 * k * k * d_in * d_out > 1 << 30:
            pytest.skip("the dense matrix of signs is beyond 1 GiB")
        # The same signs as one matrix, made beforehand: what TRAK's projectors multiply by.
        left, right = (
            reference.signs(7, side, 1, k, d)[0].float() / k**0.5
            for side, d in ((1, d_out), (0, d_in))
        )
        dense = torch.einsum("aj,bi->abji", left, right).view(k * k, -1).to(device)

    def projected_gradients(a, g, *_):
        gradients = torch.einsum("ctj,ti->cji", g.float(), a.float()).flatten(1)
        return (gradients @ dense.T).view(len(g), 1, k, k)

    benchmark.group = f"sketch C={c} T={t} d_in={d_in} d_out={d_out} {k}x{k} {dtype}"
    opponents = {"dense": projected_gradients}
    call = way_to_call("sketch", way, opponents, device, dtype)
    run(
        lambda: call(*args),
        truth=reference.sketch(a.double(), g.double(), *args[2:]),
        plain=reference.sketch(*args),
        dtype=torch.float32,  # low-precision factors are widened exactly
        flops=2 * c * t * k * (d_out + k) + 2 * t * k * d_in,
        traffic=g.element_size() * (g.numel() + a.numel()),
        bound="bytes",
        must_match=way not in opponents,
    )


# --------------------------------------------------------------------------- preconditioned_push


def blas_chain(scale, a_o, a_u, g_u):
    """All gradients of the sources at once, weighted, applied: an (L, d_out, d_in) tensor."""
    gradients = torch.matmul(g_u.mT, a_u)
    return torch.matmul(a_o, (gradients * scale).mT)


@pytest.mark.parametrize("size", PRECONDITION_SIZES, ids="L{0[0]}-S{0[1]}-d{0[2]}x{0[3]}".format)
@pytest.mark.parametrize("way", ["cuda", "triton", "cpp", "reference", "compile", "chain"])
def bench_preconditioned_push(benchmark, run, device, small, size, way):
    n, s, d_in, d_out = (2, 5, 6, 7) if small else size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    scale = torch.rand(d_out, d_in, device=device)
    shapes = ((s, d_in), (s, d_in), (n, s, d_out))
    factors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    benchmark.group = f"preconditioned_push L={n} S=T={s} d_in={d_in} d_out={d_out} {dtype}"
    opponents = {"chain": blas_chain}
    call = way_to_call("preconditioned_push", way, opponents, device, dtype, small)
    plain = blas_chain(scale.to(dtype), *factors)
    run(
        lambda: call(scale.to(dtype) if way == "chain" else scale, *factors),
        truth=blas_chain(scale.double(), *(x.double() for x in factors)),
        plain=plain,
        dtype=dtype,
        flops=4 * n * d_out * d_in * s,
        traffic=factors[0].element_size() * (2 * s * d_in + n * s * d_out) + 4 * scale.numel(),
        bound="flops",
        must_match=way not in opponents,
    )


# --------------------------------------------------------------------------- residual_gram


def eager_residual_gram(logits_o, targets_o, logits_u, targets_u):
    """Both residuals in full, and their product."""
    return eager_residual(logits_o, targets_o) @ eager_residual(logits_u, targets_u).T


@pytest.mark.parametrize("size", RESIDUAL_GRAM_SIZES, ids="M{0[0]}-V{0[1]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile", "softmax-onehot"])
def bench_residual_gram(benchmark, run, device, small, size, way):
    m, vocabulary = (2, 300) if small else size
    args = []
    for _ in range(2):
        args.append(3 * torch.randn(m, vocabulary, device=device))
        args.append(torch.randint(0, vocabulary, (m,), device=device))
    benchmark.group = f"residual_gram M=L={m} V={vocabulary} {torch.float32}"
    opponents = {"softmax-onehot": eager_residual_gram}
    call = way_to_call("residual_gram", way, opponents, device, torch.float32, small)
    run(
        lambda: call(*args),
        truth=reference.residual_gram(*(x.double() if x.is_floating_point() else x for x in args)),
        plain=eager_residual_gram(*args),
        dtype=torch.float32,
        flops=2 * m * m * vocabulary,
        traffic=2 * 4 * m * vocabulary,
        bound="flops",
        must_match=way not in opponents,
    )


# --------------------------------------------------------------------------- elementwise layers


def run_elementwise(run, op, way, args, device, small, traffic, flops):
    """One elementwise op against its reference, which is eager torch, alone and compiled."""
    dtype = args[0].dtype
    call = way_to_call(op, way, {}, device, dtype, small)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    run(
        lambda: call(*args),
        truth=getattr(reference, op)(*exact),
        plain=getattr(reference, op)(*args),
        dtype=dtype,
        flops=flops,
        traffic=traffic * args[0].element_size(),
        bound="bytes",
        must_match=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", ELEMENTWISE_SIZES, ids="C{0[0]}-T{0[1]}-n{0[2]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile"])
def bench_gated_pullback(benchmark, run, device, small, size, dtype, way):
    c, t, n = (2, 3, 14) if small else size
    args = [torch.randn(s, device=device).to(dtype) for s in ((t, n), (t, n), (c, t, n))]
    benchmark.group = f"gated_pullback C={c} T={t} n={n} {dtype}"
    run_elementwise(run, "gated_pullback", way, args, device, small, 3 * c * t * n, 2 * c * t * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", ELEMENTWISE_SIZES, ids="C{0[0]}-T{0[1]}-n{0[2]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile"])
def bench_gated_pushforward(benchmark, run, device, small, size, dtype, way):
    c, t, n = (2, 3, 14) if small else size
    shapes = ((t, n), (t, n), (c, t, n), (c, t, n))
    args = [torch.randn(s, device=device).to(dtype) for s in shapes]
    benchmark.group = f"gated_pushforward C={c} T={t} n={n} {dtype}"
    amount = 3 * c * t * n
    run_elementwise(run, "gated_pushforward", way, args, device, small, amount, amount)


def measure_norm(benchmark, run, device, small, size, dtype, way, op, flops):
    c, t, n = (2, 3, 14) if small else size
    hat, weight, batch = (
        torch.randn(s, device=device).to(dtype) for s in ((t, n), (n,), (c, t, n))
    )
    args = [hat, torch.rand(t, device=device), weight, batch, False]
    benchmark.group = f"{op} C={c} T={t} n={n} {dtype}"
    run_elementwise(run, op, way, args, device, small, 2 * c * t * n, flops * c * t * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", ELEMENTWISE_SIZES, ids="C{0[0]}-T{0[1]}-n{0[2]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile"])
def bench_norm_pullback(benchmark, run, device, small, size, dtype, way):
    measure_norm(benchmark, run, device, small, size, dtype, way, "norm_pullback", 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", ELEMENTWISE_SIZES, ids="C{0[0]}-T{0[1]}-n{0[2]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile"])
def bench_norm_pushforward(benchmark, run, device, small, size, dtype, way):
    measure_norm(benchmark, run, device, small, size, dtype, way, "norm_pushforward", 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", ROTARY_SIZES, ids="C{0[0]}-H{0[1]}-T{0[2]}-e{0[3]}".format)
@pytest.mark.parametrize("way", ["triton", "cpp", "reference", "compile"])
def bench_rotary(benchmark, run, device, small, size, dtype, way):
    c, h, t, e = (2, 2, 3, 14) if small else size
    args = [torch.randn(s, device=device).to(dtype) for s in ((c, h, t, e), (t, e), (t, e))]
    benchmark.group = f"rotary C={c} H={h} T={t} e={e} {dtype}"
    amount = c * h * t * e
    run_elementwise(run, "rotary", way, [*args, True], device, small, 2 * amount, 3 * amount)
