"""Questions that are asked once of each model."""

import gc

import pytest
import torch
from torch import nn

from lddyn.engine.trial import PACKED, WHOLE_STEP, Trial, UnfitError, close, fallbacks


def test_a_verdict_is_remembered_with_its_reason():
    trial, model, calls = Trial("turns round"), nn.Linear(2, 2), []

    def check():
        calls.append(1)
        raise UnfitError("it is square")

    assert not trial.passes(model, "float32", check)
    assert not trial.passes(model, "float32", check)
    assert len(calls) == 1
    assert trial.passes(model, "float64", lambda: True)
    assert trial.verdict(model, "float32") is False and trial.verdict(model, "int8") is None
    assert fallbacks(model) == {"turns round (float32)": "UnfitError: it is square"}
    assert fallbacks(nn.Linear(2, 2)) == {}


def test_a_larger_size_is_tried_anew():
    trial, model, sizes = Trial("fits"), nn.Linear(2, 2), []

    def check(size):
        return trial.passes(model, "", lambda: bool(sizes.append(size)) or size < 10, size=size)

    assert [check(n) for n in (5, 4, 5, 9, 12, 11, 3)] == [True] * 4 + [False] * 3
    assert sizes == [5, 9, 12]
    assert fallbacks(model) == {"fits": "the results differ"}


def test_what_an_exception_means():
    model = nn.Linear(2, 2)

    def broken():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        Trial("strict").passes(model, "", broken)
    assert not Trial("tolerant", tolerant=True).passes(model, "", broken)
    trial, calls = Trial("large", tolerant=True), []

    def too_large():
        calls.append(1)
        raise torch.OutOfMemoryError

    assert not trial.passes(model, "", too_large) and not trial.passes(model, "", too_large)
    assert len(calls) == 2 and "large" not in fallbacks(model)


def test_an_attempt_that_failed_is_not_repeated():
    trial, model, calls = Trial("works"), nn.Linear(2, 2), []

    def run(fails):
        calls.append(fails)
        if fails:
            raise UnfitError("no")
        return 7

    assert trial.attempt(model, "a", lambda: run(False)) == 7
    assert trial.attempt(model, "a", lambda: run(True)) is None
    assert trial.attempt(model, "a", lambda: run(False)) is None
    assert calls == [False, True]


def test_verdicts_go_with_their_owner():
    trial, model = Trial("lives"), nn.Linear(2, 2)
    trial.settle(model, "", True)
    assert len(trial._owners) == 1
    del model
    gc.collect()
    assert len(trial._owners) == 0


def test_closeness():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1000.0, 0.0]])
    moved = x + torch.tensor([[0.1, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert close(moved, x, 1e-3) and not close(moved, x, 1e-3, by_row=True)
    assert close(x, x, 0.0, by_row=True)
    assert not close(x * float("nan"), x, 1.0) and not close(x * float("nan"), x, 1.0, by_row=True)
    assert PACKED.of(torch.bfloat16) == 8 * torch.finfo(torch.bfloat16).eps
    assert PACKED.of(torch.float16) == 8 * torch.finfo(torch.float16).eps
    mixed = [torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int)]
    assert WHOLE_STEP.loosest(mixed) == 0.2 and WHOLE_STEP.loosest(mixed[:1]) == 1e-3
