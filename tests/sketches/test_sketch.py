"""Sketches against dense matrices: no bias, the stated variance, intervals that hold the truth."""

import json
import math

import pytest
import torch

import lddyn
from lddyn.sketches.layout import Layout, Part
from lddyn.sketches.projections import (
    Stream,
    Term,
    buckets,
    contractions,
    haar,
    key,
    low_rank,
    normals,
    signs,
    two_sided,
    variance,
)
from lddyn.sketches.sketch import KINDS, best_sizes

ROWS, COLUMNS, TOKENS = 7, 6, 3
CASES = [(kind, "orthogonal") for kind in KINDS] + [("twosided", "sign")]


def token_gradients(shared=0.6, rows=ROWS, columns=COLUMNS):
    """Activations (T, d_in) and two cotangents (2, T, d_out) that have something in common."""
    x, grads = torch.randn(TOKENS, columns), torch.randn(2, TOKENS, rows)
    grads[1] = shared * grads[0] + (1 - shared) * grads[1]
    return x, grads


def assert_moments(samples, mean, spread):
    """Mean and variance of many independent samples, each within 3.5 of their standard errors."""
    samples, n = samples.double(), len(samples)
    assert abs(float(samples.mean()) - mean) < 3.5 * (spread / n) ** 0.5
    centred = (samples - mean).square()
    assert abs(float(centred.mean()) - spread) < 3.5 * float(centred.std()) / n**0.5


@pytest.mark.parametrize(("kind", "sides"), CASES)
def test_apply_is_unbiased_and_has_the_stated_variance(kind, sides):
    x, grads = token_gradients()
    one, other = torch.einsum("ctj,ti->cji", grads, x)
    seeds, size = 8000, 9
    sketch = lddyn.Sketch(kind=kind, k=seeds * size, repeats=seeds, seed=5, sides=sides)
    out = sketch.apply("w", x, grads)
    assert out.shape[:2] == (2, seeds) and out.shape[2] <= size
    samples = (out[0] * out[1]).sum(1)
    assert_moments(samples, float((one * other).sum()), seeds * sketch.variance(one, other))
    norms = out[0].square().sum(1)  # of a gradient with itself
    assert_moments(norms, float(one.square().sum()), seeds * sketch.variance(one, one))


@pytest.mark.parametrize(("kind", "sides"), CASES)
def test_intervals_hold_the_truth(kind, sides):
    """95 % intervals from 8 repeats, of one layer: 1,000 seeds."""
    x, grads = token_gradients(0.3, 24, 20)
    truth = float((torch.einsum("ctj,ti->cji", grads, x)).prod(0).sum())
    seeds, size = 1000, 36
    sketch = lddyn.Sketch(kind=kind, k=8 * seeds * size, repeats=8 * seeds, sides=sides)
    out = sketch.apply("w", x, grads)
    samples = (out[0] * out[1]).sum(1).view(seeds, 8)
    estimate = lddyn.Estimate(samples.mean(1), samples.std(1) / 8**0.5, 8)
    low, high = estimate.interval(0.95)
    held = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.93 <= held <= 0.97, f"95 % intervals held the truth {held:.1%} of the time"


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_names_and_repeats_are_other_sketches(kind):
    x, grads = token_gradients()
    sketch = lddyn.Sketch(kind=kind, k=72)
    out = sketch.apply("w", x, grads)
    assert torch.equal(out, sketch.apply("w", x, grads))
    assert not torch.allclose(out, sketch.apply("v", x, grads))
    assert not torch.allclose(out, lddyn.Sketch(kind=kind, k=72, seed=1).apply("w", x, grads))
    assert not torch.allclose(out[:, 0], out[:, 1])


def test_own_rows_are_single_outer_products():
    x, grads = torch.randn(4, COLUMNS), torch.randn(4, ROWS)
    for kind in KINDS:
        sketch = lddyn.Sketch(kind=kind, k=80)
        out = sketch.apply("w", x, grads)
        for c in range(4):
            alone = sketch.apply("w", x[c : c + 1], grads[c : c + 1, None])
            torch.testing.assert_close(out[c], alone[0])


