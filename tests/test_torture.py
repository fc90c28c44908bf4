"""A small part of `make torture`: each promise is tried a few times."""

import itertools
import json

import pytest
import torture

FEW = {"watched runs": 40, "lab results": 20, "power losses": 6, "killed saves": 2} | {
    "fuzzed rows": 25,
    "fuzzed files": 25,
}


@pytest.mark.parametrize("name", FEW)
def test_a_few_attempts_of_each_promise(name, tmp_path):
    """The others have tests of their own: test_results, store/test_damage, engine/test_turns."""
    (promise,) = (p for p in torture.PROMISES if p.name == name)
    failures = list(itertools.islice(promise.attempts(tmp_path, 0), FEW[name]))
    assert failures == [""] * FEW[name]


def test_it_goes_on_where_it_stopped_and_writes_a_table(tmp_path):
    state, kept = {"attempted": 3, "survived": 3, "failed": []}, tmp_path / "state.json"
    tried = []

    def attempts(folder, first):
        for number in itertools.count(first):
            tried.append(number)
            yield "broken" if number == 5 else ""

    promise = torture.Promise("stores", "hold", 7, attempts)
    torture.run(promise, state, promise.target, lambda: kept.write_text(json.dumps(state)))
    assert tried == [3, 4, 5, 6] and json.loads(kept.read_text()) == state
    assert state == {"attempted": 7, "survived": 6, "failed": ["broken"]}
    assert "| stores | 7 | 6 | 1 | damaged files" in torture.table({"stores": state})
