"""Attention for many cotangents and tangents, on every backend, against float64 and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lddyn import ops, reference

NAN, CLOSED = float("nan"), torch.finfo(torch.float32).min

# (C, H, G, T, S, e, f): aligned, ragged rows, ragged everything; one; several tiles.
SHAPES = [
    (2, 2, 2, 16, 16, 16, 16),
    (2, 2, 1, 19, 19, 16, 16),
    (3, 4, 2, 21, 23, 5, 3),
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 40, 40, 8, 24),
]


def causal(t, s, window=None):
    """Query i sees keys up to i + s − t, the last `window` of them."""
    i, j = torch.arange(t)[:, None] + s - t, torch.arange(s)[None]
    opened = (j <= i) & (j > i - (window or s + t))
    return torch.zeros(1, t, s).masked_fill(~opened, CLOSED)


def make(shape, dtype=torch.float32, device="cpu", mask=None):
    """(query, key, value, mask), grads, (tangent_query, tangent_key, tangent_value)."""
    c, h, g, t, s, e, f = shape
    sizes = [
        (h, t, e),
        (g, s, e),
        (g, s, f),
        (c, h, t, f),
        (c, h, t, e),
        (c, g, s, e),
        (c, g, s, f),
    ]
    q, k, v, grads, *tangents = (torch.randn(size).to(device, dtype) for size in sizes)
    mask = causal(t, s) if mask is None else mask
    return (q, k, v, mask.to(device)), grads, tuple(tangents)


def double(*args):
    return [x.double() for x in args]


def plain(query, key, value, mask, scale, softcap=0.0):
    """Softmax attention as a textbook has it, in the operands' dtype."""
    repeats = len(query) // len(key)
    key, value = (x.repeat_interleave(repeats, 0) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores + mask.to(scores.dtype).clamp(min=-3e4), -1) @ value


def plain_pullback(query, key, value, mask, grads, scale, softcap):
    _, pull = torch.func.vjp(
        lambda *qkv: plain(*qkv, mask, scale, softcap), *(x for x in (query, key, value))
    )
    return tuple(map(torch.stack, zip(*(pull(g) for g in grads), strict=True)))


def plain_pushforward(query, key, value, mask, t_q, t_k, t_v, scale, softcap):
    return torch.stack(
        [
            torch.func.jvp(lambda *qkv: plain(*qkv, mask, scale, softcap), (query, key, value), t)[
                1
            ]
            for t in zip(t_q, t_k, t_v, strict=True)
        ]
    )


def both(forward, grads, tangents, scale=0.4, softcap=0.0):
    """All four results of the two ops."""
    pulled = ops.attention_pullback(*forward, grads, scale, softcap)
    return (*pulled, ops.attention_pushforward(*forward, *tangents, scale, softcap))


def both_plain(forward, grads, tangents, scale=0.4, softcap=0.0):
    pulled = plain_pullback(*forward, grads, scale, softcap)
    return (*pulled, plain_pushforward(*forward, *tangents, scale, softcap))


def alibi(h, t, s):
    slopes = 2.0 ** -torch.arange(1, h + 1)
    return causal(t, s) + slopes[:, None, None] * (torch.arange(s) - s + 1.0)


# --------------------------------------------------------------------------- truth


@pytest.mark.covering(shape=SHAPES, softcap=[0.0, 2.0])
def test_attention_pullback_and_pushforward(shape, softcap, dtype, device, use, assert_accurate):
    forward, grads, tangents = make(shape, dtype, device)
    with use("attention_pullback", dtype):
        out = both(forward, grads, tangents, softcap=softcap)
    truth = both_plain(double(*forward), grads.double(), double(*tangents), softcap=softcap)
    rough = both_plain(forward, grads, tangents, softcap=softcap)
    for result, expected, other in zip(out, truth, rough, strict=True):
        assert result.dtype == dtype and result.is_contiguous()
        assert_accurate(result, expected, other, dtype)