def test_a_two_sided_sketch_of_full_size_is_exact():
    x, grads = token_gradients()
    one, other = torch.einsum("ctj,ti->cji", grads, x)
    sketch = lddyn.Sketch(k=2 * ROWS * COLUMNS, repeats=2)
    out = sketch.apply("w", x, grads)
    torch.testing.assert_close((out[0] * out[1]).sum(1), (one * other).sum().expand(2))
    assert sketch.variance(one, other) < 1e-9


# --------------------------------------------------------------------------- other parts of a row


def many(shape, repeats, size):
    """A sketch of many repeats and the sizes of one."""
    sketch = lddyn.Sketch(k=repeats * size, repeats=repeats)
    return sketch, best_sizes(*shape, size), sketch.moments


def test_token_rows_are_unbiased_and_have_the_stated_variance():
    """Embedding gradients: rows are token ids."""
    ids, grads = torch.tensor([4, 1, 4, 9]), torch.randn(2, 4, COLUMNS)
    grads[1] = (grads[0] + grads[1]) / 2
    dense = [torch.zeros(11, COLUMNS).index_add_(0, ids, g) for g in grads]
    sketch, sizes, moments = many((11, COLUMNS), 8000, 10)
    out = sketch.project("e", [Term(ids, grads)], (11, COLUMNS), sizes)
    spread = variance(moments("onehot", (11, COLUMNS), sizes), [(1.0, *dense)])
    assert_moments((out[0] * out[1]).sum(1), float((dense[0] * dense[1]).sum()), spread)


def test_vectors_are_unbiased_and_have_the_stated_variance():
    a = torch.randn(2, 12)
    a[1] += a[0]
    sketch, sizes, moments = many((12, 1), 8000, 5)
    out = sketch.project("b", [Term(a[:, None], torch.ones(2, 1, 1))], (12, 1), sizes)
    spread = variance(moments("vector", (12, 1), sizes), [(1.0, a[0][:, None], a[1][:, None])])
    assert_moments((out[0] * out[1]).sum(1), float(a[0] @ a[1]), spread)


def test_a_low_rank_part_takes_the_variance_off_without_a_bias():
    x, grads = token_gradients()
    grads[:, 1:] *= 0.3
    one, other = torch.einsum("ctj,ti->cji", grads, x)
    stream = Stream(0, "w", 8000)
    u, v = low_rank(stream, [Term(grads, x)], (ROWS, COLUMNS), 1)
    kept = u.mT @ v
    best = torch.linalg.svdvals(torch.stack([one, other]))
    rest = torch.stack([(a - b).norm() for a, b in zip((one, other), kept, strict=True)])
    assert bool((rest <= 1.2 * best[:, 1:].norm(dim=1)).all())
    _, sizes, moments = many((ROWS, COLUMNS), 8000, 9)
    whole = two_sided(stream, [Term(grads, x)], (ROWS, COLUMNS), sizes).flatten(2)
    minus = two_sided(stream, [Term(u, v)], (ROWS, COLUMNS), sizes).flatten(2)
    samples = (whole[0] * whole[1]).sum(1) - (minus[0] * minus[1]).sum(1)
    samples += (kept[0] * kept[1]).sum()
    pairs = [(1.0, one, other), (-1.0, kept[0], kept[1])]
    spread = variance(moments("sketch", (ROWS, COLUMNS), sizes), pairs)
    assert spread < 0.7 * variance(moments("sketch", (ROWS, COLUMNS), sizes), pairs[:1])
    assert_moments(samples, float((one * other).sum()), spread)


def test_contractions_are_the_sums_they_name():
    a, b = torch.randn(2, 4, 3)
    table = contractions(a, b, a, b)
    inner, product = (a * b).sum(), a.T @ b
    expected = {
        (0, 0): inner**2,
        (1, 1): a.norm() ** 2 * b.norm() ** 2,
        (0, 1): product.norm() ** 2,
        (0, 2): (product @ product).trace(),
        (3, 3): (a * a * b * b).sum(),
        (2, 2): inner**2,
        (1, 0): (a @ b.T).norm() ** 2,
    }
    for place, value in expected.items():
        assert float(table[place]) == pytest.approx(float(value), rel=1e-5)


