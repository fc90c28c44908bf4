"""`preconditioned_push` on every backend this machine has, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lddyn import ops

# (S, T, d_in, d_out, L): aligned, ragged rows, ragged everything; one; more than one tile of each.
SHAPES = [
    (16, 16, 16, 16, 16),
    (17, 9, 16, 16, 3),
    (17, 9, 5, 13, 3),
    (1, 1, 1, 1, 1),
    (300, 35, 40, 70, 2),
]


def make(shape, dtype, device="cpu"):
    s, t, d_in, d_out, n = shape
    sizes = ((d_out, d_in), (s, d_in), (t, d_in), (n, t, d_out))
    scale, *rest = (torch.randn(size).to(device, dtype) for size in sizes)
    return scale.abs(), *rest


def plain(scale, a_o, a_u, g_u):
    """Every gradient, weighed and applied, in the operands' dtype."""
    gradient = torch.einsum("ltj,ti->lji", g_u, a_u) * scale.to(g_u.dtype)
    return torch.einsum("lji,si->lsj", gradient, a_o)


def double(args):
    return [x.double() for x in args]


@pytest.mark.covering(shape=SHAPES)
def test_preconditioned_push(shape, dtype, device, use, assert_accurate):
    args = make(shape, dtype, device)
    with use("preconditioned_push", dtype):
        out = ops.preconditioned_push(*args)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate(out, plain(*double(args)), plain(*args), dtype)


@pytest.mark.covering(scale_dtype=[torch.float64, torch.float32, torch.bfloat16])
def test_preconditioned_push_takes_a_scale_of_any_dtype(
    scale_dtype, dtype, device, use, assert_accurate
):
    scale, *rest = make((7, 9, 6, 5, 2), dtype, device)
    scale = scale.T.contiguous().to(scale_dtype).T  # a transposed view, as Conv1D has it
    with use("preconditioned_push", dtype):
        out = ops.preconditioned_push(scale, *rest)
    args = scale, *rest
    assert_accurate(out, plain(*double(args)), plain(*args), dtype)


def test_preconditioned_push_of_float16_does_not_overflow(device, use):
    """P ∘ G is beyond 65504 here, the range of float16, as 1 / (√v + ε) makes it."""
    scale, *rest = make((4, 4, 32, 8, 2), torch.float16, device)
    args = 1e6 * scale.float(), *rest
    with use("preconditioned_push", torch.float16):
        out = ops.preconditioned_push(*args)
    truth = plain(*double(args))
    assert (out.double() - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("axis", range(5))
def test_preconditioned_push_of_nothing(axis, device, use):
    shape = [4, 5, 6, 7, 2]
    shape[axis] = 0
    with use("preconditioned_push"):
        out = ops.preconditioned_push(*make(shape, torch.float32, device))
    assert out.shape == (shape[4], shape[0], shape[3]) and not out.any()


def test_preconditioned_push_takes_any_strides_and_reads_nothing_else(device, use):
    """Every operand is a view into NaN."""

    def inside(x):
        larger = torch.full([2 * n + 1 for n in x.shape], torch.nan, device=device)
        view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)

    args = make((6, 5, 7, 9, 3), torch.float32, device)
    with use("preconditioned_push"):
        out = ops.preconditioned_push(*map(inside, args))
        same = ops.preconditioned_push(*args[:3], args[3][:1].expand(4, -1, -1))
    torch.testing.assert_close(out, plain(*args), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, out[:1].expand(4, -1, -1))


def test_preconditioned_push_by_ones_is_the_plain_push(device, use):
    scale, a_o, a_u, g_u = make((8, 6, 5, 7, 3), torch.float32, device)
    with use("preconditioned_push"):
        out = ops.preconditioned_push(torch.ones_like(scale), a_o, a_u, g_u)
    torch.testing.assert_close(out, (a_o @ a_u.T) @ g_u, rtol=1e-4, atol=1e-4)


def test_preconditioned_push_by_rank_one_factors(device, use):
    """P = p qᵀ weighs the outputs by p and the inputs by q."""
    scale, a_o, a_u, g_u = make((8, 6, 5, 7, 3), torch.float32, device)
    p, q = scale[:, 0], scale[0]
    with use("preconditioned_push"):
        out = ops.preconditioned_push(torch.outer(p, q), a_o, a_u, g_u)
    torch.testing.assert_close(out, ((a_o * q) @ a_u.T) @ g_u * p, rtol=1e-4, atol=1e-4)


def test_preconditioned_push_is_linear_and_adds_over_tokens(device, use):
    scale, a_o, a_u, g_u = make((8, 6, 5, 7, 3), torch.float32, device)
    with use("preconditioned_push"):
        whole = ops.preconditioned_push(scale, a_o, a_u, g_u)
        doubled = ops.preconditioned_push(2 * scale, a_o, a_u, g_u)
        halves = [
            ops.preconditioned_push(scale, a_o, a_u[part], g_u[:, part])
            for part in (slice(2), slice(2, None))
        ]
    torch.testing.assert_close(doubled, 2 * whole)
    torch.testing.assert_close(sum(halves), whole, rtol=1e-4, atol=1e-4)


def test_preconditioned_push_has_its_bits_in_any_batch(device, use):
    """The same bits twice, and for a source alone, first or last in its batch."""
    scale, a_o, a_u, g_u = make((70, 40, 36, 52, 5), torch.float32, device)
    with use("preconditioned_push"):
        whole = ops.preconditioned_push(scale, a_o, a_u, g_u)
        assert torch.equal(ops.preconditioned_push(scale, a_o, a_u, g_u), whole)
        for lo, hi in ((0, 1), (3, 4), (3, 5)):
            part = ops.preconditioned_push(scale, a_o, a_u, g_u[lo:hi].clone())
            assert torch.equal(part, whole[lo:hi])


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(*[st.integers(0, 9)] * 5))
def test_any_shape(shape):
    args = make(shape, torch.float64)
    torch.testing.assert_close(ops.preconditioned_push(*args), plain(*args), rtol=1e-10, atol=1e-10)


def test_opcheck(device):
    args = make((4, 5, 6, 7, 2), torch.float32, device)
    torch.library.opcheck(torch.ops.lddyn.preconditioned_push, args)


def test_derivatives_raise():
    scale, a_o, a_u, g_u = make((4, 5, 6, 7, 2), torch.float32)
    out = ops.preconditioned_push(scale, a_o, a_u, g_u.requires_grad_())
    with pytest.raises(RuntimeError, match="preconditioned_push is not differentiable"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="preconditioned_push is not differentiable"):
        torch.func.jvp(lambda x: ops.preconditioned_push(x, a_o, a_u, g_u), (scale,), (scale,))


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, r"scale must be \(d_out, d_in\), got \(6,\)"),
        (0, lambda x: x.int(), TypeError, "scale must be floating point on cpu, got torch.int32"),
        (1, lambda x: x[:, 1:], ValueError, r"activations_o.shape\[1\] must be 6, got \(4, 5\)"),
        (2, lambda x: x.bfloat16(), TypeError, "activations_u must have the dtype of grads_u"),
        (3, lambda x: x[:, 1:], ValueError, r"grads_u.shape\[1\] must be 5, got \(2, 4, 7\)"),
        (3, lambda x: x[..., 1:], ValueError, r"grads_u.shape\[2\] must be 7, got \(2, 5, 6\)"),
    ],
)
def test_it_says_what_is_wrong(index, change, error, message):
    args = list(make((4, 5, 6, 7, 2), torch.float32))
    args[index] = change(args[index])
    with pytest.raises(error, match=message):
        ops.preconditioned_push(*args)
