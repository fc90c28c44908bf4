"""The C++ `gram`: edges of its tiles, threads, and zeros that it must not read."""

import importlib

import pytest
import torch

import lddyn
from lddyn import ops, reference

family = importlib.import_module("lddyn.ops.gram")

pytestmark = pytest.mark.skipif(
    ops.OPS["gram"].refusal("cpp", torch.device("cpu"), torch.float32) != "",
    reason="lddyn._C is not built",
)


@pytest.fixture(autouse=True)
def pushed(monkeypatch):
    """The C++ order, whatever the shape; on one thread unless the test says otherwise."""
    monkeypatch.setattr(reference, "gram_order", lambda *sizes: "push_o")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with lddyn.backend("cpp"):
        yield
    torch.set_num_threads(before)


def make(s=33, t=41, d_in=5, d_out=19, m=5, n=7):
    """Operands with zeros, and the lengths that promise them."""
    lengths = torch.randint(0, s + 1, (m,)), torch.randint(0, t + 1, (n,))
    args = [torch.randn(s, d_in), torch.randn(m, s, d_out), torch.randn(t, d_in)]
    args.append(torch.randn(n, t, d_out))
    return filled(args, lengths, 0.0), lengths


def filled(args, lengths, value):
    args = list(args)
    for i, reach in zip((1, 3), lengths, strict=True):
        beyond = torch.arange(args[i].shape[1]) >= reach[:, None]
        args[i] = args[i].masked_fill(beyond[..., None], value)
    return args


def assert_right(args, lengths):
    """Against float64, at most twice as wrong as the reference in float32, plus a floor.

    Relative to the norms of the gradients: with lengths at random most products are small.
    """
    wide = [x.double() for x in args]
    left = torch.einsum("si,msj->mij", wide[0], wide[1]).flatten(1)
    right = torch.einsum("ti,ltj->lij", wide[2], wide[3]).flatten(1)
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1)
    out = ops.gram(*args, *lengths)
    plain = reference.gram(*args, *lengths)
    assert out.shape == scale.shape and out.dtype == torch.float32
    error, bound = ((x.double() - left @ right.T).abs() for x in (out, plain))
    assert bool((error <= 2 * bound.max() + 1e-6 * scale).all())
    assert not bool(out.isnan().any())


@pytest.mark.parametrize("m", range(1, 36))
def test_gram_cpp_of_any_number_of_observed_cotangents(m):
    assert_right(*make(m=m, n=1 + m % 7))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 11, 12, 13, 17, 31])
def test_gram_cpp_of_any_number_of_updated_cotangents(n):
    assert_right(*make(n=n))


@pytest.mark.parametrize("d_out", [1, 7, 8, 9, 15, 16, 17, 24, 47, 48, 49, 191, 192, 193, 400])
def test_gram_cpp_of_any_width(d_out):
    assert_right(*make(d_out=d_out))


@pytest.mark.parametrize("t", [1, 3, 4, 7, 8, 9, 31, 32, 33, 64, 65, 100])
def test_gram_cpp_of_any_number_of_tokens(t):
    assert_right(*make(t=t))
    assert_right(*make(s=t))


@pytest.mark.parametrize("empty", ["s", "t", "d_in", "d_out", "m", "n"])
def test_gram_cpp_of_nothing_is_zero(empty):
    args, lengths = make(**{empty: 0})
    assert torch.equal(ops.gram(*args, *lengths), torch.zeros(len(args[1]), len(args[3])))


@pytest.mark.parametrize("shape", [{}, {"m": 20, "n": 13, "d_out": 200}, {"t": 100, "d_out": 50}])
def test_gram_cpp_never_reads_what_is_promised(shape):
    args, lengths = make(**shape)
    out = ops.gram(*args, *lengths)
    for value in (torch.nan, torch.inf):
        assert torch.equal(out, ops.gram(*filled(args, lengths, value), *lengths))


def test_gram_cpp_of_lengths_out_of_range():
    """Longer than the tokens, or negative: as long as there are, or none."""
    args, lengths = make()
    longer = [torch.full_like(x, 10**6) for x in lengths]
    torch.testing.assert_close(ops.gram(*args, *longer), ops.gram(*args))
    assert not ops.gram(*args, *(torch.full_like(x, -3) for x in lengths)).any()


@pytest.mark.parametrize("lengths", [True, False])
def test_gram_cpp_has_the_same_bits_on_any_number_of_threads(lengths):
    """Large enough to be shared between threads; and again on the same number.

    Activations are small integers: BLAS, which makes S, sums in another order on more threads.
    """
    args, reach = make(s=40, t=130, d_out=64, m=35, n=20)
    args[0], args[2] = (x.mul(4).round() for x in (args[0], args[2]))
    assert 35 * 20 * 130 * 64 > 1 << 20
    outs = []
    for threads in (1, 2, 3, 16, 1):
        torch.set_num_threads(threads)
        outs.append(ops.gram(*args, *(reach if lengths else ())))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_gram_cpp_does_not_see_the_batch():
    """Observed cotangents have the same bits alone; updated ones up to the order of their sums."""
    (a_o, g_o, a_u, g_u), (to_o, to_u) = make(m=35, n=20, d_out=50, t=70)
    out = ops.gram(a_o, g_o, a_u, g_u, to_o, to_u)
    for part in (slice(0, 1), slice(3, 20), slice(34, 35)):
        alone = ops.gram(a_o, g_o[part], a_u, g_u, to_o[part], to_u)
        assert torch.equal(alone, out[part])
        alone = ops.gram(a_o, g_o, a_u, g_u[part], to_o, to_u[part])
        torch.testing.assert_close(alone, out[:, part], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gram_cpp_of_other_dtypes(dtype):
    args, lengths = make()
    args = [x.to(dtype) for x in args]
    out = ops.gram(*args, *lengths)
    assert out.dtype == reference.wide(dtype)
    exact = ops.gram(*(x.double() for x in args), *lengths)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-3)