# --------------------------------------------------------------------------- numbers


def test_streams_are_pinned():
    """What a seed means may not change: stored features would silently mean something else."""
    assert key(0, "w", "left") == 8561547447051193355
    assert normals(7, 3).tolist() == pytest.approx(
        [1.3649922974572282, 0.1445212212694154, -0.3965239752538177], abs=1e-12
    )
    assert signs(7, 8).tolist() == [-1, -1, -1, 1, -1, 1, -1, -1]
    where, sign = buckets(7, 6, 10)
    assert (where.tolist(), sign.tolist()) == ([3, 0, 9, 5, 4, 2], [-1, 1, 1, -1, 1, -1])


def test_numbers_are_what_they_are_called():
    count = 1 << 17
    for name, x in (("normals", normals(3, count)), ("signs", signs(3, count))):
        for power, mean in ((1, 0.0), (2, 1.0), (3, 0.0)):
            sample = x**power
            reach = 4 * max(float(sample.std()), 1e-12) / count**0.5
            assert abs(float(sample.mean()) - mean) <= reach, name
    where, sign = buckets(3, count, 10)
    assert (where.bincount(minlength=10) - count / 10).abs().max() < 4 * (count * 0.09) ** 0.5
    assert abs(float((sign * (where == 3)).sum())) < 4 * (count / 10) ** 0.5


def test_frames_are_orthogonal_and_independent():
    frames = haar(0, "w", "left", 3, 4, 9).double()
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(frames @ frames.mT, (eye * 9 / 4).expand(3, 4, 4), atol=1e-5, rtol=0)
    assert not torch.allclose(frames[0], frames[1])


def test_frames_are_the_same_within_true_float64():
    """They are kept, so what a float64 model gets must not depend on who asked first."""
    with lddyn.true_float64():
        within = haar(0, "true_float64", "left", 2, 3, 7)
    assert within.dtype == torch.float32
    haar.cache_clear()
    assert torch.equal(within, haar(0, "true_float64", "left", 2, 3, 7))


def test_more_repeats_begin_with_the_same_numbers():
    assert torch.equal(normals(3, 9)[:5], normals(3, 5))
    assert torch.equal(haar(0, "w", "left", 5, 2, 6)[:2], haar(0, "w", "left", 2, 2, 6))


def test_sizes_fill_what_they_may():
    assert best_sizes(4, 4, 100) == (4, 4)
    assert best_sizes(1, 9, 4) == (1, 4) and best_sizes(9, 1, 4) == (4, 1)
    for size in (1, 2, 5, 30, 200):
        left, right = best_sizes(64, 512, size)
        assert 1 <= left * right <= size and (left + 1) * (right + 1) > size * 0.7


# --------------------------------------------------------------------------- layouts

PARTS = (
    Part("g", "exact", (3, 1), (3, 1)),
    Part("w", "outer", (4, 5), (2, 1)),
    Part("w", "sketch", (4, 5), (2, 2)),
    Part("w", "minus", (4, 5), (2, 2)),
    Part("b", "vector", (7, 1), (3, 1)),
    Part("head", "head", (11, 6), (4, 1)),
)