MASKS = {
    "open": lambda h, t, s: torch.zeros(1, t, s),
    "window": lambda h, t, s: causal(t, s, window=7),
    "linear bias of each head": alibi,
    "a window for one head, none for another": lambda h, t, s: torch.cat(
        [causal(t, s, window=5 + 40 * i) for i in range(h)]
    ),
    "padding on the left": lambda h, t, s: causal(t, s).index_fill(2, torch.arange(18), CLOSED)[
        :, 18:
    ],
    "two documents": lambda h, t, s: torch.where(
        (torch.arange(t)[:, None] < 20) == (torch.arange(s) < 20), causal(t, s), CLOSED
    ),
    "minus infinity": lambda h, t, s: causal(t, s).masked_fill(causal(t, s) < 0, -math.inf),
    "bfloat16": lambda h, t, s: causal(t, s).bfloat16(),
    "float16": lambda h, t, s: causal(t, s).clamp(min=-6e4).half(),
    "float64": lambda h, t, s: alibi(h, t, s).double(),
    "expanded": lambda h, t, s: causal(t, s).expand(h, t, s),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_pullback_and_pushforward_under_a_mask(mask, device, use, assert_accurate):
    mask = MASKS[mask](2, 40, 40)
    forward, grads, tangents = make((1, 2, 1, mask.shape[1], 40, 8, 8), device=device, mask=mask)
    with use("attention_pullback"):
        out = both(forward, grads, tangents)
    truth = both_plain(double(*forward), grads.double(), double(*tangents))
    rough = both_plain(forward, grads, tangents)
    for result, expected, other in zip(out, truth, rough, strict=True):
        assert_accurate(result, expected, other, torch.float32)


def test_attention_pullback_is_the_transpose_of_pushforward(device, use):
    """<pullback(g), t> = <g, pushforward(t)> for every pair of a cotangent and a tangent."""
    forward, grads, tangents = make((3, 4, 2, 21, 23, 5, 3), device=device)
    with use("attention_pullback"):
        *pulled, pushed = both(forward, grads, tangents, softcap=3.0)
    pairs = zip(pulled, tangents, strict=True)
    left = sum(x.double().flatten(1) @ y.double().flatten(1).T for x, y in pairs)
    right = grads.double().flatten(1) @ pushed.double().flatten(1).T
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_attention_pullback_and_pushforward_takes_any_strides(device, use):
    forward, grads, tangents = make((2, 2, 1, 18, 18, 6, 6), device=device)

    def moved(x):  # tokens before heads, as a model has them; then every other element
        x = x.transpose(-2, -3).contiguous().transpose(-2, -3)
        return x.repeat_interleave(2, -1)[..., ::2]

    with use("attention_pullback"):
        expected = both(forward, grads, tangents)
        for change in (moved, lambda x: x.mT.contiguous().mT):
            out = both([*map(change, forward)], change(grads), [*map(change, tangents)])
            for x, y in zip(out, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        one = tangents[0][:1].expand_as(tangents[0])
        out = ops.attention_pushforward(*forward, one, *tangents[1:], 0.4)
        same = ops.attention_pushforward(*forward, one.contiguous(), *tangents[1:], 0.4)
    torch.testing.assert_close(out, same)


@pytest.mark.parametrize("axis", [0, 3, 4, 5, 6])
def test_attention_pullback_and_pushforward_of_nothing(axis, device, use):
    shape = [2, 4, 2, 5, 5, 6, 3]
    shape[axis] = 0
    if axis == 3:
        shape[4] = 7
    forward, grads, tangents = make(shape, device=device, mask=torch.zeros(1, *shape[3:5]))
    with use("attention_pullback"):
        *pulled, pushed = both(forward, grads, tangents)
    for x, like in zip((*pulled, pushed), (*tangents, grads), strict=True):
        assert x.shape == like.shape
        if axis in (3, 4):
            assert not x.any()


# --------------------------------------------------------------------------- numbers


def test_attention_pullback_and_pushforward_repeats_its_bits(device, use):
    args = make((3, 4, 2, 21, 23, 5, 3), device=device)
    with use("attention_pullback"):
        first, second = both(*args), both(*args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_attention_pullback_and_pushforward_of_one_is_that_of_many(device, use):
    """A cotangent alone and among others: the same within float32's floor."""
    forward, grads, tangents = make((3, 1, 1, 21, 21, 8, 8), device=device)
    with use("attention_pullback"):
        many = both(forward, grads, tangents)
        for i in range(3):
            one = both(forward, grads[i : i + 1], [x[i : i + 1] for x in tangents])
            for x, y in zip(one, many, strict=True):
                assert (x[0] - y[i]).norm() <= 1e-6 * y[i].norm()


def test_attention_pullback_and_pushforward_is_blind_to_what_all_keys_share(device, use):
    """A constant along the keys moves no probability, however large it is beside the rest."""
    forward, _, tangents = make((2, 1, 1, 40, 40, 16, 16), torch.bfloat16, device)
    shared = 300 * torch.randn(2, 1, 1, 16, device=device)
    zero = torch.zeros_like(tangents[0])
    shifted = zero, shared.expand_as(tangents[1]).bfloat16(), torch.zeros_like(tangents[2])
    with use("attention_pullback", torch.bfloat16):
        out = ops.attention_pushforward(*forward, *shifted, 0.25)
        scale = ops.attention_pushforward(*forward, zero, 300 * tangents[1], shifted[2], 0.25)
    assert out.norm() <= 1e-4 * scale.norm()


def test_attention_pullback_and_pushforward_of_small_float16_cotangents(device, use):
    """P ∘ (dP − D) is below the least float16 here, and dQ is not."""
    forward, grads, _ = make(
        (1, 1, 1, 40, 40, 16, 16), torch.float16, device, MASKS["open"](1, 40, 40)
    )
    query, key, value, mask = forward
    forward, grads = (query, 60 * key, value, mask), 1e-5 * grads
    with use("attention_pullback", torch.float16):
        out = ops.attention_pullback(*forward, grads, 1e-2)[0]
    truth = plain_pullback(*double(*forward, grads), 1e-2, 0.0)[0]
    assert (out.double() - truth).norm() <= 2e-2 * truth.norm()


def test_attention_never_reads_closed_tiles(device):
    """NaN in keys that a whole tile of queries cannot see (the kernel's tiles are 16, 16 here)."""
    if device != "cpu":
        pytest.skip("the tiles of a GPU are others")
    pytest.importorskip("triton", minversion="3.7")  # 3.6's interpreter fails under numpy 2.5
    t = 64
    opened = torch.zeros(t, t, dtype=torch.bool)
    opened[:32, :16] = opened[32:, 48:] = True  # keys 16 to 48 are closed to all
    mask = torch.zeros(1, t, t).masked_fill(~opened, CLOSED)
    forward, grads, tangents = make((1, 2, 1, t, t, 8, 8), mask=mask)
    _, key, value, _ = forward
    with ops.dispatch.backend("triton"):
        expected = both(forward, grads, tangents)
        key[:, 16:48], value[:, 16:48] = NAN, NAN
        for x in tangents[1:]:
            x[:, :, 16:48] = NAN
        out = both(forward, grads, tangents)
    # The span of the first queries ends, and that of the last begins, before the poison.
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    assert not out[1][:, :, 16:48].any() and not out[2][:, :, 16:48].any()


def test_attention_forms_nothing_of_all_queries_and_keys(monkeypatch):
    """The reference takes some queries at a time, and any number of them gives the same."""
    args = make((3, 4, 2, 70, 75, 5, 3), torch.float64)
    expected = both(*args)
    monkeypatch.setattr(reference, "_QUERIES", 7)
    for x, y in zip(both(*args), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(0, 3),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    t=st.integers(0, 6),
    extra=st.integers(0, 3),
    e=st.integers(1, 5),
    f=st.integers(1, 5),
)
def test_attention_of_any_shape(count, groups, repeats, t, extra, e, f):
    args = make((count, groups * repeats, groups, t, t + extra, e, f), torch.float64)
    out = both(*args, softcap=2.0)
    for x, like in zip(out, (*args[2], args[1]), strict=True):
        assert x.shape == like.shape
    if count and t:
        for x, y in zip(out, both_plain(*args, softcap=2.0), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------------------- as ops


@pytest.mark.parametrize("op", ["attention_pullback", "attention_pushforward"])
def test_attention_passes_opcheck(op, device):
    forward, grads, tangents = make((2, 4, 2, 5, 5, 6, 3), device=device)
    batch = [grads] if op == "attention_pullback" else tangents
    torch.library.opcheck(getattr(torch.ops.lddyn, op), (*forward, *batch, 0.4, 2.0))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (5, 6), r"query must be \(H, T, e\), got \(5, 6\)"),
        (0, (3, 5, 6), "heads of query must be a multiple of those of key, got 3 and 2"),
        (1, (2, 5, 7), r"key must be \(2, 5, 6\), got \(2, 5, 7\)"),
        (2, (2, 6, 3), r"value must be \(2, 5, 3\), got \(2, 6, 3\)"),
        (3, (2, 5, 5), "mask must have 1 or 4 heads, got 2"),
        (4, (2, 4, 5, 6), r"grads must be \(C, 4, 5, 3\), with one C for all, got"),
    ],
)
def test_attention_says_what_is_wrong(index, shape, message):
    forward, grads, _ = make((2, 4, 2, 5, 5, 6, 3))
    args = [*forward, grads]
    args[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        ops.attention_pullback(*args, 0.4)
