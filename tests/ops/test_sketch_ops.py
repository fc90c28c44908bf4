"""`sketch` on every backend this machine has: its signs, its sums and its statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lddyn
from lddyn import ops, reference

# (T, d_in, d_out, C, size_out, size_in, repeats): aligned, ragged rows, ragged everything; one;
# repeats that share a word of signs, and words that share a repeat.
SHAPES = [
    (16, 16, 16, 16, 16, 16, 4),
    (33, 16, 16, 2, 16, 16, 5),
    (33, 19, 21, 3, 5, 3, 14),
    (1, 1, 1, 1, 1, 1, 1),
    (40, 9, 70, 2, 70, 20, 2),
]
GOLDEN = 0x9E3779B97F4A7C15


def make(shape, dtype, device="cpu"):
    t, d_in, d_out, c, *sizes = shape
    normal = (torch.randn(size).to(device, dtype) for size in ((t, d_in), (c, t, d_out)))
    return *normal, *sizes


def plain(activations, grads, size_out, size_in, repeats, seed):
    """Gradients, projected from both sides in the operands' dtype."""
    gradients = torch.einsum("ctj,ti->cji", grads, activations)
    left, right = (
        reference.signs(seed, side, repeats, size, width).to(grads) / size**0.5
        for side, size, width in ((1, size_out, grads.shape[2]), (0, size_in, activations.shape[1]))
    )
    return torch.einsum("raj,cji,rbi->crab", left, gradients, right)


# --------------------------------------------------------------------------- signs


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
    ],
)
def test_words_are_the_published_splitmix64(seed, published):
    words = reference.words(seed, len(published))
    assert [word % 2**64 for word in words.tolist()] == published


def number(seed, n):
    """Number n (from 0) of SplitMix64, in Python's integers."""
    x = (seed + (n + 1) * GOLDEN) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_signs_follow_their_definition(seed):
    repeats, size, width = 3, 30, 4
    for side in (0, 1):
        key = number(number(seed, 0), side)
        assert reference.sign_key(seed, side) % 2**64 == key
        signs = reference.signs(seed, side, repeats, size, width)
        for r in range(repeats):
            for i in range(size):
                block, bit = divmod(r * size + i, 64)
                words = [number(key, block * width + j) for j in range(width)]
                assert signs[r, i].tolist() == [1 - 2 * (word >> bit & 1) for word in words]


def correlated(x, y):
    """The correlation of two sign tensors in its standard errors."""
    return abs((x.double() * y).sum().item()) / x.numel() ** 0.5


def test_signs_of_other_seeds_sides_repeats_rows_and_columns_are_unrelated():
    base = reference.signs(5, 1, 2, 64, 512)
    assert correlated(base, torch.ones_like(base)) < 4
    others = [(seed, side) for seed in (4, 5, 6, 5 + 2**32, 5 - 2**63) for side in (0, 1)]
    # Where counters are hashed by hand, a layer's seed is often that of the last one plus GOLDEN.
    steps = [(5 + k * GOLDEN + 2**63) % 2**64 - 2**63 for k in (-2, -1, 1, 2)]
    others += [(seed, side) for seed in steps for side in (0, 1)]
    others.remove((5, 1))
    for seed, side in others:
        other = reference.signs(seed, side, 2, 64, 512)
        for shift in range(-3, 4):  # the streams are one sequence from other starts
            assert correlated(base, other.roll(shift, -1)) < 4.5
    rows = base.flatten(0, 1).double()
    for gram in (rows @ rows.T, rows.T @ rows):
        size = len(rows) if len(gram) == rows.shape[1] else rows.shape[1]
        z = (gram - size * torch.eye(len(gram))) / size**0.5
        assert z.abs().max() < 6  # of 131,000 pairs
        assert abs(z.square().sum() / (z.numel() - len(z)) - 1) < 0.05


def test_more_repeats_begin_with_the_same_signs():
    assert torch.equal(reference.signs(3, 0, 9, 5, 7)[:4], reference.signs(3, 0, 4, 5, 7))