def test_a_row_is_paired_part_by_part():
    layout = Layout(lddyn.Sketch(k=90, repeats=3), PARTS)
    exact, repeated, outer = 3, 4 + 4 + 3, 2 * 9 + 6 + 3 * 4
    assert layout.width == exact + 3 * repeated + outer
    assert not layout.linear
    a, b = torch.randn(2, layout.width), torch.randn(5, layout.width)
    samples = torch.zeros(3, 2, 5)
    for r in range(3):
        ra, rb = (x[:, 3 + r * 11 : 14 + r * 11] for x in (a, b))
        samples[r] = a[:, :3] @ b[:, :3].T + ra[:, :4] @ rb[:, :4].T
        samples[r] += ra[:, 8:] @ rb[:, 8:].T - ra[:, 4:8] @ rb[:, 4:8].T
        (v, h), (v_b, h_b) = (layout.pair(x, PARTS[-1]) for x in (a, b))
        samples[r] += (h[:, 0] @ h_b[:, 0].T) * (v[:, r] @ v_b[:, r].T)
        (u, v), (u_b, v_b) = (layout.pair(x, PARTS[1]) for x in (a, b))
        products = torch.einsum("nra,nrb,msa,msb->nm", u, v, u_b, v_b)
        samples[r] += products
    torch.testing.assert_close(layout.samples(a, b), samples)
    torch.testing.assert_close(layout.value(a, b), samples.mean(0))
    estimate = layout.estimate(a, b)
    assert estimate.samples == 3
    torch.testing.assert_close(estimate.value, samples.mean(0))
    torch.testing.assert_close(estimate.stderr, samples.std(0) / 3**0.5)


def test_exact_parts_have_no_error():
    layout = Layout(lddyn.Sketch(), PARTS[:2])
    rows = torch.randn(4, layout.width)
    assert not layout.estimate(rows, rows).stderr.any()


def test_layouts_go_through_json():
    layout = Layout(lddyn.Sketch(k=90, repeats=3, seed=4, kind="lowrank"), PARTS)
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 1 was expected, got 99"),
        ({"parts": 3}, "no sketch layout"),
        ({"parts": [["w", "magic", [1, 1], [1, 1]]]}, "no sketch layout"),
        ({"parts": [["w", "sketch", [1, 1], [0, 1]]]}, "no sketch layout"),
        ({"sketch": {"colour": 1}}, "no sketch layout"),
    ],
)
def test_from_dict_refuses_what_is_no_layout(change, message):
    described = Layout(lddyn.Sketch(), PARTS).to_dict() | change
    with pytest.raises(ValueError, match=message):
        Layout.from_dict(described)


def test_rows_of_another_width_are_refused():
    layout = Layout(lddyn.Sketch(), PARTS[:1])
    with pytest.raises(ValueError, match=r"rows_b must be \(n, 3\) rows of this layout, got"):
        layout.value(torch.zeros(1, 3), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hash"}, "kind must be one of twosided, .*, got 'hash'"),
        ({"sides": "left"}, "sides must be 'orthogonal' or 'sign', got 'left'"),
        ({"repeats": 1}, "repeats must be an integer of at least 2, got 1"),
        ({"k": 2.5}, "k must be an integer of at least 1, got 2.5"),
        ({"k": 4}, "k counts all 8 repeats, so it must be at least 8, got 4"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
    ],
)
def test_sketch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        lddyn.Sketch(**arguments)


@pytest.mark.parametrize(
    ("activations", "grads", "size", "message"),
    [
        ((3, 4, 5), (2, 3, 4), None, r"activations must be \(T, d_in\)"),
        ((3, 4), (2, 5, 4), None, "activations have 3 rows, grads 5"),
        ((3, 4), (2, 3, 4), 0, "size must be at least 1, got 0"),
    ],
)
def test_apply_refuses(activations, grads, size, message):
    with pytest.raises(ValueError, match=message):
        lddyn.Sketch().apply("w", torch.zeros(activations), torch.zeros(grads), size)


def test_variance_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"matrices of one shape, got \(2, 3\) and \(3, 2\)"):
        lddyn.Sketch().variance(torch.zeros(2, 3), torch.zeros(3, 2))


def test_dissimilar_rank_one_tokens_cost_hardly_more_than_a_dense_sketch():
    """Why two-sided is the default: its penalty is the cosine of the factors, squared."""
    x, grads = torch.randn(2, 64), torch.randn(2, 64)
    one, other = (torch.outer(g, a) for g, a in zip(grads, x, strict=True))
    size = 256
    dense = lddyn.Sketch("gaussian", k=8 * size).variance(one, other)
    assert lddyn.Sketch(k=8 * size).variance(one, other) < 1.5 * dense
    assert lddyn.Sketch(k=8 * size).variance(one, one) > 4 * dense
    assert math.isfinite(dense)
