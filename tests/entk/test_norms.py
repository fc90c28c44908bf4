"""Norms and traces against the dense kernel in true float64: exact, unbiased, rightly sure."""

import functools

import pytest
import torch
import zoo

import lddyn
from lddyn.engine.factors import BodyRows
from lddyn.engine.guard import true_float64
from lddyn.entk.norms import (
    Sampling,
    block_squares,
    block_traces,
    effective_samples,
    pushed_squares,
    root,
    row_squares,
    span_basis,
)
from lddyn.entk.products import KernelProducts

torch.set_num_threads(1)

SEEDS = 1000
MODELS = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "bias": ("phi", {}),
    "soft-capped": ("gemma2", {}),
    "scaled": ("granite", {"tie_word_embeddings": False}),
    "conv1d": ("gpt2", {"tie_word_embeddings": True}),
    "experts": ("mixtral", {}),
}
BENT = ("soft-capped", "scaled")


@functools.cache
def trained(name):
    architecture, changes = MODELS[name]
    return zoo.train(zoo.build(architecture, **changes))


@functools.cache
def truth(name):
    return zoo.dense_kernel(trained(name), *zoo.examples())


def kernel(name, **options):
    return lddyn.ntk(trained(name), *zoo.examples(), **options)


def norms(dense, reduce="none"):
    square = dense.pow(2).sum((2, 3))
    return {"none": square, "row": square.sum(1), "all": square.sum()}[reduce].sqrt()


def inside(estimate, value):
    low, high = estimate.interval(0.95)
    return (low <= value) & (value <= high)


