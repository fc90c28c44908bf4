"""`covering`: every two values meet, in few cases, always the same ones."""

import itertools

from covering import covering

AXES = {"shape": range(9), "dtype": range(4), "backend": ["cpp", "triton"], "flag": [False, True]}


def pairs(axes, cases):
    """Pairs of (axis, value) that occur together in a case."""
    named = (list(zip(axes, case, strict=True)) for case in cases)
    return {pair for case in named for pair in itertools.combinations(case, 2)}


def test_every_two_values_meet():
    full = list(itertools.product(*AXES.values()))
    cases = covering(AXES)
    assert pairs(AXES, cases) == pairs(AXES, full)
    assert len(cases) < len(full) / 3 and len(set(cases)) == len(cases)
    assert cases == covering(AXES)


def test_a_case_that_is_not_allowed_is_left_out_and_its_pairs_are_kept_by_others():
    def allowed(shape, dtype, backend, flag):
        return not (backend == "triton" and dtype == 3) and not (shape == 8 and flag)

    kept = [case for case in itertools.product(*AXES.values()) if allowed(*case)]
    cases = covering(AXES, allowed)
    assert set(cases) <= set(kept)
    assert pairs(AXES, cases) == pairs(AXES, kept)


def test_one_axis_keeps_its_values_and_an_empty_one_has_no_case():
    assert covering({"shape": "abc"}) == [("a",), ("b",), ("c",)]
    assert covering({"shape": "abc", "dtype": []}) == []