@pytest.mark.covering(sizes=[(16, 4, 5), (5, 3, 14), (70, 20, 2)])
def test_sketch_has_the_same_signs_on_every_backend(sizes, dtype, device, use):
    """Unit operands show S_out, then S_in, in the signs of the results."""
    width, seed = 18, -(2**62) - 12345
    units = torch.eye(width, device=device, dtype=dtype)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    size_out, size_in, repeats = sizes
    left = reference.signs(seed, 1, repeats, size_out, width)
    right = reference.signs(seed, 0, repeats, size_in, width)
    with use("sketch", dtype):
        shows_left = ops.sketch(one, units[:, None], *sizes, seed).sign().cpu()
        shows_right = ops.sketch(units, units[..., None], *sizes, seed).sign().cpu()
    first_left = reference.signs(seed, 1, repeats, size_out, 1)[None]
    first_right = reference.signs(seed, 0, repeats, size_in, 1)[None].mT
    assert torch.equal(shows_left, (left.permute(2, 0, 1)[..., None] * first_right).to(shows_left))
    assert torch.equal(
        shows_right, (right.permute(2, 0, 1)[:, :, None] * first_left).to(shows_right)
    )


# --------------------------------------------------------------------------- sums


@pytest.mark.covering(shape=SHAPES)
def test_sketch(shape, dtype, device, use, assert_accurate):
    activations, grads, *sizes = make(shape, dtype, device)
    with use("sketch", dtype):
        out = ops.sketch(activations, grads, *sizes, seed=11)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = plain(activations.double(), grads.double(), *sizes, 11)
    assert_accurate(out, truth, plain(activations, grads, *sizes, 11), dtype)


@pytest.mark.parametrize("axis", range(4))
def test_sketch_of_nothing_is_zero(axis, device, use):
    shape = [4, 5, 6, 7, 2, 3, 5]
    shape[axis] = 0
    with use("sketch"):
        out = ops.sketch(*make(shape, torch.float32, device))
    assert out.shape == (shape[3], 5, 2, 3) and not out.any()


