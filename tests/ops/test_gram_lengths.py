"""`gram` of causal cotangents: what lengths promise to be zero is neither read nor multiplied."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lddyn import ops, reference

family = importlib.import_module("lddyn.ops.gram")

# (S, T, d_in, d_out, M, L): aligned; ragged rows; ragged everything; one; more than one tile.
SHAPES = [
    (32, 16, 16, 16, 16, 16),
    (17, 9, 16, 16, 5, 3),
    (17, 9, 5, 13, 3, 7),
    (1, 1, 1, 1, 1, 1),
    (40, 33, 19, 8, 5, 18),
]
KERNELS = {"cuda": "_gram_cuda", "triton": "_gram_triton"}


def make(shape, dtype, device, kind="random"):
    """Operands, and lengths: sorted and whole (causal), in any order, or the extremes."""
    s, t, d_in, d_out, m, n = shape
    args = [torch.randn(x) for x in ((s, d_in), (m, s, d_out), (t, d_in), (n, t, d_out))]
    lengths = []
    for i, most in ((1, s), (3, t)):
        count = len(args[i])
        chosen = {
            "random": torch.randint(0, most + 1, (count,)),
            "causal": torch.randint(most // 2, most + 1, (count,)).sort().values,
            "none": torch.zeros(count, dtype=torch.int64),
            "all": torch.full((count,), most),
        }[kind]
        lengths.append(chosen.to(device))
    return [x.to(device, dtype) for x in args], lengths


def filled(args, lengths, value):
    """The operands with `value` where the lengths promise zeros."""
    a_o, g_o, a_u, g_u = args
    beyond = [
        torch.arange(g.shape[1], device=g.device) >= x[:, None]
        for g, x in zip((g_o, g_u), lengths, strict=True)
    ]
    g_o, g_u = (g.masked_fill(b[..., None], value) for g, b in zip((g_o, g_u), beyond, strict=True))
    return a_o, g_o, a_u, g_u


def formed(a_o, g_o, a_u, g_u):
    """Weight gradients, then their products, in the operands' dtype."""
    left = torch.einsum("si,msj->mij", a_o, g_o).flatten(1)
    return left @ torch.einsum("ti,ltj->lij", a_u, g_u).flatten(1).T


@pytest.fixture
def push(monkeypatch):
    """Fix the order of contraction."""

    def fix(order):
        monkeypatch.setattr(reference, "gram_order", lambda *sizes: order)

    return fix


@pytest.mark.covering(shape=SHAPES, order=["push_o", "push_u", "materialise"])
def test_gram_with_lengths(shape, order, dtype, device, use, push, assert_accurate):
    args, lengths = make(shape, dtype, device)
    args = filled(args, lengths, 0.0)
    push(order)
    with use("gram", dtype):
        out = ops.gram(*args, *lengths)
    truth = formed(*(x.double() for x in args))
    assert_accurate(out, truth, formed(*args), dtype)


@pytest.mark.parametrize("kind", ["random", "causal", "none", "all"])
@pytest.mark.parametrize("order", ["push_o", "push_u"])
def test_gram_kernels_never_use_what_is_promised(order, kind, device, use, backend, push):
    """NaN in place of the zeros changes no bit, whatever the lengths."""
    if backend not in KERNELS:
        pytest.skip("plain torch may read the zeros")
    args, lengths = make((40, 33, 19, 8, 5, 18), torch.float32, device, kind)
    push(order)
    with use("gram"):
        out = ops.gram(*filled(args, lengths, 0.0), *lengths)
        poisoned = ops.gram(*filled(args, lengths, torch.nan), *lengths)
    assert torch.equal(out, poisoned)


@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["o", "u"])
@pytest.mark.parametrize("order", ["push_o", "push_u", "materialise"])
def test_gram_with_lengths_of_one_side(order, given, device, use, push):
    args, lengths = make((20, 33, 7, 8, 5, 6), torch.float32, device)
    args = filled(args, lengths, 0.0)
    push(order)
    with use("gram"):
        out = ops.gram(*args, *(x if g else None for x, g in zip(lengths, given, strict=True)))
    torch.testing.assert_close(out, formed(*args), rtol=1e-4, atol=1e-4)


def test_gram_with_lengths_repeats_its_bits_and_does_not_see_the_batch(device, use, push):
    """A cotangent has the same bits alone as in a batch, where the order is the same."""
    args, lengths = make((40, 33, 19, 8, 5, 18), torch.float32, device)
    a_o, g_o, a_u, g_u = filled(args, lengths, 0.0)
    push("push_o")
    with use("gram"):
        out = ops.gram(a_o, g_o, a_u, g_u, *lengths)
        assert torch.equal(out, ops.gram(a_o, g_o, a_u, g_u, *lengths))
        alone = ops.gram(a_o, g_o[3:4], a_u, g_u, lengths[0][3:4], lengths[1])
    torch.testing.assert_close(alone, out[3:4], rtol=1e-5, atol=1e-4)


def test_gram_in_chunks_of_columns_and_of_cotangents(device, use, monkeypatch, push):
    """E in pieces of 64 columns and two cotangents: the partial sums of all are added up."""
    args, lengths = make((9, 5, 7, 150, 5, 3), torch.float32, device)
    args = filled(args, lengths, 0.0)
    monkeypatch.setattr(family, "_PUSHED", 5 * 64 * 2)
    for order in ("push_o", "push_u", "materialise"):
        push(order)
        with use("gram"):
            out = ops.gram(*args, *lengths)
        torch.testing.assert_close(out, formed(*args), rtol=1e-4, atol=1e-4)


def test_gram_takes_strided_operands_and_lengths(device, use, push):
    args, lengths = make((12, 10, 5, 8, 6, 7), torch.float32, device)
    args = filled(args, lengths, 0.0)
    strided = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in args]
    both = [torch.stack([x, x], -1).flatten()[::2] for x in lengths]
    assert not any(x.is_contiguous() for x in (*strided, *both))
    for order in ("push_o", "push_u"):
        push(order)
        with use("gram"):
            torch.testing.assert_close(ops.gram(*strided, *both), ops.gram(*args, *lengths))


@settings(deadline=None, max_examples=25)
@given(shape=st.tuples(*[st.integers(0, 9)] * 6), data=st.data())
def test_gram_with_lengths_of_any_shape(shape, data):
    args, lengths = make(shape, torch.float64, "cpu", data.draw(st.sampled_from(["random", "all"])))
    args = filled(args, lengths, 0.0)
    torch.testing.assert_close(ops.gram(*args, *lengths), formed(*args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", [0, 1])
def test_gram_says_what_is_wrong_with_lengths(which):
    args, lengths = make((4, 5, 6, 7, 2, 3), torch.float32, "cpu", "all")
    for wrong in (lengths[which].int(), lengths[which][:1], lengths[which][None]):
        with pytest.raises(ValueError, match=f"lengths_{'ou'[which]} must be int64 of shape"):
            ops.gram(*args, *(wrong if i == which else x for i, x in enumerate(lengths)))


def test_opcheck_with_lengths(device):
    args, lengths = make((4, 5, 6, 7, 2, 3), torch.float32, device, "all")
    torch.library.opcheck(torch.ops.lddyn.gram, (*args, *lengths))
