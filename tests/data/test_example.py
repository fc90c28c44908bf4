"""Example: ids, masks, positions, content ids, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lddyn.data.example import Example
from lddyn.errors import EmptyResponseError, ExampleError


def test_example_positions_predict_targets():
    ex = Example(prompt_ids=[5, 6, 7], response_ids=[1, 2, 3, 4])
    assert ex.ids == (5, 6, 7, 1, 2, 3, 4)
    assert ex.positions == (2, 3, 4, 5)
    assert [ex.ids[p + 1] for p in ex.positions] == list(ex.targets) == [1, 2, 3, 4]
    assert (len(ex), ex.length) == (4, 7)


def test_example_mask_selects_tokens():
    ex = Example([5, 6], [1, 2, 3, 4], response_mask=[False, True, False, True], tokens="abcd")
    assert ex.positions == (2, 4)
    assert ex.targets == (2, 4)
    assert ex.token_texts == ("b", "d")
    assert len(ex) == 2


def test_example_full_mask_is_no_mask():
    plain = Example([5], [1, 2])
    masked = Example([5], [1, 2], response_mask=[True, True])
    assert masked.response_mask is None
    assert masked == plain
    assert hash(masked) == hash(plain)


def test_example_texts_fall_back_to_ids():
    ex = Example([5, 6], [1, 2])
    assert ex.token_texts == ("1", "2")
    assert ex.prompt_texts == ("5", "6")


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.array, torch.tensor, iter, lambda v: [np.int64(x) for x in v]],
    ids=["list", "tuple", "numpy", "torch", "iterator", "numpy-scalars"],
)
def test_example_accepts_integer_sequences(convert):
    ex = Example(convert([5, 6]), convert([1, 2]))
    assert ex == Example([5, 6], [1, 2])
    assert all(type(token) is int for token in ex.ids)


def test_example_is_frozen():
    with pytest.raises(AttributeError):
        Example([5], [1]).name = "other"


def test_content_id_depends_on_ids_split_and_mask_only():
    base = Example([5, 6], [1, 2])
    assert base.content_id == Example([5, 6], [1, 2], name="x", tokens=["a", "b"]).content_id
    others = [
        Example([5], [6, 1, 2]),
        Example([5, 6, 1], [2]),
        Example([5, 6], [1, 3]),
        Example([5, 6], [1, 2], response_mask=[True, False]),
        Example([5, 6], [1, 2], response_mask=[False, True]),
    ]
    assert len({base.content_id, *(ex.content_id for ex in others)}) == 6


def test_content_id_is_stable():
    assert Example([5, 6], [1, 2]).content_id == "539775930581b9eb5a602a883b610036"


@pytest.mark.parametrize(
    ("prompt", "response", "problem", "text"),
    [
        ([], [1], "empty_prompt", "use the BOS token"),
        ([-1], [1], "bad_token_id", r"prompt_ids\[0\] must be a token id >= 0, got -1"),
        ([1], [2, -100], "bad_token_id", r"response_ids\[1\] .* got -100 \(labels hold it"),
        ([1.5], [1], "bad_token_id", r"prompt_ids\[0\] must be an integer token id, got 1.5"),
        ([1], [True], "bad_token_id", "got True"),
        ([1], [None], "bad_token_id", "got None"),
        ([1], [10**23], "bad_token_id", "of at most 2147483647, got a longer number"),
        ("hello", [1], "bad_token_id", "tokenise text first"),
        (3, [1], "bad_token_id", "sequence of token ids, got int"),
        ([1], torch.ones(1, 2, dtype=torch.long), "bad_token_id", r"response_ids\[0\]"),
    ],
)
def test_example_refuses_bad_ids(prompt, response, problem, text):
    with pytest.raises(ExampleError, match=text) as caught:
        Example(prompt, response)
    assert caught.value.problem == problem
    assert isinstance(caught.value, ValueError)


def test_example_refuses_empty_response():
    with pytest.raises(EmptyResponseError, match="at least 1 token, got 0"):
        Example([1], [])


@pytest.mark.parametrize(
    ("mask", "text"),
    [([True], "2 entries.*got 1"), ([True] * 3, "2 entries.*got 3"), ([False] * 2, "all False")],
)
def test_example_refuses_bad_mask(mask, text):
    with pytest.raises(ExampleError, match=text):
        Example([1], [2, 3], response_mask=mask)


def test_example_refuses_wrong_number_of_texts():
    with pytest.raises(ExampleError, match=r"tokens must have 2 entries.*got 1"):
        Example([1], [2, 3], tokens=["a"])


def test_check_model_limits():
    ex = Example([1, 2], [9, 3])
    ex.check_model_limits(10, 4)
    ex.check_model_limits(10)
    with pytest.raises(ExampleError, match=r"ids\[2\] must be < vocab_size 9, got token id 9"):
        ex.check_model_limits(9, 4)
    with pytest.raises(ExampleError, match="<= 3, the model's context, got 4 tokens"):
        ex.check_model_limits(10, 3)


def test_reading_and_encoding_need_neither_torch_nor_transformers():
    code = (
        "import sys; from lddyn.data import audit, encode, example, read, rows;"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
