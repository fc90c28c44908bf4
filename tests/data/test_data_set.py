"""The rows of a data set as distinct examples."""

import pytest

from lddyn.data.data_set import distinct_examples
from lddyn.errors import ExampleError

ROW = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}


def test_distinct_examples_keep_the_index_of_the_first():
    rows = [ROW, ROW, ROW | {"chosen_ids": [8]}]
    examples, left_out = distinct_examples(None, rows)
    assert list(examples) == [0, 1, 4] and not left_out
    assert list(distinct_examples(None, rows, ["chosen"])[0]) == [0, 2]


def test_distinct_examples_say_which_row_cannot_be_used():
    def check(example):
        example.check_model_limits(8)

    rows = [ROW, ROW | {"chosen_ids": [9]}, {}]
    with pytest.raises(ExampleError, match=r"row 1, chosen: ids\[2\] must be < vocab_size 8"):
        distinct_examples(None, rows, check=check)
    with pytest.raises(ExampleError, match="row 2, prompt: "):
        distinct_examples(None, rows)
    examples, left_out = distinct_examples(None, rows, check=check, skip=True)
    assert list(examples) == [0, 1] and [line[:5] for line in left_out] == ["row 1", "row 2"]
