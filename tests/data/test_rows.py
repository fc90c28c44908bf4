"""Data rows of every format to examples."""

import pytest
import torch
from chats import TEMPLATE, assistant, user

from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.data.rows import encode_row
from lddyn.errors import EmptyResponseError, ExampleError

PROMPT = "Where do cats sleep?"


def test_row_prompt_completion(tokenizer):
    got = encode_row(tokenizer, {"prompt": PROMPT, "completion": " There", "label": True})
    assert got == {"completion": encode(tokenizer, PROMPT, " There", name="completion")}


def test_row_preference(tokenizer):
    row = {"prompt": PROMPT, "chosen": " There", "rejected": " Here"}
    got = encode_row(tokenizer, row)
    assert list(got) == ["chosen", "rejected"]
    for name, ex in got.items():
        assert ex == encode(tokenizer, PROMPT, row[name], name=name)


def test_row_pair_shares_its_prompt_tokens(tokenizer):
    row = {"prompt": "The ket", "chosen": "tle is red.", "rejected": " is red."}
    got = encode_row(tokenizer, row)
    assert got["chosen"].prompt_ids == got["rejected"].prompt_ids
    text = "".join((*got["rejected"].prompt_texts, *got["rejected"].token_texts))
    assert text == "The ket is red.<|im_end|>"


def test_row_of_text_without_a_tokenizer():
    with pytest.raises(ExampleError, match="must have a tokenizer, got None"):
        encode_row(None, {"prompt": PROMPT, "completion": " There"})


def test_row_further_fields(tokenizer):
    row = {"prompt": PROMPT, "chosen": " There", "rejected": " Here", "irr_train": " Four", "n": 3}
    assert list(encode_row(tokenizer, row, ["irr_train"])) == ["chosen", "rejected", "irr_train"]
    assert list(encode_row(tokenizer, row, "all")) == ["chosen", "rejected", "irr_train"]
    assert list(encode_row(tokenizer, row, ["chosen"])) == ["chosen", "rejected"]
    bare = {"prompt": PROMPT, "irr_train": " Four", "random_permute": " ruoF"}
    assert list(encode_row(tokenizer, bare, ["random_permute"])) == ["random_permute"]
    with pytest.raises(ExampleError, match="'irr_test'"):
        encode_row(tokenizer, row, ["irr_test"])
    with pytest.raises(ExampleError, match="n must be text"):
        encode_row(tokenizer, row, ["n"])


def test_row_skips_empty_fields_on_demand(tokenizer):
    row = {"prompt": PROMPT, "chosen": " There", "rejected": " Here", "irr_train": ""}
    with pytest.raises(EmptyResponseError):
        encode_row(tokenizer, row, "all")
    assert list(encode_row(tokenizer, row, "all", skip_empty=True)) == ["chosen", "rejected"]


def test_row_text(tokenizer):
    ex = encode_row(tokenizer, {"text": "The kettle is red."})["text"]
    assert len(ex.prompt_ids) == 1
    assert tokenizer.decode(ex.ids) == "The kettle is red.<|im_end|>"


def test_row_messages(tokenizer):
    messages = [user("Where?"), assistant("Here."), user("Are you sure?"), assistant("Yes.")]
    ex = encode_row(tokenizer, {"messages": messages})["messages"]
    assert ex == encode(tokenizer, messages[:1], messages[1:], name="messages")
    shared = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]
    ex = encode_row(tokenizer, {"conversations": shared})["messages"]
    assert ex == encode(tokenizer, messages[:1], messages[1:2], name="messages")


def test_row_conversational_pair(tokenizer):
    row = {
        "prompt": [user("Where?")],
        "chosen": [assistant("There.")],
        "rejected": [assistant("No")],
    }
    got = encode_row(tokenizer, row)
    assert "".join(got["rejected"].token_texts) == "No<|im_end|>\n"
    full = {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}
    assert encode_row(tokenizer, full) == got
    assert encode_row(tokenizer, {"prompt": "Where?", **full}) == got  # text beside conversations


def test_row_implicit_prompt_in_text(tokenizer):
    row = {"chosen": "Where? There.", "rejected": "Where? No."}
    got = encode_row(tokenizer, row)
    assert "".join(got["chosen"].prompt_texts) == "Where?"
    assert "".join(got["chosen"].token_texts) == " There.<|im_end|>"
    with pytest.raises(ExampleError, match="identical") as caught:
        encode_row(tokenizer, {"chosen": "Where?", "rejected": "Where?"})
    assert caught.value.problem == "identical_pair"


