import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lddyn
from lddyn.data import encode as examples
from lddyn.data.audit import Audit, audit
from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.data.read import rows
from lddyn.data.rows import encode_row
from lddyn.errors import EmptyResponseError, ExampleError

SHARED = Path(__file__).resolve().parents[3] / "shared"

CORPUS = [
    "Human: What colour is the kettle? Assistant: The kettle is red.",
    "Human: Where do cats sleep? Assistant: Cats sleep in the sun, on a warm chair.",
    "Human: What is two plus two? Assistant: Two plus two is four.",
    "user assistant system tool",
] * 4

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# drops the content of earlier assistant turns, as templates of reasoning models drop the thinking
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(**kwargs):
    """A byte-level BPE tokenizer trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    options = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|im_end|>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer():
    return make_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- Example


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


# --- encode


def test_encode_rebuilds_the_text(tokenizer):
    prompt, response = "Human: Where do cats sleep? Assistant:", " Cats sleep in the sun."
    ex = encode(tokenizer, prompt, response, name="chosen")
    assert ex.ids[:-1] == tuple(tokenizer(prompt + response)["input_ids"])
    assert tokenizer.decode(ex.prompt_ids) == prompt
    assert ex.response_ids[-1] == tokenizer.eos_token_id
    assert "".join(ex.token_texts) == response + "<|im_end|>"
    assert "".join(ex.prompt_texts) == prompt
    assert ex.name == "chosen"


def test_encode_eos_once(tokenizer):
    with_eos = encode(tokenizer, "Where?", " Here<|im_end|>")
    assert with_eos == encode(tokenizer, "Where?", " Here")
    assert with_eos.response_ids.count(tokenizer.eos_token_id) == 1
    bare = encode(tokenizer, "Where?", " Here", add_eos=False)
    assert bare.response_ids == with_eos.response_ids[:-1]


def test_encode_without_an_eos_token():
    ex = encode(make_tokenizer(eos_token=None), "Where?", " Here")
    assert "".join(ex.token_texts) == " Here"


def test_encode_ignores_an_eos_that_the_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    tok = make_tokenizer()
    plain = encode(tok, "Where?", " Here")
    bos, eos = tok.bos_token_id, tok.eos_token_id
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", bos), ("<|im_end|>", eos)]
    )
    ex = encode(tok, "Where?", " Here")
    assert ex.prompt_ids == (bos, *plain.prompt_ids)
    assert ex.response_ids == plain.response_ids
    assert not any(code == "boundary_merge" for code, _ in ex.notes)
    assert encode(tok, "", " Here").prompt_ids == (bos,)


def test_encode_records_a_boundary_merge(tokenizer):
    ex = encode(tokenizer, "The ket", "tle is red.")
    assert "".join((*ex.prompt_texts, *ex.token_texts)) == "The kettle is red.<|im_end|>"
    notes = dict(ex.notes)
    assert "kettle" in notes["boundary_merge"]
    assert "boundary_merge" not in dict(encode(tokenizer, "The kettle", " is red.").notes)


def test_encode_refuses_an_empty_prompt(tokenizer):
    with pytest.raises(ExampleError, match="BOS token") as caught:
        encode(tokenizer, "", "Here")
    assert caught.value.problem == "empty_prompt"


def test_encode_refuses_a_prompt_that_merges_away(tokenizer):
    with pytest.raises(ExampleError, match="1 tokens, all changed"):
        encode(tokenizer, " ", "the")


def test_encode_refuses_an_empty_response(tokenizer):
    with pytest.raises(EmptyResponseError):
        encode(tokenizer, "Where?", "")


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        (None, "a", "prompt must be text or a list of chat messages, got None"),
        ("a", None, "response must be text or a list of chat messages, got None"),
        ("a", 3, "got int 3"),
        ("a", ["b"], "got list"),
        ("a", [{"role": "assistant", "content": "b"}], "must both be text"),
    ],
)
def test_encode_refuses_what_is_no_text(tokenizer, prompt, response, text):
    with pytest.raises(ExampleError, match=text) as caught:
        encode(tokenizer, prompt, response)
    assert caught.value.problem == "not_text"


def test_encode_truncates_the_prompt(tokenizer):
    prompt = "Human: Where do cats sleep? Assistant:"
    whole = encode(tokenizer, prompt, " Cats")
    end = encode(tokenizer, prompt, " Cats", max_prompt_length=4)
    start = encode(tokenizer, prompt, " Cats", max_prompt_length=4, truncation="keep_start")
    assert end.prompt_ids == whole.prompt_ids[-4:]
    assert start.prompt_ids == whole.prompt_ids[:4]
    assert end.response_ids == start.response_ids == whole.response_ids
    assert "truncated_prompt" in dict(end.notes)


def test_encode_truncates_the_response_and_notes_the_lost_eos(tokenizer):
    whole = encode(tokenizer, "Where?", " Cats sleep in the sun")
    cut = encode(tokenizer, "Where?", " Cats sleep in the sun", max_length=whole.length - 2)
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.response_ids == whole.response_ids[:-2]
    assert len(cut.tokens) == len(cut.response_ids)
    assert {"truncated_response", "eos_lost"} <= set(dict(cut.notes))
    exact = encode(tokenizer, "Where?", " Cats sleep in the sun", max_length=whole.length)
    assert exact == whole


def test_encode_refuses_a_prompt_that_fills_max_length(tokenizer):
    n = len(tokenizer("Where do cats sleep?")["input_ids"])
    with pytest.raises(ExampleError, match="leave room") as caught:
        encode(tokenizer, "Where do cats sleep?", " There", max_length=n)
    assert caught.value.problem == "prompt_fills_max_length"


@pytest.mark.parametrize(
    "kwargs", [{"truncation": "keep_middle"}, {"max_length": 1}, {"max_prompt_length": 0}]
)
def test_encode_refuses_bad_options(tokenizer, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        encode(tokenizer, "a", "b", **kwargs)


def test_token_texts_of_split_characters_are_printable(tokenizer):
    ex = encode(tokenizer, "The", " χ", add_eos=False)
    assert all(text and "\ufffd" not in text for text in ex.token_texts)
    assert tokenizer.decode(ex.response_ids) == " χ"


def test_encode_messages(tokenizer):
    ex = encode(tokenizer, [user("Where?")], [assistant("Here.")])
    assert tokenizer.decode(ex.prompt_ids) == "<|im_start|>user\nWhere?<|im_end|>\n" + (
        "<|im_start|>assistant\n"
    )
    assert "".join(ex.token_texts) == "Here.<|im_end|>\n"
    assert ex == encode(tokenizer, [user("Where?")], "Here.")
    assert ex.response_ids.count(tokenizer.eos_token_id) == 1


def test_encode_messages_continues_an_assistant_turn(tokenizer):
    ex = encode(tokenizer, [user("Where?"), assistant("Over")], [assistant("here.")])
    assert ex.targets[-2] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [TEMPLATE, GENERATION_TEMPLATE], ids=["prefix", "generation"])
def test_encode_messages_counts_only_the_assistant(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    response = [assistant("Here."), user("Are you sure?"), assistant("Yes.")]
    ex = encode(chat_tokenizer, [user("Where?")], response)
    text = "".join(ex.token_texts)
    assert text.replace("\n", "") == "Here.<|im_end|>Yes.<|im_end|>"
    assert "sure" in "".join(ex.tokens)
    every = encode(chat_tokenizer, [user("Where?")], response, assistant_only=False)
    assert every.ids[: ex.length] == ex.ids
    assert "sure" in "".join(every.token_texts)


def test_encode_notes_a_template_that_rewrites_earlier_turns(chat_tokenizer):
    chat_tokenizer.chat_template = FORGETFUL_TEMPLATE
    response = [assistant("Here."), user("Are you sure?"), assistant("Yes.")]
    ex = encode(chat_tokenizer, [user("Where?")], response)
    assert "template_rewrite" in dict(ex.notes)
    assert "Yes.<|im_end|>" in "".join(ex.token_texts)
    assert "sure" not in "".join(ex.token_texts)


def test_encode_passes_template_arguments_on(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ mood }}{{ tools | length if tools else 0 }}" + TEMPLATE
    ex = encode(
        chat_tokenizer,
        [user("Where?")],
        "Here.",
        chat_template_kwargs={"mood": "calm"},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert chat_tokenizer.decode(ex.prompt_ids).startswith("calm1<|im_start|>")


def test_encode_messages_errors(chat_tokenizer):
    with pytest.raises(EmptyResponseError):
        encode(chat_tokenizer, [user("Where?")], [assistant("")])
    with pytest.raises(EmptyResponseError):
        encode(chat_tokenizer, [user("Where?")], [])
    with pytest.raises(ExampleError, match=r"prompt\[0\] must be a message with a role"):
        encode(chat_tokenizer, [{"content": "x"}], "Here.")
    chat_tokenizer.chat_template = None
    with pytest.raises(ExampleError, match="chat template"):
        encode(chat_tokenizer, [user("Where?")], "Here.")


# --- encode_row

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
            "response_ids",
            "empty_response",
        ),
    ],
)
def test_row_errors_name_the_column(tokenizer, row, column, problem):
    with pytest.raises(ExampleError) as caught:
        encode_row(tokenizer, row)
    assert (caught.value.field, caught.value.problem) == (column, problem)


# --- rows

TABLE = [{"prompt": "a", "completion": "b"}, {"prompt": "χ", "completion": "d"}]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_jsonl(tmp_path, newline, bom):
    path = tmp_path / "data.jsonl"
    text = bom + newline.join(json.dumps(row, ensure_ascii=False) for row in TABLE) + newline
    path.write_bytes(text.encode())
    assert rows(path) == rows(str(path)) == TABLE
    assert rows(path, limit=1) == TABLE[:1]


def test_rows_json_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(TABLE, indent=1))
    assert rows(path) == TABLE


def test_rows_iterables():
    class Dataset:  # what is used of datasets.Dataset
        def __iter__(self):
            return iter(TABLE)

    assert rows(TABLE) == rows(Dataset()) == rows(iter(TABLE)) == TABLE


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1}\n{"a": 1\n', r"bad.jsonl, line 2: not JSON \(.* at column"),
        (b'{"a": 1}\n\n[1]\n', "bad.jsonl, line 3: a row must be a mapping of columns, got list"),
        (b'{"a": "\xff"}\n', "bad.jsonl, line 1: not UTF-8"),
        (b"[" * 100_000, "bad.jsonl: not a JSON list"),
        (b'{"a":' * 100_000, "bad.jsonl, line 1: not JSON"),
        (b'[{"a": 1}, 2]', "bad.jsonl, entry 1: a row must be a mapping"),
    ],
)
def test_rows_errors_name_file_and_line(tmp_path, content, text):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ExampleError, match=text):
        rows(path)


def test_rows_refuses_what_is_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        rows(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="directory"):
        rows(tmp_path)
    with pytest.raises(ExampleError, match="choose a split"):
        rows({"train": TABLE})
    with pytest.raises(ExampleError, match=r"row 0: .* got str 'prompt'"):
        rows(["prompt"])
    with pytest.raises(TypeError, match="path or an iterable"):
        rows(3)


def test_rows_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ImportError, match="pip install pyarrow"):
            rows(path)
        return
    parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
    assert rows(path) == TABLE
    path.write_bytes(b"PAR1")
    with pytest.raises(ExampleError, match="not a Parquet file"):
        rows(path)


# --- audit


def pair(**kwargs):
    return {"prompt": PROMPT, "chosen": " There", "rejected": " Here", **kwargs}


@pytest.mark.parametrize(
    ("row", "field", "problem", "severity"),
    [
        (pair(chosen=""), "chosen", "empty_response", "error"),
        (pair(chosen="  "), "chosen", "blank_response", "warning"),
        (pair(prompt=""), "prompt", "empty_prompt", "error"),
        (pair(rejected=" There"), "rejected", "identical_pair", "error"),
        (pair(rejected=None), "rejected", "not_text", "error"),
        ({"prompt": PROMPT, "chosen": " There"}, "rejected", "missing_column", "error"),
        (pair(prompt="The ket", chosen="tle"), "chosen", "boundary_merge", "warning"),
        (pair(chosen=" There" * 60), "chosen", "truncated_response", "warning"),
        (pair(chosen=" There" * 60), "chosen", "eos_lost", "warning"),
        (pair(prompt=PROMPT * 9), "chosen", "truncated_prompt", "warning"),
        (pair(rejected=" \ud800"), "rejected", "invalid", "error"),
        ("no row", "", "unreadable_row", "error"),
    ],
)
def test_audit_finds(tokenizer, row, field, problem, severity):
    found = audit(tokenizer, [pair(), row], max_length=40, max_prompt_length=20)
    hits = [f for f in found if f.problem == problem]
    assert [(f.row, f.field, f.severity) for f in hits if f.field == field] == [
        (1, field, severity)
    ]
    assert found.summary()[problem] == 1
    assert (1 in found.unusable) == (severity == "error")
    assert not [f for f in found if f.row == 0]
    assert found.n_rows == 2
    assert problem in str(found)
    assert Audit.from_json(found.to_json()) == found


def test_audit_of_clean_data_finds_nothing(tokenizer):
    found = audit(tokenizer, [pair(), pair(chosen=" Four")], vocab_size=400, max_positions=50)
    assert found.ok
    assert len(found) == 0
    assert (found.n_rows, found.n_responses, found.n_eos_counted) == (2, 4, 4)
    assert "nothing found" in str(found)


def test_audit_finds_duplicates(tokenizer):
    found = audit(tokenizer, [pair(), pair(chosen=" Four"), pair()])
    assert [(f.row, f.detail) for f in found.of("duplicate")] == [(2, "same as row 0")]


def test_audit_finds_pad_is_eos():
    found = audit(make_tokenizer(pad_token="<|im_end|>"), [pair()])
    assert [f.row for f in found] == [-1]
    assert "whole set" in str(found)
    assert found.unusable == ()


def test_audit_finds_eos_outside_the_loss(tokenizer):
    eos = tokenizer.eos_token_id
    row = {"input_ids": [40, 41, 42, eos], "labels": [-100, 41, 42, -100]}
    found = audit(tokenizer, [row, {**row, "labels": [-100, 41, 42, eos]}])
    assert [(f.row, f.problem) for f in found] == [(0, "eos_not_counted")]
    assert found.n_eos_counted == 1
    found = audit(tokenizer, [pair()], add_eos=False)
    assert [f.problem for f in found] == ["eos_not_counted"] * 2


def test_audit_checks_the_model(tokenizer):
    class Config:
        vocab_size = 300
        max_position_embeddings = 10

    found = audit(tokenizer, [pair(prompt="cats"), pair()], config=Config())
    assert {"token_out_of_range"} <= set(found.summary())
    longest = encode(tokenizer, PROMPT, " There").length
    found = audit(
        tokenizer, [pair(prompt="cats"), pair()], vocab_size=400, max_positions=longest - 1
    )
    assert {f.problem for f in found} == {"over_context"}
    assert found.unusable == (1,)


def test_audit_reads_on_after_a_bad_line(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(pair()) + "\n{broken\n" + json.dumps(pair(chosen=" Four")) + "\n")
    found = audit(tokenizer, path)
    assert [(f.row, f.problem) for f in found] == [(1, "unreadable_row")]
    assert "data.jsonl, line 2" in found.findings[0].detail
    assert (found.n_rows, found.n_responses) == (3, 4)


def test_audit_is_one_finding_per_field_not_a_crash(tokenizer):
    row = pair(chosen="", rejected=None, irr_train=" Four")
    found = audit(tokenizer, [row], ["irr_train"])
    assert {(f.field, f.problem) for f in found} == {
        ("chosen", "empty_response"),
        ("rejected", "not_text"),
    }
    assert found.n_responses == 1


def test_every_raised_problem_is_in_the_table():
    import re

    source = Path(examples.__file__).read_text()
    raised = set(re.findall(r'problem="(\w+)"', source))
    assert raised
    assert raised <= set(examples._PROBLEMS)


# --- the package


def test_import_needs_neither_torch_nor_transformers():
    code = (
        "import sys; import lddyn.examples;"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert lddyn.Example is Example
    assert lddyn.encode is encode


# --- a real tokenizer and real dialogues


@pytest.fixture(scope="module")
def hh():
    model, probes = SHARED / "models/hh-llama-2m", SHARED / "data/hh-helpful/probes.jsonl"
    if not (model / "tokenizer.json").is_file() or not probes.is_file():
        pytest.skip(f"{SHARED} has no hh-llama-2m tokenizer or no hh-helpful probes")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True), rows(probes)


def test_real_rows_round_trip(hh):
    tokenizer, table = hh
    for row in table[:20]:
        encoded = encode_row(tokenizer, row, "all", skip_empty=True)
        assert set(row) - set(encoded) == {"prompt", *(key for key in row if not row[key])}
        for name, ex in encoded.items():
            assert tokenizer.decode(ex.ids) == row["prompt"] + row[name] + "<|endoftext|>"
            assert ex.ids[:-1] == tuple(tokenizer(row["prompt"] + row[name])["input_ids"])
            assert [ex.ids[p + 1] for p in ex.positions] == list(ex.targets)


def test_real_rows_audit(hh):
    tokenizer, table = hh
    found = audit(tokenizer, table[:100], "all", vocab_size=2048, max_positions=512)
    assert found.n_rows == 100
    assert found.n_responses == 1300 - len(
        [f for f in found if f.problem in ("empty_response", "empty_prompt", "not_text")]
    )
    assert set(found.summary()) <= {
        "pad_is_eos",
        "over_context",
        "empty_response",
        "blank_response",
        "identical_pair",
        "boundary_merge",
    }
    over = [r for r in table[:100] if len(tokenizer(r["prompt"] + r["chosen"])["input_ids"]) > 511]
    assert len([f for f in found.of("over_context") if f.field == "chosen"]) == len(over)
