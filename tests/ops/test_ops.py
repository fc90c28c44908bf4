"""Every op, on every backend this machine has, against float64."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lddyn
from lddyn import ops, reference
from lddyn.ops import dispatch

INF = float("inf")

# Aligned, ragged rows, ragged everything; then one, none, and more than one block of columns.
RESIDUAL_SHAPES = [(4, 16), (5, 16), (5, 13), (1, 2), (0, 5), (3, 700), (2, 4101)]

# (S, T, d_in, d_out, M, L). The last but one is as narrow as a LoRA factor.
GRAM_SHAPES = [
    (16, 16, 16, 16, 16, 16),
    (17, 9, 16, 16, 5, 3),
    (17, 9, 5, 13, 3, 7),
    (1, 1, 1, 1, 1, 1),
    (12, 20, 3, 40, 4, 6),
    (33, 40, 8, 19, 18, 20),
]


def name(shape):
    return "x".join(map(str, shape))


def make_residual(shape, dtype, device, scale=4.0):
    n, vocabulary = shape
    logits = (scale * torch.randn(n, vocabulary)).to(device, dtype)
    return logits, torch.randint(0, vocabulary, (n,), device=device)


def make_gram(shape, dtype, device="cpu"):
    s, t, d_in, d_out, m, n = shape
    sizes = ((s, d_in), (m, s, d_out), (t, d_in), (n, t, d_out))
    return [torch.randn(size).to(device, dtype) for size in sizes]


def plain_gram(a_o, g_o, a_u, g_u):
    """The textbook route: weight gradients, then their inner products, in the operands' dtype."""
    left = torch.einsum("si,msj->mij", a_o, g_o).flatten(1)
    right = torch.einsum("ti,ltj->lij", a_u, g_u).flatten(1)
    return left @ right.T


def double(args):
    return [x.double() if x.is_floating_point() else x for x in args]


# --------------------------------------------------------------------------- residual


@pytest.mark.covering(shape=RESIDUAL_SHAPES)
def test_residual(shape, dtype, device, use, assert_accurate):
    args = make_residual(shape, dtype, device)
    with use("residual", dtype):
        out = ops.residual(*args)
    truth = reference.residual(*double(args))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Any dtype is widened exactly, so that float32's floor holds for all.
    for result, expected in zip(out[:4], truth[:4], strict=True):
        assert result.dtype == wide and result.is_contiguous()
        assert_accurate(result, expected, None, wide)
    assert torch.equal(out[4], truth[4])