def test_row_template_arguments(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ mood }}{{ tools | length if tools else 0 }}" + TEMPLATE
    row = {
        "prompt": [user("Where?")],
        "completion": [assistant("Here.")],
        "chat_template_kwargs": {"mood": "calm"},
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    ex = encode_row(chat_tokenizer, row)["completion"]
    assert chat_tokenizer.decode(ex.prompt_ids).startswith("calm1<|im_start|>")


@pytest.mark.parametrize("convert", [list, torch.tensor])
def test_row_input_ids(convert):
    ids = convert([3, 4, 5, 6, 7, 0])
    masks = {
        "labels": convert([-100, -100, 5, -100, 7, -100]),
        "completion_mask": convert([0, 0, 1, 0, 1, 0]),
        "assistant_masks": convert([0, 0, 1, 0, 1, 0]),
    }
    want = Example([3, 4], [5, 6, 7], response_mask=[True, False, True], name="input_ids")
    for column, values in masks.items():
        assert encode_row(None, {"input_ids": ids, column: values}) == {"input_ids": want}
    padded = {"input_ids": ids, "attention_mask": convert([1, 1, 1, 1, 1, 0])}
    assert encode_row(None, padded)["input_ids"] == Example([3], [4, 5, 6, 7], name="input_ids")


@pytest.mark.case("documents packed into one row")
def test_row_packed_documents_are_cut():
    row = {"input_ids": [3, 4, 5, 6, 7], "labels": [3, 4, 5, 6, 7]}
    want = {
        "document_0": Example([3], [4], name="document_0"),
        "document_1": Example([5], [6, 7], name="document_1"),
    }
    assert encode_row(None, {**row, "seq_lengths": [2, 3]}) == want
    assert encode_row(None, {**row, "position_ids": [0, 1, 0, 1, 2]}) == want
    with pytest.raises(ExampleError, match="add up to 5 input ids, got 4"):
        encode_row(None, {**row, "seq_lengths": [2, 2]})


@pytest.mark.parametrize(
    "columns",
    [
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
    ],
)
def test_row_prepared_pairs(columns):
    row = dict(zip(columns, ([1, 2], [3, 0], [4, 0]), strict=True))
    got = encode_row(None, row)
    assert got["chosen"] == Example([1, 2], [3, 0], name="chosen")
    assert got["rejected"] == Example([1, 2], [4, 0], name="rejected")
    with pytest.raises(ExampleError, match=columns[2]):
        encode_row(None, {key: row[key] for key in columns[:2]})


def test_row_prepared_completion():
    got = encode_row(None, {"prompt_ids": [1, 2], "completion_ids": [3, 0]})
    assert got == {"completion": Example([1, 2], [3, 0], name="completion")}


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        ({"prompt": "a", "chosen": " b"}, "rejected", "missing_column"),
        ({"prompt": "a"}, "completion", "missing_column"),
        ({"completion": "a"}, "prompt", "missing_column"),
        ({"question": "a"}, "prompt", "missing_column"),
        ({}, "prompt", "missing_column"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt", "not_text"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen", "not_text"),
        ({"prompt": "a", "chosen": " b", "rejected": 3.0}, "rejected", "not_text"),
        ({"chosen": None, "rejected": None}, "chosen", "not_text"),
        ({"text": None}, "text", "not_text"),
        ({"text": ""}, "text", "empty_response"),
        ({"messages": []}, "messages", "not_text"),
        ({"messages": [{"content": "x"}]}, "messages", "bad_message"),
        ({"prompt": "a", "chosen": "", "rejected": " b"}, "chosen", "empty_response"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "input_ids", "empty_response"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels", "bad_mask"),
        ({"input_ids": [1, 2], "completion_mask": [1]}, "completion_mask", "bad_mask"),
        ({"input_ids": "text"}, "input_ids", "bad_token_id"),
        (
            {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]},
            "chosen_ids",
            "empty_response",
        ),
    ],
)
def test_row_errors_name_the_column(tokenizer, row, column, problem):
    with pytest.raises(ExampleError) as caught:
        encode_row(tokenizer, row)
    assert (caught.value.field, caught.value.problem) == (column, problem)


def test_real_rows_round_trip(hh):
    tokenizer, table = hh
    for row in table[:20]:
        encoded = encode_row(tokenizer, row, "all", skip_empty=True)
        assert set(row) - set(encoded) == {"prompt", *(key for key in row if not row[key])}
        for name, ex in encoded.items():
            assert tokenizer.decode(ex.ids) == row["prompt"] + row[name] + "<|endoftext|>"
            assert ex.ids[:-1] == tuple(tokenizer(row["prompt"] + row[name])["input_ids"])
            assert [ex.ids[p + 1] for p in ex.positions] == list(ex.targets)
