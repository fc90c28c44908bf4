"""Inner products of softmax residuals, on every backend this machine has, against float64."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lddyn
from lddyn import ops, reference

INF = float("inf")

# (M, L, V): aligned, ragged rows, ragged everything; one, none; more than one tile of columns.
SHAPES = [(16, 16, 64), (5, 7, 64), (5, 7, 37), (1, 1, 2), (0, 3, 5), (3, 0, 5), (3, 2, 2111)]


def make(shape, dtype=torch.float32, device="cpu", scale=4.0):
    """Logits and targets of both sides; the first rows share their target."""
    m, n, vocabulary = shape
    sides = [(scale * torch.randn(rows, vocabulary)).to(device, dtype) for rows in (m, n)]
    tokens = [torch.randint(0, vocabulary, (rows,), device=device) for rows in (m, n)]
    if m and n:
        tokens[0][0] = tokens[1][0]
    return [sides[0], tokens[0], sides[1], tokens[1]]


def double(args):
    return [x.double() if x.is_floating_point() else x for x in args]


def error(out, args):
    """Largest error, relative to the product of the norms of the two residuals."""
    truth = reference.residual_gram(*double(args))
    norms = [reference.residual(*double(args)[k : k + 2])[0].norm(dim=1) for k in (0, 2)]
    return ((out - truth).abs() / norms[0][:, None] / norms[1]).nan_to_num(INF).max()


@pytest.mark.covering(shape=SHAPES)
def test_residual_gram(shape, dtype, device, use, assert_accurate):
    args = make(shape, dtype, device)
    with use("residual_gram", dtype):
        out = ops.residual_gram(*args)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == wide and out.is_contiguous()
    truth, plain = reference.residual_gram(*double(args)), reference.residual_gram(*args)
    assert_accurate(out, truth, plain, wide)


@pytest.mark.parametrize("gap", [10.0, 27.6, 40.0])
def test_residual_gram_keeps_its_digits_when_targets_are_certain(gap, device, use):
    """1 - π_y down to 1e-14 on either side or both: every product to a relative 1e-5."""
    zo, yo, zu, yu = args = make((4, 3, 500), device=device)
    zu[1], yu[1] = zo[1], yo[1]  # the same row on both sides: no cancellation at all
    for z, y, rows in ((zo, yo, [0, 1]), (zu, yu, [0, 1])):
        z[rows, y[rows]] = z[rows].max(dim=1).values + gap
    with use("residual_gram"):
        out = ops.residual_gram(*args)
    assert error(out, args) < 1e-5
    truth = reference.residual_gram(*double(args))
    torch.testing.assert_close(out[1, 1].double(), truth[1, 1], rtol=1e-5, atol=0)


def test_residual_gram_is_linear_algebra_of_residual(device, use):
    args = make((4, 6, 41), device=device)
    with use("residual_gram"):
        out, mirrored = ops.residual_gram(*args), ops.residual_gram(*args[2:], *args[:2])
        square = ops.residual_gram(*args[:2], *args[:2])
    plain = ops.residual(*args[:2])[0] @ ops.residual(*args[2:])[0].T
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, mirrored.T, rtol=1e-5, atol=1e-6)
    assert torch.linalg.eigvalsh(square.double().cpu()).min() > -1e-6


def test_residual_gram_of_masked_tokens(device, use):
    """A row that is certain has no residual; masked targets and columns are allowed."""
    z = torch.tensor(
        [[5.0, -INF, -INF], [-1000.0, -INF, -INF], [-INF, -INF, 3.0], [0.0, -INF, 0.0]],
        device=device,
    )
    y = torch.tensor([0, 0, 0, 2], device=device)
    with use("residual_gram"):
        out = ops.residual_gram(z, y, z, y)
    # residuals: 0; 0; (1, 0, -1); (-1/2, 0, 1/2)
    expected = torch.tensor(
        [[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, -1], [0, 0, -1, 0.5]], device=device
    )
    torch.testing.assert_close(out, expected)


def test_residual_gram_takes_any_strides(device, use):
    zo, yo, zu, yu = make((4, 5, 38), device=device)
    with use("residual_gram"):
        out = ops.residual_gram(zo[:, ::2], yo // 2, zu.T[::2].T, yu // 2)
        expanded = ops.residual_gram(zo[:1].expand(3, -1), yo[:1].expand(3), zu, yu)
    args = zo[:, ::2].contiguous(), yo // 2, zu[:, ::2].contiguous(), yu // 2
    assert error(out, args) < 1e-6
    assert error(expanded, (zo[:1].repeat(3, 1), yo[:1].repeat(3), zu, yu)) < 1e-6


def test_residual_gram_repeats_its_bits(device, use):
    args = make((9, 5, 700), device=device)
    with use("residual_gram"):
        assert torch.equal(ops.residual_gram(*args), ops.residual_gram(*args))


def test_residual_gram_of_a_row_alone(device, use):
    """Within float32's floor: a matrix product of one row may be summed in another order."""
    zo, yo, zu, yu = args = make((6, 5, 700), device=device)
    with use("residual_gram"):
        whole = ops.residual_gram(*args)
        alone = torch.cat(
            [ops.residual_gram(zo[i : i + 1], yo[i : i + 1], zu, yu) for i in range(6)]
        )
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("workspace", [1, 3000, 1 << 18])
def test_residual_gram_does_not_depend_on_threads_and_little_on_tiles(workspace, monkeypatch):
    module = sys.modules["lddyn.ops.residual"]  # as a name, it is the op
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    args = make((9, 5, 700))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.residual_gram(*args))
    finally:
        torch.set_num_threads(threads)
    assert error(found[0], args) < 1e-6
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)  # BLAS may reorder
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["o", "u"])
@pytest.mark.parametrize("value", [float("nan"), INF], ids=["nan", "inf"])
@pytest.mark.parametrize("column", [0, 3, 699])
def test_residual_gram_names_the_row_that_is_not_finite(column, value, side, use, device):
    args = make((3, 3, 700), device=device)
    args[0 if side == "o" else 2][1, column] = value
    args[1 if side == "o" else 3][1] = 3
    with use("residual_gram"), pytest.raises(ValueError, match=f"logits_{side} .* in row 1;"):
        ops.residual_gram(*args)


def test_residual_gram_refuses_a_row_of_masked_tokens_alone(use, device):
    args = make((3, 2, 9), device=device)
    args[0][2] = -INF
    with use("residual_gram"), pytest.raises(ValueError, match="maximum of -inf in row 2"):
        ops.residual_gram(*args)


def test_residual_gram_refuses_two_vocabularies():
    zo, yo, zu, yu = make((3, 2, 9))
    with pytest.raises(ValueError, match=r"the 9 columns of logits_o, got \(2, 8\)"):
        ops.residual_gram(zo, yo, zu[:, :8], yu.clamp(max=7))


def test_residual_gram_opcheck(device):
    torch.library.opcheck(torch.ops.lddyn.residual_gram, tuple(make((3, 2, 9), device=device)))


@settings(deadline=None, max_examples=30)
@given(
    m=st.integers(0, 5),
    n=st.integers(0, 5),
    vocabulary=st.integers(2, 400),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_residual_gram_of_any_shape(m, n, vocabulary, scale):
    args = make((m, n, vocabulary), scale=scale)
    out = ops.residual_gram(*args)
    if m and n:
        # Beside the relative bound, what lies below float32's range.
        truth = reference.residual_gram(*double(args))
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)
    assert out.shape == (m, n)
    with lddyn.backend("reference"):
        torch.testing.assert_close(out, ops.residual_gram(*args), rtol=1e-5, atol=1e-6)
