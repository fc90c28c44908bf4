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


def way_to_call(op, way, opponents, device, dtype):
    """The op on a backend, or an opponent; skips what cannot run here."""
    if way in opponents:
        return opponents[way]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", RESIDUAL_SIZES, ids="N{0[0]}-V{0[1]}".format)
@pytest.mark.parametrize("way", ["cuda", "triton", "cpp", "reference", "softmax-onehot"])
def bench_residual(benchmark, run, device, small, size, dtype, way):
    n, vocabulary = (2, 300) if small else size
    logits = (3 * torch.randn(n, vocabulary, device=device)).to(dtype)
    targets = torch.randint(0, vocabulary, (n,), device=device)
    benchmark.group = f"residual N={n} V={vocabulary} {dtype}"
    opponents = {"softmax-onehot": eager_residual}
    call = way_to_call("residual", way, opponents, device, dtype)
    run(
        lambda: call(logits, targets),
        truth=reference.residual(logits.double(), targets)[0],
        plain=eager_residual(logits, targets),
        dtype=torch.float32,  # low-precision logits are widened exactly
        flops=8 * n * vocabulary,
        traffic=n * vocabulary * (logits.element_size() + 4),
        bound="bytes",
        must_match=way != "softmax-onehot",
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
@pytest.mark.parametrize("way", ["cuda", "triton", "reference", "gradients", "ghost"])
def bench_gram(benchmark, run, device, small, size, way):
    s, m, d_in, d_out = (8, 3, 5, 7) if small else size
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = ((s, d_in), (m, s, d_out), (s, d_in), (m, s, d_out))
    args = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if way == "ghost" and m * m * s * s * args[0].element_size() > 2 << 30:
        pytest.skip("the (M, L, S, T) tensor is beyond 2 GiB")
    benchmark.group = f"gram S=T={s} M=L={m} d_in={d_in} d_out={d_out} {dtype}"
    opponents = {"gradients": gradient_gram, "ghost": ghost_gram}
    call = way_to_call("gram", way, opponents, device, dtype)
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
