"""Every opponent of the influence table must be right before its time means anything."""

import copy

import pytest
import torch
from influence import build
from opponents import METHODS, textbook

SIZES = {"hidden": 128, "layers": 2, "length": 24, "response": 7, "vocabulary": 300}


@pytest.fixture(scope="module")
def problem():
    """Models by attention, two sequences of different lengths, the truths and their model."""
    models = {}
    for attention in ("eager", "sdpa"):
        models[attention], (one, other) = build(SIZES, attention)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in models[attention].named_parameters():
                if "norm" in name:  # fresh gains are all 1, and hide a missing factor
                    parameter.add_(0.3 * torch.randn_like(parameter))
    other = other._replace(prompt=other.prompt[:9], response=one.prompt[:5] + other.response)
    # In float64: the sums of float32 Jacobian rows are the least exact of all methods.
    exact = copy.deepcopy(models["eager"]).double()
    truth = {own: textbook(exact, one, one if own else other).float() for own in (False, True)}
    return models, one, other, truth, exact


@pytest.mark.parametrize("own", [False, True], ids=["two sequences", "one sequence"])
@pytest.mark.parametrize("name", METHODS)
def bench_agrees(problem, name, own):
    method = METHODS[name]
    if method.missing or method.needs:
        pytest.skip("a library, measured in an environment of its own")
    models, one, other, truth = problem[:4]
    table = method.run(models[method.attention], one, one if own else other)
    assert (table - truth[own]).norm() < 5e-6 * truth[own].norm()


@pytest.mark.parametrize("own", [False, True], ids=["two sequences", "one sequence"])
def bench_truth(problem, own):
    """In float64 (up to the float32 that transformers' norms keep), what stands in for truth."""
    _, one, other, truth, exact = problem
    table = METHODS["hand-written Llama"].run(exact, one, one if own else other)
    assert (table - truth[own]).norm() < 3e-7 * truth[own].norm()
