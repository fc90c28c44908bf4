"""`product`: a dense product with a weight, whichever BLAS does it."""

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import lddyn
from lddyn import ops

family = importlib.import_module("lddyn.ops.product")

# Aligned; ragged; one row; no rows; one of everything; batches; nothing to sum; no columns.
SHAPES = [
    ((32, 16), 16),
    ((17, 5), 13),
    ((1, 7), 9),
    ((0, 7), 9),
    ((1, 1), 1),
    ((3, 2, 5, 7), 11),
    ((2, 0, 7), 3),
    ((4, 0), 3),
    ((4, 3), 0),
    ((6,), 4),
]


def operands(shape, columns, dtype, transposed=False, strided=False):
    x, weight = torch.randn(shape), torch.randn(shape[-1], columns)
    if transposed:
        weight = weight.T.contiguous().T
    if strided:
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    return x.to(dtype), weight.to(dtype)


@pytest.mark.covering(
    size=SHAPES, transposed=[False, True], strided=[False, True], blas=["oneDNN", "plain"]
)
def test_product(size, transposed, strided, dtype, blas, device, monkeypatch, assert_accurate):
    if blas == "plain":
        monkeypatch.setattr(family, "_onednn", lambda: False)
    elif not family._onednn():
        pytest.skip("torch has no oneDNN here")
    shape, columns = size
    x, weight = operands(shape, columns, dtype, transposed, strided)
    x, weight = x.to(device), weight.to(device)
    before = x.clone(), weight.clone()
    out = ops.product(x, weight)
    assert out.dtype == dtype and out.device == x.device
    assert_accurate(out, x.double() @ weight.double(), x @ weight, dtype)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    assert torch.equal(out, ops.product(x, weight))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 70))
def test_product_of_any_shape(shape, columns):
    x, weight = operands(tuple(shape), columns, torch.float32)
    out = ops.product(x, weight)
    assert out.shape == (*shape[:-1], columns)
    torch.testing.assert_close(out.double(), x.double() @ weight.double(), rtol=1e-5, atol=1e-5)


def test_product_with_the_transposed_weight_is_the_transposed_map():
    x, weight = operands((5, 7), 11, torch.float32)
    g = torch.randn(5, 11)
    left = (ops.product(x, weight) * g).sum()
    torch.testing.assert_close(left, (x * ops.product(g, weight.T)).sum(), rtol=1e-5, atol=1e-5)


def went(monkeypatch):
    """Names of the ways that products take from now on."""
    taken, known = [], family._by_onednn
    monkeypatch.setattr(family, "_by_onednn", lambda *a: taken.append("oneDNN") or known(*a))
    return taken


def test_who_multiplies(monkeypatch):
    """Only float32 on CPU goes to oneDNN, and nothing under the reference backend."""
    if not family._onednn():
        pytest.skip("torch has no oneDNN here")
    taken = went(monkeypatch)
    x, weight = operands((3, 5), 4, torch.float32)
    ops.product(x, weight)
    assert taken == ["oneDNN"]
    for other in (torch.float64, torch.bfloat16, torch.float16):
        ops.product(x.to(other), weight.to(other))
    with lddyn.backend("reference"):
        assert torch.equal(ops.product(x, weight), x @ weight)
    monkeypatch.setenv("LDDYN_BACKEND", "reference")
    assert torch.equal(ops.product(x, weight), x @ weight)
    monkeypatch.delenv("LDDYN_BACKEND")
    assert taken == ["oneDNN"]
    with lddyn.backend("cpp"):
        ops.product(x, weight)
    assert taken == ["oneDNN"] * 2


def test_dtypes_that_differ_raise():
    x, weight = operands((3, 5), 4, torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.product(x, weight.double())


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError, None])
def test_a_torch_without_the_function(error, monkeypatch):
    """Missing, of another signature, or wrong: the probe says no, and plain torch multiplies."""

    def broken(x, weight):
        if error is None:
            return x @ weight + 1
        raise error("not in this torch")

    monkeypatch.setattr(family, "_by_onednn", broken)
    family._onednn.cache_clear()
    try:
        assert not family._onednn()
        x, weight = operands((3, 5), 4, torch.float32)
        assert torch.equal(ops.product(x, weight), x @ weight)
    finally:
        family._onednn.cache_clear()


@pytest.mark.parametrize("default", [torch.set_default_dtype, torch.set_default_device])
def test_the_probe_does_not_see_defaults(default):
    """Its answer is kept for the process: it must not be that of a moment in float64."""
    if not family._onednn():
        pytest.skip("torch has no oneDNN here")
    family._onednn.cache_clear()
    default(torch.float64 if default is torch.set_default_dtype else "meta")
    try:
        assert family._onednn()
    finally:
        default(torch.float32 if default is torch.set_default_dtype else None)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_derivatives_are_those_of_a_product(which):
    """OneDNN's function has none: it would say zero, or nothing."""
    x, weight = operands((3, 5), 4, torch.float32)

    def function(moved):
        return ops.product(moved, weight) if which == "x" else ops.product(x, moved)

    def plain(moved):
        return moved @ weight if which == "x" else x @ moved

    at = x if which == "x" else weight
    tangent = torch.randn_like(at)
    torch.testing.assert_close(
        torch.func.jvp(function, (at,), (tangent,)), torch.func.jvp(plain, (at,), (tangent,))
    )
    leaf = at.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    (expected,) = torch.autograd.grad(plain(leaf).sum(), leaf)
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(at, tangent)
        moved = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        torch.testing.assert_close(moved, plain(tangent))