def test_residual_is_the_gradient_of_log_prob(device, use):
    logits, targets = make_residual((6, 11), torch.float64, device)
    logits.requires_grad_()
    logp = logits.log_softmax(1).gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(logp, logits)
    pi = logits.softmax(1).detach()
    with use("residual"):
        out, logp, entropy, squared_norm, _ = ops.residual(logits.detach().float(), targets)
    torch.testing.assert_close(out.double(), gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(pi * pi.log()).sum(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(squared_norm.double(), (pi * pi).sum(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.sum(1), torch.zeros_like(logp), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gap", [10.0, 30.0, 70.0])
def test_residual_keeps_its_digits_when_the_target_is_certain(gap, device, use):
    """1 - π_y down to 1e-28: relative error of r_y, log p and entropy stays at 1e-6."""
    logits = torch.randn(2, 1000, device=device)
    logits[0, 999] = gap + logits[0].max()
    logits[1, 3] = gap + logits[1].max()
    targets = torch.tensor([999, 3], device=device)
    with use("residual"):
        out = ops.residual(logits, targets)
    truth = reference.residual(logits.double(), targets)
    assert truth[0][0, 999] < 1e3 * torch.exp(torch.tensor(-gap))
    picked, expected = (x[0].gather(1, targets[:, None]).double() for x in (out, truth))
    torch.testing.assert_close(picked, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out[1].double(), truth[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(out[2].double(), truth[2], rtol=1e-6, atol=0)


def test_residual_of_masked_tokens_and_ties(device, use):
    logits = torch.tensor(
        [
            [5.0, -INF, -INF],
            [-INF, 5.0, -INF],
            [-INF, -INF, 3.0],
            [1.0, 1.0, 1.0],
            [1.0, 2.0, 2.0],
        ],
        device=device,
    )
    targets = torch.tensor([0, 1, 0, 2, 1], device=device)
    with use("residual"):
        out, logp, entropy, squared_norm, top = ops.residual(logits, targets)
    assert top.tolist() == [[0, 1], [1, 0], [2, 0], [0, 1], [1, 2]]
    assert out[:3].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, -1]]
    assert logp[:3].tolist() == [0, 0, -INF]
    assert entropy[:3].tolist() == [0, 0, 0]
    assert squared_norm[:3].tolist() == [1, 1, 1]
    torch.testing.assert_close(out[3].cpu(), torch.tensor([-1 / 3, -1 / 3, 2 / 3]))


@pytest.mark.parametrize("columns", [7, 4100])
def test_residual_runner_up_in_every_place(columns, device, use):
    """Top and runner-up in the same chunk, in other chunks, before and after, and tied."""
    spots = [0, 1, columns // 2, columns - 2, columns - 1]
    rows = [(i, j) for i in spots for j in spots if i != j]
    logits = torch.zeros(2 * len(rows), columns, device=device)
    for k, (i, j) in enumerate(rows):
        logits[2 * k, i], logits[2 * k, j] = 3.0, 2.0
        logits[2 * k + 1, i] = logits[2 * k + 1, j] = 3.0
    with use("residual"):
        top = ops.residual(logits, torch.zeros(len(logits), dtype=torch.int64, device=device))[4]
    expected = [pair for i, j in rows for pair in ([i, j], sorted([i, j]))]
    assert top.tolist() == expected


def test_residual_takes_any_strides(device, use):
    wide = torch.randn(14, 40, device=device)
    targets = torch.arange(10, device=device)[::2]
    cases = [wide[:5, :20], wide[:5, ::2], wide.T[:5, :], wide[:1].expand(5, -1)]
    for logits in cases:
        with use("residual"):
            out = ops.residual(logits, targets)
            expected = ops.residual(logits.contiguous(), targets.contiguous())
        for x, y in zip(out, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_residual_repeats_its_bits(device, use):
    args = make_residual((9, 5000), torch.float32, device)
    with use("residual"):
        first, second = ops.residual(*args), ops.residual(*args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_residual_has_the_same_bits_on_any_number_of_threads():
    args = make_residual((9, 5000), torch.float32, "cpu")
    one = ops.residual(*args)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        other = ops.residual(*args)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("column", [0, 2, 4500])
@pytest.mark.parametrize("value", [float("nan"), INF], ids=["nan", "inf"])
def test_residual_names_the_row_that_is_not_finite(value, column, device, use):
    logits = torch.randn(3, 5000, device=device)
    logits[1, column] = value
    targets = torch.tensor([0, 1, 2], device=device)
    with use("residual"):
        if device == "cpu":
            with pytest.raises(ValueError, match=r"logits must be finite .* in row 1;"):
                ops.residual(logits, targets)
        else:
            assert ops.residual(logits, targets)[3].isnan().tolist() == [False, True, False]


def test_residual_refuses_a_row_of_masked_tokens_alone(use, device):
    logits = torch.randn(3, 9, device=device)
    logits[2] = -INF
    with use("residual"), pytest.raises(ValueError, match="maximum of -inf in row 2"):
        ops.residual(logits, torch.zeros(3, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(targets=torch.tensor([0, 7])), ValueError, r"in \[0, 7\), got 7 in row 1"),
        (dict(targets=torch.tensor([-100, 1])), ValueError, r"got -100 in row 0; drop masked"),
        (dict(targets=torch.tensor([0])), ValueError, r"targets must be \(2,\).* got \(1,\)"),
        (dict(targets=torch.tensor([0, 1]).int()), TypeError, "int64, got torch.int32"),
        (dict(logits=torch.randn(2, 1)), ValueError, r"V >= 2, got \(2, 1\)"),
        (dict(logits=torch.randn(7)), ValueError, r"\(N, V\) with V >= 2, got \(7,\)"),
        (dict(logits=torch.ones(2, 7).int()), TypeError, "logits must be float32.*got torch.int32"),
    ],
)
def test_residual_says_what_is_wrong(change, error, message):
    args = {"logits": torch.randn(2, 7), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=message):
        ops.residual(**args)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 5), vocabulary=st.integers(2, 600), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_residual_of_any_shape(n, vocabulary, scale):
    args = make_residual((n, vocabulary), torch.float32, "cpu", scale)
    out, truth = ops.residual(*args), reference.residual(*double(args))
    for result, expected in zip(out[:4], truth[:4], strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(out[4], truth[4])


# --------------------------------------------------------------------------- gram


@pytest.mark.covering(shape=GRAM_SHAPES)
def test_gram(shape, dtype, device, use, assert_accurate):
    args = make_gram(shape, dtype, device)
    with use("gram", dtype):
        out = ops.gram(*args)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate(out, plain_gram(*double(args)), plain_gram(*args), dtype)


@pytest.mark.covering(shape=GRAM_SHAPES)
def test_gram_on_cpu_rounds_to_float32_only(shape, dtype, assert_accurate):
    """The CPU path widens low precision exactly: float32's floor holds for bfloat16 operands."""
    args = make_gram(shape, dtype)
    floor = torch.float64 if dtype == torch.float64 else torch.float32
    assert_accurate(ops.gram(*args), plain_gram(*double(args)), None, floor)


@pytest.mark.parametrize("axis", range(6))
def test_gram_of_nothing_is_zero(axis, device, use):
    shape = [4, 5, 6, 7, 2, 3]
    shape[axis] = 0
    with use("gram"):
        out = ops.gram(*make_gram(shape, torch.float32, device))
    assert out.shape == (shape[4], shape[5]) and not out.any()


def test_gram_takes_any_strides(device, use):
    a_o = torch.randn(6, 12, device=device)[:, ::2]
    g_o = torch.randn(7, 6, 3, device=device).permute(2, 1, 0)
    a_u = torch.randn(6, 5, device=device).T
    g_u = torch.randn(1, 5, 7, device=device).expand(4, -1, -1)
    args = a_o, g_o, a_u, g_u
    with use("gram"):
        torch.testing.assert_close(ops.gram(*args), plain_gram(*args), rtol=1e-4, atol=1e-4)


def test_gram_is_symmetric_and_positive(device, use):
    a, g = make_gram((9, 1, 5, 6, 7, 1), torch.float32, device)[:2]
    with use("gram"):
        out = ops.gram(a, g, a, g)
    torch.testing.assert_close(out, out.T)
    assert torch.linalg.eigvalsh(out.double().cpu()).min() > -1e-4


def test_gram_exchanged_is_its_transpose(device, use):
    a_o, g_o, a_u, g_u = make_gram((9, 5, 4, 6, 3, 2), torch.float32, device)
    with use("gram"):
        one, other = ops.gram(a_o, g_o, a_u, g_u), ops.gram(a_u, g_u, a_o, g_o)
    torch.testing.assert_close(one, other.T, rtol=1e-5, atol=1e-4)


def test_gram_is_linear_and_adds_over_tokens(device, use):
    a_o, g_o, a_u, g_u = make_gram((8, 6, 4, 5, 3, 2), torch.float32, device)
    with use("gram"):
        whole = ops.gram(a_o, g_o, a_u, g_u)
        halves = ops.gram(a_o[:3], g_o[:, :3], a_u, g_u) + ops.gram(a_o[3:], g_o[:, 3:], a_u, g_u)
        doubled = ops.gram(a_o, 2 * g_o, a_u, g_u)
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(doubled, 2 * whole)


def test_gram_repeats_its_bits(device, use):
    args = make_gram((33, 40, 8, 19, 18, 20), torch.float32, device)
    with use("gram"):
        assert torch.equal(ops.gram(*args), ops.gram(*args))


def test_gram_of_float16_does_not_overflow(device, use):
    """<a_o, a_u> is beyond 65504 here, the range of float16."""
    a_o, g_o, a_u, g_u = make_gram((4, 4, 512, 8, 2, 2), torch.float16, device)
    args = (100 * a_o).abs(), 1e-3 * g_o, (100 * a_u).abs(), 1e-3 * g_u
    with use("gram", torch.float16):
        out = ops.gram(*args)
    truth = plain_gram(*double(args))
    assert (out.double() - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("workspace", [1, 100, 10_000])
@pytest.mark.parametrize("order", ["push_o", "push_u", "materialise"])
def test_gram_in_every_order_and_chunk(order, workspace, monkeypatch):
    args = make_gram((7, 5, 6, 4, 9, 8), torch.float64)
    monkeypatch.setattr(reference, "_WORKSPACE", workspace)
    monkeypatch.setattr(reference, "gram_order", lambda *sizes: order)
    torch.testing.assert_close(reference.gram(*args), plain_gram(*args))


def test_gram_order_follows_the_flop_count():
    assert reference.gram_order(128, 128, 768, 768, 128, 128) == "push_o"
    assert reference.gram_order(512, 512, 64, 64, 64, 64) == "materialise"
    assert reference.gram_order(128, 128, 8, 1024, 64, 64) == "materialise"
    assert reference.gram_order(128, 128, 1024, 8, 64, 64) != "materialise"
    assert reference.gram_order(300, 30, 768, 768, 64, 4) == "push_u"


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else [out]:
            # An expanded view occupies what it was expanded from.
            shown = [n for n, step in zip(x.shape, x.stride(), strict=True) if step]
            self.elements = max(self.elements, torch.Size(shown).numel())
        return out


@pytest.mark.parametrize("shape", [(32, 32, 8, 16, 64, 64), (48, 48, 256, 64, 16, 16)], ids=name)
def test_gram_forms_nothing_large(shape, monkeypatch):
    """No (M, L, S, T) tensor: nothing beyond an operand and the workspace."""
    monkeypatch.setattr(reference, "_WORKSPACE", 4096)
    args = make_gram(shape, torch.float32)
    with _Largest() as seen:
        reference.gram(*args)
    assert seen.elements <= max(x.numel() for x in args) + 4096


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (4,), r"activations_o must be \(S, d_in\), got \(4,\)"),
        (1, (2, 5, 7), r"grads_o.shape\[1\] must equal activations_o.shape\[0\], got grads_o"),
        (2, (5, 9), r"activations_u.shape\[1\] must equal activations_o.shape\[1\]"),
        (3, (3, 5, 8), r"grads_u.shape\[2\] must equal grads_o.shape\[2\]"),
    ],
)
def test_gram_says_what_is_wrong(index, shape, message):
    args = make_gram((4, 5, 6, 7, 2, 3), torch.float32)
    args[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        ops.gram(*args)


def test_gram_refuses_mixed_dtypes():
    args = make_gram((4, 5, 6, 7, 2, 3), torch.float32)
    args[2] = args[2].bfloat16()
    with pytest.raises(TypeError, match="activations_u must have the dtype of activations_o"):
        ops.gram(*args)


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(*[st.integers(0, 9)] * 6))
def test_gram_of_any_shape(shape):
    args = make_gram(shape, torch.float64)
    torch.testing.assert_close(ops.gram(*args), plain_gram(*args), rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------- both ops

CALLS = {
    "residual": lambda: (torch.randn(3, 7), torch.tensor([1, 0, 6])),
    "gram": lambda: tuple(make_gram((4, 5, 6, 7, 2, 3), torch.float32)),
}


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op, device):
    args = [x.to(device) for x in CALLS[op]()]
    torch.library.opcheck(getattr(torch.ops.lddyn, op), tuple(args))


@pytest.mark.parametrize("op", CALLS)
def test_a_fake_result_has_the_real_layout(op):
    args = CALLS[op]()
    call = getattr(torch.ops.lddyn, op)
    real, fake = call(*args), call(*(x.to("meta") for x in args))
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, fake)), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compile_fullgraph(device):
    """Both ops in one graph: most of the time is the compiler's start."""
    pairs, logits = ([x.to(device) for x in CALLS[op]()] for op in ("gram", "residual"))

    def both(pairs, logits):
        return torch.ops.lddyn.gram(*pairs), torch.ops.lddyn.residual(*logits)

    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(compiled(pairs, logits), both(pairs, logits))


@pytest.mark.parametrize("op", CALLS)
def test_a_backward_raises(op):
    args = CALLS[op]()
    args[0].requires_grad_()
    public = getattr(ops, op)
    out = public(*args)
    out = out[1] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match=f"lddyn::{op} is not differentiable"):
        out.sum().backward()
    with torch.no_grad():
        out = public(*args)
    assert not any(x.requires_grad for x in (out if isinstance(out, tuple) else [out]))


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_raises(op, no_grad):
    """A silent zero tangent is the trap: torch.func.jvp must not pass an op without a rule."""
    x, *rest = CALLS[op]()

    def call(x):
        with torch.no_grad() if no_grad else contextlib.nullcontext():
            return getattr(ops, op)(x, *rest)

    for transform in (
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.jacfwd(call)(x),
        lambda: torch.func.linearize(call, x),
    ):
        with pytest.raises(RuntimeError, match=f"lddyn::{op} is not differentiable"):
            transform()


@pytest.mark.parametrize("op", CALLS)
def test_reverse_transforms_raise(op):
    x, *rest = CALLS[op]()

    def call(x):
        out = getattr(ops, op)(x, *rest)
        return (out[1] if isinstance(out, tuple) else out).sum()

    with pytest.raises(RuntimeError, match=f"lddyn::{op} is not differentiable"):
        torch.func.grad(call)(x)


def test_an_untouched_tangent_passes():
    """Inside a jvp, an op whose operands carry no tangent is a constant, and allowed."""
    args = CALLS["gram"]()
    out, tangent = torch.func.jvp(
        lambda x: ops.gram(*args) * x, (torch.ones(()),), (torch.ones(()),)
    )
    torch.testing.assert_close(tangent, out)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    a_o, g_o, a_u, g_u = CALLS["gram"]()
    many = torch.stack([a_o, 2 * a_o])
    out = torch.func.vmap(lambda a: ops.gram(a, g_o, a_u, g_u))(many)
    torch.testing.assert_close(out[1], 2 * out[0])


@pytest.mark.parametrize("op", CALLS)
def test_autocast_changes_nothing(op):
    args = CALLS[op]()
    plain = getattr(ops, op)(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = getattr(ops, op)(*args)
    assert torch.equal(
        *(x[0] if isinstance(x, tuple) else x for x in (plain, cast)),
    )


@pytest.mark.gpu
def test_kernels_ran_on_a_gpu(device):
    if device != "cuda":
        pytest.skip("NO CUDA DEVICE: the cuda backend did not run, triton ran interpreted only")
    assert not ops.why_not("triton", torch.device("cuda"))
    assert not ops.why_not("cuda", torch.device("cuda", torch.cuda.current_device()))


# --------------------------------------------------------------------------- choice of backend

REFUSED = dict.fromkeys(ops.BACKENDS, "not here")


@pytest.mark.parametrize(
    ("device", "able", "chosen"),
    [
        ("cpu", ["cpp", "reference"], "cpp"),
        ("cpu", ["reference"], "reference"),
        ("cpu", ["triton", "reference"], "reference"),  # the interpreter is for tests alone
        ("cuda", ["cuda", "triton", "reference"], "triton"),
        ("cuda", ["cuda", "reference"], "cuda"),
        ("xpu", ["cuda", "triton", "cpp", "reference"], "reference"),
    ],
)
def test_choose(device, able, chosen):
    assert ops.choose(device, None, REFUSED | dict.fromkeys(able, "")) == chosen


def test_an_impossible_override_raises():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: not here"):
        ops.choose("cpu", "cuda", REFUSED)
    message = "must be one of blas, cuda, triton, cpp, reference; got 'gpu'"
    with pytest.raises(ValueError, match=message):
        ops.choose("cpu", "gpu", REFUSED)
    with pytest.raises(ValueError, match="got 'gpu'"), lddyn.backend("gpu"):
        pass
    with (
        lddyn.backend("cpp"),
        pytest.raises(RuntimeError, match="sketch has no cpp implementation"),
    ):
        ops.sketch(torch.ones(2, 3), torch.ones(1, 2, 4), 2, 2)
    with lddyn.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        ops.residual(*CALLS["residual"]())


def test_the_environment_overrides_and_the_block_wins(monkeypatch):
    args = CALLS["gram"]()
    monkeypatch.setenv("LDDYN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
        ops.gram(*args)
    with lddyn.backend("reference"):
        ops.gram(*args)
    monkeypatch.setenv("LDDYN_BACKEND", "")
    ops.gram(*args)


def test_a_fallback_is_an_error_when_strict(monkeypatch):
    monkeypatch.setenv("LDDYN_STRICT", "1")
    with pytest.raises(RuntimeError, match="LDDYN_STRICT=1 makes this an error"):
        dispatch._report_fallback("a test")


def test_backends_gives_a_reason_for_every_refusal():
    for devices in lddyn.backends().values():
        for reasons in devices.values():
            assert list(reasons) == list(ops.BACKENDS)
            assert reasons["reference"] == ""
