"""The budget's arithmetic, on a clock that the test moves."""

import math
from types import SimpleNamespace

import pytest

from lddyn.integrations.budget import Budget, budget_share


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("lddyn.integrations.budget.time", clock)
    return clock


def spend(budget, clock, seconds):
    with budget.paid():
        clock.now += seconds


def test_a_share_is_a_number_or_a_percentage():
    assert budget_share("5%") == budget_share(" 5% ") == budget_share(0.05) == 0.05
    assert budget_share(2) == 2.0
    for wrong in ("", "much", "-5%", 0, math.nan, math.inf, "1e999%", None):
        with pytest.raises(ValueError, match="budget must be a share such as"):
            budget_share(wrong)


def test_passes_are_afforded_when_training_has_taken_long_enough(clock):
    budget = Budget(0.1)
    spend(budget, clock, 1.0)
    budget.complete_pass()
    assert budget.cost == 1.0 and budget.overhead == math.inf and not budget.affords(1)
    clock.now += 19.0
    assert budget.overhead == pytest.approx(1 / 19) and not budget.affords(1)
    clock.now += 1.5
    assert budget.affords(1) and not budget.affords(2)
    clock.now += 10.0
    assert budget.affords(2)


def test_the_next_pass_is_taken_to_last_as_long_as_the_longest_of_three(clock):
    budget = Budget(1.0)
    for seconds in (8.0, 1.0, 2.0, 3.0):
        spend(budget, clock, seconds)
        budget.complete_pass()
    assert budget.cost == 3.0


def test_what_precedes_a_step_belongs_to_its_pass_even_after_an_error(clock):
    budget = Budget(1.0)
    with pytest.raises(KeyError), budget.paid():
        clock.now += 2.0
        raise KeyError
    spend(budget, clock, 1.0)
    budget.complete_pass()
    assert budget.cost == 3.0
