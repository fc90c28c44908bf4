"""The C++ kernel of attention: tiles, bands, skipped keys and rows, threads."""

import pytest
import torch
from test_attention_ops import both, both_plain, causal, double, make

import lddyn
from lddyn import ops
from lddyn.ops import attention

pytestmark = pytest.mark.skipif(
    "cpp" not in ops.OPS["attention_pullback"].implementations
    or bool(ops.OPS["attention_pullback"].refusal("cpp", torch.device("cpu"))),
    reason="NO C++: lddyn._C was not built",
)

# (C, H, G, T, S, e, f): around the tiles of 64 queries and 256 keys, and widths around vectors.
SHAPES = [
    (2, 2, 1, 63, 63, 16, 16),
    (2, 4, 2, 65, 65, 24, 8),
    (2, 2, 2, 130, 131, 20, 31),
    (1, 2, 1, 70, 270, 33, 64),
    (2, 1, 1, 300, 300, 64, 48),
]


@pytest.mark.parametrize("band", [64, 1 << 22], ids=["bands", "one band"])
@pytest.mark.parametrize("window", [None, 9, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_tiles_and_bands(shape, window, band, monkeypatch, assert_accurate):
    """Several bands of 64 queries, each with keys of its own, add up to the same."""
    monkeypatch.setattr(attention, "_BAND", band)
    forward, grads, tangents = make(shape, mask=causal(*shape[3:5], window))
    with lddyn.backend("cpp"):
        out = both(forward, grads, tangents, softcap=3.0)
    truth = both_plain(double(*forward), grads.double(), double(*tangents), softcap=3.0)
    rough = both_plain(forward, grads, tangents, softcap=3.0)
    for result, expected, other in zip(out, truth, rough, strict=True):
        assert_accurate(result, expected, other, torch.float32)


def test_rows_of_zeros_are_skipped_and_change_nothing(assert_accurate):
    """A causal cotangent is zero beyond its own position; one is zero everywhere."""
    shape = (5, 4, 2, 150, 150, 16, 16)
    forward, grads, tangents = make(shape)
    for c, reach in enumerate((1, 63, 64, 149, 0)):
        grads[c, :, reach:] = 0
    with lddyn.backend("cpp"):
        out = both(forward, grads, tangents)
    truth = both_plain(double(*forward), grads.double(), double(*tangents))
    rough = both_plain(forward, grads, tangents)
    for result, expected, other in zip(out, truth, rough, strict=True):
        assert_accurate(result, expected, other, torch.float32)
    assert not any(bool(x[4].any()) for x in out[:3])
    assert not bool(out[0][0, :, 1:].any()) and not bool(out[1][0, :, 1:].any())


def test_a_nan_in_a_cotangent_is_not_skipped():
    forward, grads, _ = make((2, 2, 1, 70, 70, 16, 16))
    grads[1] = 0
    grads[1, 0, 5, 3] = torch.nan
    with lddyn.backend("cpp"):
        out = ops.attention_pullback(*forward, grads, 0.4)
    assert all(bool(x[1].isnan().any()) and not bool(x[0].isnan().any()) for x in out)


def test_bits_depend_on_neither_threads_nor_batch():
    forward, grads, tangents = make((6, 4, 2, 200, 200, 64, 64))
    before = torch.get_num_threads()
    results = []
    try:
        with lddyn.backend("cpp"):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(both(forward, grads, tangents))
            parts = [
                both(forward, grads[i : i + 2], [t[i : i + 2] for t in tangents]) for i in (0, 2, 4)
            ]
    finally:
        torch.set_num_threads(before)
    results.append([torch.cat(x) for x in zip(*parts, strict=True)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_any_strides_are_read_in_place():
    """Heads behind tokens, as a projection leaves them; and one gradient for all cotangents."""
    forward, grads, tangents = make((3, 4, 2, 90, 90, 16, 16))
    behind = grads.transpose(1, 2).contiguous().transpose(1, 2)
    with lddyn.backend("cpp"):
        expected = both(forward, grads, tangents)
        turned = both(forward, behind, tangents)
        alike = ops.attention_pullback(*forward, grads[:1].expand(3, -1, -1, -1), 0.4)
    assert all(torch.equal(x, y) for x, y in zip(expected, turned, strict=True))
    assert all(torch.equal(x[0], y[0]) for x, y in zip(expected, alike, strict=False))
