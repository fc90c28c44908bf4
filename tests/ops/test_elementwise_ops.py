"""What lies between a block's products: five ops, every backend of this machine, float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp, vjp
from torch.nn import functional as F

import lddyn
from lddyn import ops, reference

NAMES = ["gated_pullback", "gated_pushforward", "norm_pullback", "norm_pushforward", "rotary"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    (name, backend)
    for name in NAMES
    for backend in ops.OPS[name].implementations
    if not ops.OPS[name].refusal(backend, torch.device(DEVICE))
]

# (C, T, n): aligned, ragged rows, ragged everything; one, none; more than one block of positions.
SHAPES = [(4, 8, 64), (5, 9, 64), (3, 7, 14), (1, 1, 2), (0, 3, 4), (2, 0, 4), (2, 5, 0)]
SHAPES += [(2, 18, 300), (2, 35, 2100)]


def make(op, shape, dtype=torch.float32, device=DEVICE, flag=False):
    """Operands; `flag` is centred, or transpose. Every third of n goes to a head of rotary."""
    c, t, n = shape

    def normal(*size):
        return torch.randn(size).to(device, dtype)

    if op == "rotary":
        return [normal(c, 3, t, n), normal(t, n), normal(t, n), flag]
    if op.startswith("gated"):
        batches = [normal(c, t, n) for _ in range(1 + op.endswith("forward"))]
        return [normal(t, n), normal(t, n), *batches]
    rstd = (0.5 + torch.rand(t)).to(device, reference.wide(dtype))
    return [normal(t, n), rstd, normal(n), normal(c, t, n), flag]


def double(args):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


def run(op, backend, *args):
    """The results, as a tuple, on one backend."""
    with lddyn.backend(backend):
        return many(getattr(ops, op)(*args))


def many(out):
    return out if isinstance(out, tuple) else (out,)


def skip_unless(op, backend, dtype):
    reason = ops.OPS[op].refusal(backend, torch.device(DEVICE), dtype)
    if reason:
        pytest.skip(f"{op} on {backend}: {reason}")


def runs(way, shape, dtype, flag):
    """Whether the backend takes the dtype, and the interpreter is not slow at the shape."""
    op, backend = way
    slow = backend == "triton" and DEVICE == "cpu" and shape[2] > 1000
    flagged = flag and op.startswith("gated")  # these have no flag
    refused = bool(ops.OPS[op].refusal(backend, torch.device(DEVICE), dtype))
    return not (slow or flagged or refused)


@pytest.mark.covering(way=BACKENDS, shape=SHAPES, flag=[False, True], allowed=runs)
def test_accuracy(way, shape, dtype, flag, assert_accurate):
    op, backend = way
    args = make(op, shape, dtype, flag=flag)
    found = run(op, backend, *args)
    truth, plain = (many(getattr(reference, op)(*x)) for x in (double(args), args))
    for out, exact, rough in zip(found, truth, plain, strict=True):
        assert out.dtype == rough.dtype and out.device == rough.device
        assert_accurate(out, exact, rough, out.dtype)


# --------------------------------------------------------------------------- what they compute


def test_gated_ops_are_the_derivatives_of_a_gated_activation():
    a, u, g, ta, tu = torch.randn(5, 4, 6, dtype=torch.float64)

    def gated(a, u):
        return F.silu(a) * u

    value = F.silu(a)
    sigmoid = torch.sigmoid(a)
    slope = (sigmoid + value * (1 - sigmoid)) * u
    _, pull = vjp(gated, a, u)
    for out, truth in zip(ops.gated_pullback(value, slope, g[None]), pull(g), strict=True):
        torch.testing.assert_close(out[0], truth)
    _, truth = jvp(gated, (a, u), (ta, tu))
    torch.testing.assert_close(ops.gated_pushforward(value, slope, ta[None], tu[None])[0], truth)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_norm_ops_are_the_derivatives_of_a_norm(centred):
    x, g, tangent = torch.randn(3, 4, 6, dtype=torch.float64)
    x = x + 0.7
    w, eps = torch.randn(6, dtype=torch.float64), 0.3  # far from negligible

    def norm(x, w):
        return F.layer_norm(x, (6,), w, None, eps) if centred else F.rms_norm(x, (6,), w, eps)

    moved = x - x.mean(1, keepdim=True) if centred else x
    rstd = (moved.square().mean(1) + eps).rsqrt()
    normalized = moved * rstd[:, None]
    _, pull = vjp(norm, x, w)
    grad_x, grad_w = ops.norm_pullback(normalized, rstd, w, g[None], centred)
    torch.testing.assert_close((grad_x[0], grad_w[0]), pull(g))
    _, truth = jvp(lambda x: norm(x, w), (x,), (tangent,))
    out = ops.norm_pushforward(normalized, rstd, w, tangent[None], centred)
    torch.testing.assert_close(out[0], truth)


def test_rotary_is_a_rotation_of_halves():
    c, h, t, e = 2, 3, 5, 8
    x = torch.randn(c, h, t, e, dtype=torch.float64)
    angle = torch.outer(torch.arange(t), torch.rand(e // 2)).double()
    cos, sin = (f(torch.cat([angle, angle], dim=1)) for f in (torch.cos, torch.sin))
    y = ops.rotary(x, cos, sin)
    z = torch.view_as_complex(torch.stack([x[..., : e // 2], x[..., e // 2 :]], dim=-1))
    turned = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle))
    torch.testing.assert_close(y, torch.cat([turned[..., 0], turned[..., 1]], dim=-1))
    torch.testing.assert_close(ops.rotary(y, cos, sin, transpose=True), x)
    assert y.transpose(1, 2).is_contiguous()


def test_rotary_transposed_is_its_vjp_for_any_angles():
    x, g = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64)
    cos, sin = torch.randn(2, 5, 8, dtype=torch.float64)
    x.requires_grad_()
    (truth,) = torch.autograd.grad(reference.rotary(x, cos, sin, False), x, g)
    torch.testing.assert_close(ops.rotary(g, cos, sin, transpose=True), truth)


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("flag", [False, True])
def test_pullback_and_pushforward_are_dual(backend, flag):
    """<pullback(g), tangent> = <g, pushforward(tangent)>."""
    for name in NAMES:
        skip_unless(name, backend, torch.float32)

    def same(pairs, other):
        total = sum((x.double() * y.double()).sum() for x, y in pairs)
        size = other[0].double().norm() * other[1].double().norm()
        assert abs(total - (other[0].double() * other[1].double()).sum()) <= 1e-6 * size

    value, slope, *tangents = make("gated_pushforward", (3, 7, 14))
    g = torch.randn_like(tangents[0])
    with lddyn.backend(backend):
        pulled = ops.gated_pullback(value, slope, g)
        same(
            zip(pulled, tangents, strict=True),
            (g, ops.gated_pushforward(value, slope, *tangents)),
        )
        *forward, tangent, centred = make("norm_pushforward", (3, 7, 14), flag=flag)
        pulled = ops.norm_pullback(*forward, g, centred)[0]
        same([(pulled, tangent)], (g, ops.norm_pushforward(*forward, tangent, centred)))
        x, cos, sin, _ = make("rotary", (3, 7, 14))
        g = torch.randn_like(x)
        same([(ops.rotary(g, cos, sin, not flag), x)], (g, ops.rotary(x, cos, sin, flag)))


# --------------------------------------------------------------------------- layouts and bits


def strided(x, how):
    """A tensor of the same values in another layout."""
    if how == "reversed":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    if how == "rows":  # contiguous rows, strange strides between them
        moved = x.transpose(0, -2).contiguous().transpose(0, -2) if x.ndim > 1 else x
        return moved
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)  # "columns"
    wide[..., 1::2] = x
    return wide[..., 1::2]


@pytest.mark.parametrize("how", ["reversed", "rows", "columns"])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_any_strides(op, backend, how):
    args = make(op, (3, 6, 14), flag=True)
    moved = [strided(x, how) if isinstance(x, torch.Tensor) else x for x in args]
    for out, plain in zip(run(op, backend, *moved), run(op, backend, *args), strict=True):
        torch.testing.assert_close(out, plain)
        assert out.stride() == plain.stride()


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_an_expanded_batch(op, backend):
    args = make(op, (1, 6, 14))
    shared = 1 if op == "rotary" else 2 + op.startswith("norm")
    batch = range(1) if op == "rotary" else range(shared, len(args))
    many_args = [
        x.expand(3, *x.shape[1:]) if k in batch and isinstance(x, torch.Tensor) else x
        for k, x in enumerate(args)
    ]
    for out, one in zip(run(op, backend, *many_args), run(op, backend, *args), strict=True):
        torch.testing.assert_close(out, one.expand(3, *one.shape[1:]))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_bits_repeat_and_do_not_depend_on_the_batch(op, backend, flag):
    """A cotangent alone has the bits that it has in a batch (the reference: float32's floor)."""
    args = make(op, (5, 9, 26), flag=flag)
    whole = run(op, backend, *args)
    for out, again in zip(whole, run(op, backend, *args), strict=True):
        assert torch.equal(out, again)
    for lo, hi in ((0, 1), (1, 3), (3, 5)):
        part = [x[lo:hi] if isinstance(x, torch.Tensor) and x.ndim > 2 else x for x in args]
        for out, alone in zip(whole, run(op, backend, *part), strict=True):
            if backend == "reference":
                torch.testing.assert_close(alone, out[lo:hi])
            else:
                assert torch.equal(alone, out[lo:hi])


@pytest.mark.parametrize("op", NAMES)
def test_bits_do_not_depend_on_threads(op):
    skip_unless(op, "cpp", torch.float32)
    args = make(op, (7, 50, 202), device="cpu", flag=True)  # enough work to be shared
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            found.append(run(op, "cpp", *args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_low_precision_is_rounded_once_to_nearest_even(backend, dtype):
    """Normal, subnormal, overflowing and non-finite products, exactly as torch rounds them."""
    skip_unless("gated_pullback", backend, dtype)
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter truncates to bfloat16")
    exponents = torch.linspace(-30, 40, 4000, device=DEVICE)
    a = (torch.randn(4000, device=DEVICE) * exponents.exp2()).to(dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, 65504.0, 6e-8]
    a = torch.cat([a, torch.tensor(special, device=DEVICE).to(dtype)])[None]
    b = torch.randn(a.shape, device=DEVICE).to(dtype)
    with lddyn.backend(backend):
        found = ops.gated_pullback(b, b.flip(1), a[None])
    for out, factor in zip(found, (b.flip(1), b), strict=True):
        torch.testing.assert_close(out[0], a * factor, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------- any shape, any error


@settings(deadline=None, max_examples=40)
@given(
    op=st.sampled_from(NAMES),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 40)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    flag=st.booleans(),
)
def test_any_shape(op, shape, dtype, flag):
    c, t, n = shape
    args = make(op, (c, t, 2 * n if op == "rotary" else n), dtype, "cpu", flag)
    truth = many(getattr(reference, op)(*double(args)))
    for out, exact in zip(many(getattr(ops, op)(*args)), truth, strict=True):
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.lddyn, op), tuple(make(op, (3, 5, 8), flag=True)))


@pytest.mark.parametrize("op", NAMES)
def test_a_fake_result_has_the_real_layout(op):
    args = make(op, (3, 5, 8), device="cpu", flag=True)
    call = getattr(torch.ops.lddyn, op)
    fake = call(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
    for x, y in zip(many(call(*args)), many(fake), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("op", NAMES)
def test_a_backward_raises(op):
    args = make(op, (2, 3, 4))
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"lddyn::{op} is not differentiable"):
        many(getattr(ops, op)(*args))[0].sum().backward()


@pytest.mark.parametrize(
    ("op", "index", "value", "error", "message"),
    [
        ("gated_pullback", 1, torch.ones(3, 5), ValueError, r"slope must have .* \(3, 4\), got"),
        ("gated_pullback", 2, torch.ones(3, 4), ValueError, r"grads must be \(C, 3, 4\)"),
        ("gated_pushforward", 3, torch.ones(2, 4, 4), ValueError, r"up must be \(C, 3, 4\)"),
        ("gated_pushforward", 2, torch.ones(2, 3, 4).double(), TypeError, "gate must have the"),
        ("norm_pullback", 1, torch.ones(4), ValueError, r"rstd must be \(3,\), got \(4,\)"),
        ("norm_pullback", 1, torch.ones(3).double(), TypeError, "rstd must be torch.float32"),
        ("norm_pushforward", 2, torch.ones(3), ValueError, r"weight must be \(4,\), got \(3,\)"),
        ("rotary", 0, torch.ones(2, 2, 3, 5), ValueError, "with an even e"),
        ("rotary", 2, torch.ones(3, 2), ValueError, r"sin must be \(T, e\) = \(3, 4\)"),
    ],
)
def test_says_what_is_wrong(op, index, value, error, message):
    args = make(op, (2, 3, 4), device="cpu")
    args[index] = value
    with pytest.raises(error, match=message):
        getattr(ops, op)(*args)


def test_gated_pushforward_refuses_two_batch_sizes():
    value, slope, gate, up = make("gated_pushforward", (3, 5, 4))
    with pytest.raises(ValueError, match=r"up must have the shape of gate"):
        ops.gated_pushforward(value, slope, gate, up[:2])