def test_sketch_takes_any_strides_and_reads_nothing_else(device, use):
    """Both operands are views into NaN."""

    def inside(x):
        larger = torch.full([2 * n + 1 for n in x.shape], torch.nan, device=device)
        view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)

    activations, grads, *sizes = make((33, 7, 9, 3, 4, 5, 3), torch.float32, device)
    with use("sketch"):
        out = ops.sketch(inside(activations), inside(grads), *sizes)
        same = ops.sketch(activations, grads[:1].expand(4, -1, -1), *sizes)
        turned = ops.sketch(activations.T.contiguous().T, grads.mT.contiguous().mT, *sizes)
    torch.testing.assert_close(out, plain(activations, grads, *sizes, 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, out[:1].expand(4, -1, -1, -1))
    torch.testing.assert_close(turned, out)


def test_sketch_of_float16_does_not_overflow(device, use):
    """S_out g is beyond 65504, the range of float16, on a row of S_out that g follows."""
    activations, grads, *sizes = make((3, 4, 64, 1, 4, 4, 2), torch.float16, device)
    grads = 6e4 * reference.signs(0, 1, 2, 4, 64)[0, :1].to(grads).expand(1, 3, -1)
    with use("sketch", torch.float16):
        out = ops.sketch(activations, grads, *sizes)
    truth = plain(activations.double(), grads.double(), *sizes, 0)
    assert (out.double() - truth).norm() <= 2e-3 * truth.norm()


def test_sketch_has_its_bits_in_any_batch(device, use):
    """The same bits twice, and for a cotangent alone, first or last in its batch."""
    activations, grads, *sizes = make((70, 13, 37, 5, 9, 8, 4), torch.float32, device)
    with use("sketch"):
        whole = ops.sketch(activations, grads, *sizes)
        assert torch.equal(ops.sketch(activations, grads, *sizes), whole)
        for lo, hi in ((0, 1), (3, 4), (3, 5)):
            assert torch.equal(ops.sketch(activations, grads[lo:hi].clone(), *sizes), whole[lo:hi])


def test_sketch_is_linear_and_adds_over_tokens(device, use):
    activations, grads, *sizes = make((40, 6, 7, 3, 5, 4, 3), torch.float32, device)
    with use("sketch"):
        whole = ops.sketch(activations, grads, *sizes)
        doubled = ops.sketch(activations, 2 * grads, *sizes)
        halves = [
            ops.sketch(activations[part], grads[:, part], *sizes)
            for part in (slice(9), slice(9, None))
        ]
        fewer = ops.sketch(activations, grads, 5, 4, 2)
    torch.testing.assert_close(doubled, 2 * whole)
    torch.testing.assert_close(sum(halves), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fewer, whole[:, :2])


# --------------------------------------------------------------------------- statistics


def moment(width, size):
    """E[M_pq M_rs] of M = SᵀS, S of size x width independent signs / √size."""
    eye = torch.eye(width, dtype=torch.float64)
    same = torch.einsum("pq,rs->pqrs", eye, eye)
    same_four = torch.einsum("pq,pr,ps->pqrs", eye, eye, eye)
    crossed = same.permute(0, 2, 1, 3) + same.permute(0, 2, 3, 1)
    return same + (crossed - 2 * same_four) / size


def test_estimates_are_unbiased_with_the_variance_of_two_sided_signs():
    """⟨sketch(a), sketch(b)⟩ over 1,000 seeds and 4 repeats of each.

    The variance is Σ E[M_jj' M_ll'] E[M_pq M_rs] T T' − ⟨A, B⟩² with the fourth moments of signs on
    both sides: the two-sided Gaussian's (p + q) / k_i + (p' + q') / k_o + (‖A‖²‖B‖² + ⟨A, B⟩² + p +
    p') / (k_o k_i), less the terms of coinciding indices.
    """
    d_out, d_in, size_out, size_in, repeats, seeds = 5, 6, 3, 2, 4, 1000
    activations, grads = torch.randn(7, d_in), torch.randn(2, 7, d_out)
    grads[1] += grads[0]
    with lddyn.backend("reference"):
        sketches = torch.stack(
            [ops.sketch(activations, grads, size_out, size_in, repeats, s) for s in range(seeds)]
        ).double()
    estimates = (sketches[:, 0] * sketches[:, 1]).sum((-1, -2))  # (seeds, repeats)
    a, b = torch.einsum("ctj,ti->cji", grads.double(), activations.double())
    truth = (a * b).sum()
    pair = torch.einsum("jp,lq->jlpq", a, b)
    second = torch.einsum(
        "jkpq,lmrs,jklm,pqrs->", pair, pair, moment(d_out, size_out), moment(d_in, size_in)
    )
    variance = second - truth**2

    count = estimates.numel()
    error = estimates - truth
    assert abs(error.mean()) < 3 * (variance / count) ** 0.5
    spread = ((error**4).mean() - variance**2) / count
    assert abs((error**2).mean() - variance) < 3 * spread**0.5

    # Repeats are independent: their mean's variance is theirs divided by their number.
    means = error.mean(1)
    spread = ((means**4).mean() - (variance / repeats) ** 2) / seeds
    assert abs((means**2).mean() - variance / repeats) < 3 * spread**0.5
    # ... and so their own standard error is right on average.
    reported = estimates.var(1) / repeats
    assert abs(reported.mean() - variance / repeats) < 3 * reported.std() / math.sqrt(seeds)


# --------------------------------------------------------------------------- the op


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(0, 9)] * 4, *[st.integers(1, 9)] * 3),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_seed(shape, seed):
    args = *make(shape, torch.float64), seed
    torch.testing.assert_close(ops.sketch(*args), plain(*args), rtol=1e-10, atol=1e-10)


def test_opcheck(device):
    args = *make((4, 5, 6, 2, 3, 2, 2), torch.float32, device), 7
    torch.library.opcheck(torch.ops.lddyn.sketch, args)


def test_derivatives_raise():
    activations, grads, *sizes = make((4, 5, 6, 2, 3, 2, 2), torch.float32)
    out = ops.sketch(activations, grads.requires_grad_(), *sizes)
    with pytest.raises(RuntimeError, match="sketch is not differentiable"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="sketch is not differentiable"):
        torch.func.jvp(lambda x: ops.sketch(x, grads, *sizes), (activations,), (activations,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(size_out=0), ValueError, "size_out must be at least 1, got 0"),
        (dict(repeats=-1), ValueError, "repeats must be at least 1, got -1"),
        (dict(activations=torch.randn(4)), ValueError, r"activations must be \(T, d_in\), got"),
        (dict(grads=torch.randn(2, 5, 6)), ValueError, r"with the T = 4 of activations, got"),
        (dict(grads=torch.randn(2, 4, 6).half()), TypeError, "grads must have the dtype of activ"),
    ],
)
def test_it_says_what_is_wrong(change, error, message):
    names = ("activations", "grads", "size_out", "size_in", "repeats")
    args = dict(zip(names, make((4, 5, 6, 2, 3, 2, 2), torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.sketch(**args)