# --------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    ("name", "centred"),
    [*((n, True) for n in MODELS if n not in BENT), ("untied", False), ("tied", False)],
)
def test_all_directions_are_exact(name, centred):
    dense = zoo.centred(truth(name)) if centred else truth(name)
    found = kernel(name).frobenius(centred=centred)
    assert found.value.dtype == torch.float64 and not found.stderr.any()
    assert torch.allclose(found.value, norms(dense), rtol=5e-6, atol=0)
    trace = kernel(name).trace(centred=centred)
    expected = dense.diagonal(dim1=2, dim2=3).sum(-1)
    assert not trace.stderr.any()
    assert float((trace.value - expected).abs().max()) <= 5e-6 * float(norms(dense).max())


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_exact_in_float64(name):
    model, example = zoo.double(trained(name)), zoo.examples()[0]
    dense = zoo.centred(zoo.dense_kernel(trained(name), example, example))
    with true_float64():
        found = lddyn.ntk(model, example, example).frobenius()
    assert torch.allclose(found.value, norms(dense), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_memory_and_sharing_change_nothing(name, monkeypatch):
    """One sequence on both sides is pulled once; updated tokens are taken some at a time."""
    example = zoo.examples()[0]
    own = lddyn.ntk(trained(name), example, example)
    twice = lddyn.NTK(own.observed, own.observed.anatomy.trace(example), memory="2MB")
    first, other = (k.frobenius(0.9, directions=2, probes=4) for k in (own, twice))
    assert lddyn.NTK(own.observed, own.observed, "200KB").products.tokens_at_once(16, 24) == 5
    monkeypatch.setattr(KernelProducts, "tokens_at_once", lambda *sizes: 4)
    for found in (other, own.frobenius(0.9, directions=2, probes=4)):
        assert torch.allclose(found.value, first.value, rtol=1e-5, atol=0)
        assert torch.allclose(found.stderr, first.stderr, rtol=1e-3, atol=0)


def test_a_frozen_head_has_no_part_of_its_own():
    model = zoo.lora("llama")
    dense = zoo.dense_kernel(model, *zoo.examples())
    found = lddyn.ntk(model, *zoo.examples()).frobenius(centred=False)
    assert torch.allclose(found.value, norms(dense), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------- through the engine


ASKED = [("untied", "none"), ("soft-capped", "none"), ("tied", "row"), ("bias", "all")]


@pytest.mark.parametrize(("name", "reduce"), ASKED)
def test_unbiased_through_the_engine(name, reduce):
    """A few seeds of the real engine; the oracle below takes thousands."""
    ask = kernel(name).frobenius
    seeds = 8 if reduce == "none" and name not in BENT else 5
    options = {"directions": 4, "probes": 8, "rtol": 0.9, "reduce": reduce}
    found = [ask(squared=True, seed=s, **options) for s in range(seeds)]
    values = torch.stack([f.value for f in found])
    square = norms(zoo.centred(truth(name)), reduce).pow(2)
    errors = torch.stack([f.stderr for f in found]).pow(2).mean(0).sqrt()
    z = (values.mean(0) - square) / (errors / seeds**0.5)
    assert float(z.abs().max()) <= 4.5
    assert not torch.equal(values[0], values[1])
    again = ask(squared=True, seed=1, **options)
    assert torch.equal(again.value, values[1])


@pytest.mark.parametrize(
    ("name", "reduce", "centred"),
    [
        ("untied", "none", True),
        ("tied", "none", False),
        ("tied", "row", True),
        ("untied", "all", False),
    ],
)
def test_preconditioned(name, reduce, centred):
    model = trained(name)
    generator = torch.Generator().manual_seed(3)
    scale = {
        n: torch.rand(p.shape, generator=generator) ** 4 + 0.01 for n, p in model.named_parameters()
    }
    dense = zoo.dense_kernel(model, *zoo.examples(), scale)
    dense = zoo.centred(dense) if centred else dense
    found = kernel(name).frobenius(
        0.9, centred=centred, reduce=reduce, precondition=scale, directions=24, probes=16
    )
    z = (found.value - norms(dense, reduce)) / found.stderr
    assert float(z.abs().max()) <= 5
    assert float((found.stderr / found.value).max()) <= 0.15


@pytest.mark.parametrize("name", ["tied", "soft-capped"])
def test_rtol_is_met(name):
    dense = norms(zoo.centred(truth(name)))
    for rtol in (0.2, 0.05):
        found = kernel(name).frobenius(rtol)
        assert float((found.stderr / found.value).max()) <= rtol
        assert float(((found.value - dense) / dense).abs().max()) <= 4 * rtol
    total = kernel(name).frobenius(0.02, reduce="all")
    assert float(total.stderr / total.value) <= 0.025
    assert abs(float(total.value / norms(zoo.centred(truth(name)), "all")) - 1) <= 0.08


def test_a_limit_that_is_reached_is_said():
    with pytest.warns(UserWarning, match=r"above rtol = 0.001, with 8 directions .*limit = 24"):
        found = kernel("untied").frobenius(0.001, limit=24)
    assert bool((found.stderr > 0).all())
    with pytest.warns(UserWarning, match=r"2 directions and 4 probes \(given\)"):
        kernel("untied").frobenius(0.001, directions=2, probes=4)
    with pytest.warns(UserWarning, match="limit = 30"):
        kernel("untied").frobenius(0.001, reduce="all", limit=30)


def test_saved_and_read_back(tmp_path):
    found = kernel("untied").frobenius(0.9, directions=4, probes=8)
    found.save(tmp_path / "norms")
    read = lddyn.Estimate.load(tmp_path / "norms")
    assert torch.equal(read.value, found.value) and read.samples == found.samples


def test_bad_input():
    ask = kernel("untied").frobenius
    for options, match in (
        ({"rtol": 0}, "rtol must be between 0 and 1, got 0"),
        ({"probes": 3}, "probes must be 4 or more .*got 3"),
        ({"directions": -1}, "directions must be 0 or more, got -1"),
        ({"limit": 2}, "limit must be 8 or more, got 2"),
        ({"reduce": "sum"}, "reduce must be 'none', 'row' or 'all', got 'sum'"),
        ({"precondition": {}}, r"precondition must hold a tensor \(89, 32\) for .*got None"),
    ):
        with pytest.raises(ValueError, match=match):
            ask(**options)
    with pytest.raises(NotImplementedError, match="changes its logits after the head"):
        kernel("soft-capped").trace()


# --------------------------------------------------------------------------- thousands of seeds


class Oracle:
    """The same estimators, fed with products of the dense kernel of a trained model."""

    def __init__(self, tied, centred, vocabulary=127, width=32):
        changes = {"vocab_size": vocabulary, "hidden_size": width, "tie_word_embeddings": tied}
        model = zoo.train(zoo.build("llama", **changes))
        examples = [
            lddyn.Example(prompt_ids=[5, 9, 33], response_ids=[21, 9, 40]),
            lddyn.Example(prompt_ids=[5, 9, 12], response_ids=[40, 7]),
        ]
        dense = zoo.dense_kernel(model, *examples)
        exact = zoo.double(model)
        with true_float64():
            hidden = [
                exact.model(input_ids=torch.tensor([e.ids]))
                .last_hidden_state[0][list(e.positions)]
                .detach()
                for e in examples
            ]
        self.head = hidden[0] @ hidden[1].T
        ids = torch.tensor(sorted({i for e in examples for i in e.ids}))[: None if tied else 0]
        self.weight = exact.lm_head.weight.detach()
        self.basis = span_basis(self.weight, ids, centred)
        self.identity = vocabulary - int(centred)
        # K − c I = U M Uᵀ, and a product of cotangents below the head is one of rows with M.
        span = torch.cat([self.weight, torch.eye(vocabulary, dtype=torch.float64)[:, ids]], 1)
        body = dense - self.head[:, :, None, None] * torch.eye(vocabulary)
        inverse = torch.linalg.pinv(span)
        self.middle = inverse @ body @ inverse.T
        assert torch.allclose(span @ self.middle @ span.T, body, atol=1e-9 * float(body.max()))
        self.dense = zoo.centred(dense) if centred else dense

    def blocks(self, observed: BodyRows, updated: BodyRows):
        one, other = (torch.cat([r.hidden, r.picked], 1) for r in (observed, updated))
        yield slice(0, 2), torch.einsum("ai,mlij,bj->malb", one, self.middle, other)

    def product(self, v):
        return torch.einsum("mlvw,lw->mv", self.dense, v)

    def transposed(self, v):
        return torch.einsum("mlvw,mv->lw", self.dense, v)

    def image_squares(self, v):
        return torch.einsum("mlvw,w->mlv", self.dense, v).pow(2).sum(-1)


@functools.cache
def oracle(tied=False, centred=True):
    return Oracle(tied, centred)


def check_estimates(found, expected):
    """Unbiased within 3 σ, and intervals that hold the truth in 93 to 97 % of the seeds."""
    values = torch.stack([f.value for f in found])
    z = (values.mean(0) - expected) / (values.std(0) / len(found) ** 0.5)
    assert float(z.abs().max()) <= 3, z
    held = torch.stack([inside(root(f), expected.sqrt()) for f in found]).double().mean(0)
    assert 0.93 <= float(held.mean()) <= 0.97, held


@pytest.mark.parametrize(
    ("tied", "centred", "r", "q", "seeds"),
    [
        (False, True, 16, 16, 4 * SEEDS),  # what frobenius starts with
        (False, True, 8, 8, SEEDS),
        (False, False, 16, 16, SEEDS),
        (True, True, 8, 8, SEEDS),
        (True, False, 16, 16, SEEDS),
    ],
)
def test_deflated_probes_are_unbiased_and_cover(tied, centred, r, q, seeds):
    o = oracle(tied, centred)
    found = [
        block_squares(o.blocks, o.basis, o.head, o.identity, Sampling(0.9, r, q, seed=seed))
        for seed in range(seeds)
    ]
    check_estimates(found, o.dense.pow(2).sum((2, 3)))


def test_pushed_probes_are_unbiased_and_cover():
    o = oracle(tied=True)
    found = [
        pushed_squares(o.image_squares, o.weight, o.basis, True, Sampling(0.9, 4, 8, seed=seed))
        for seed in range(SEEDS)
    ]
    check_estimates(found, o.dense.pow(2).sum((2, 3)))


@pytest.mark.parametrize(
    ("k", "q", "whole"), [(0, 16, False), (4, 12, True)], ids=["hutchinson-row", "hutch++-all"]
)
def test_row_and_whole_norms_are_unbiased_and_cover(k, q, whole):
    o = oracle()
    shapes = (torch.Size([3, 127]), torch.Size([2, 127]))
    like = torch.zeros((), dtype=torch.float64)
    found = [
        row_squares(
            o.product, o.transposed, shapes, True, whole, like, Sampling(0.9, k, q, seed=seed)
        )
        for seed in range(SEEDS)
    ]
    square = o.dense.pow(2).sum((1, 2, 3))
    check_estimates(found, square.sum() if whole else square)


def test_traces_are_unbiased_and_cover():
    o = oracle(tied=True)
    found = [
        block_traces(o.blocks, o.basis, o.head, o.identity, Sampling(0.9, 8, 8, seed=seed))
        for seed in range(SEEDS)
    ]
    expected = o.dense.diagonal(dim1=2, dim2=3).sum(-1)
    values = torch.stack([f.value for f in found])
    z = (values.mean(0) - expected) / (values.std(0) / SEEDS**0.5)
    assert float(z.abs().max()) <= 3, z
    held = torch.stack([inside(f, expected) for f in found]).double().mean()
    assert 0.93 <= float(held) <= 0.97, held


def test_effective_samples():
    """Normal values are worth what they are; squares of normal values (κ = 12) far less."""
    normal = torch.randn(4000, 16, dtype=torch.float64)
    assert 15 <= effective_samples(normal) <= 16
    assert 3 <= effective_samples(normal.pow(2)) <= 5
    assert effective_samples(normal[:1]) <= 6  # one entry cannot tell


# --------------------------------------------------------------------------- kernels of low rank


@pytest.mark.parametrize("reduce", ["row", "all"])
@pytest.mark.parametrize("is_centred", [False, True], ids=["plain", "centred"])
def test_more_directions_than_the_kernel_has(reduce, is_centred):
    """Where K is exhausted, what else QR finds adds nothing: a shift of all logits is not seen."""
    model = zoo.build("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("ln_f.bias"))
    examples = zoo.examples()
    kernel = lddyn.ntk(model, *examples)
    dense = zoo.dense_kernel(model, *examples)
    wanted = norms(zoo.centred(dense) if is_centred else dense, reduce)
    found = kernel.frobenius(reduce=reduce, centred=is_centred, directions=48, probes=8)
    assert torch.allclose(found.value, wanted, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["row", "all"])
def test_more_directions_than_there_are_logits(reduce):
    model = zoo.build("llama", vocab_size=3)
    example = lddyn.Example(prompt_ids=[1, 2], response_ids=[0])
    found = lddyn.ntk(model, example, example).frobenius(reduce=reduce)
    wanted = norms(zoo.centred(zoo.dense_kernel(model, example, example)), reduce)
    assert torch.allclose(found.value, wanted, rtol=1e-5)
