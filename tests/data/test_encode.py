"""Prompt and response, as text or messages, to token ids."""

import pytest
from chats import FORGETFUL_TEMPLATE, GENERATION_TEMPLATE, TEMPLATE, assistant, make_tokenizer, user

from lddyn.data.encode import cut_to_length, encode
from lddyn.data.options import RowOptions
from lddyn.errors import EmptyResponseError, ExampleError


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
    with pytest.raises(ExampleError, match=r"1 token\(s\) all merge"):
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


def test_encode_truncates_the_prompt_and_keeps_its_end(tokenizer):
    prompt = "Human: Where do cats sleep? Assistant:"
    whole = encode(tokenizer, prompt, " Cats")
    for mode in ("keep_start", "keep_end"):
        cut = encode(tokenizer, prompt, " Cats", max_prompt_length=4, truncation_mode=mode)
        assert cut.prompt_ids == whole.prompt_ids[-4:]
        assert cut.response_ids == whole.response_ids
        assert "truncated_prompt" in dict(cut.notes)


def test_encode_truncates_from_the_start_as_trl_does(tokenizer):
    prompt = "Human: Where do cats sleep? Assistant:"
    whole = encode(tokenizer, prompt, " Cats")
    for length in range(len(whole.response_ids) + 1, whole.length + 1):
        cut = encode(tokenizer, prompt, " Cats", max_length=length, truncation_mode="keep_end")
        assert cut.ids == whole.ids[-length:]
        assert cut.response_ids == whole.response_ids
        assert len(cut.prompt_tokens) == len(cut.prompt_ids)
    # Where the whole prompt is cut, the first token that is left is read and not counted.
    cut = encode(tokenizer, prompt, " Cats", max_length=2, truncation_mode="keep_end")
    assert cut.ids == whole.ids[-2:] and len(cut) == 1
    assert {"truncated_prompt", "truncated_response"} <= set(dict(cut.notes))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("max_prompt_length", [None, 1, 2, 7])
def test_cut_to_length_is_a_slice_of_the_whole(mode, max_length, max_prompt_length):
    prompt, response = [1, 2, 3], [4, 5, 6]
    expected_prompt = prompt[-max_prompt_length:] if max_prompt_length else prompt
    whole = [*expected_prompt, *response]
    kept = whole if max_length is None else whole[:max_length]
    start = len(expected_prompt)
    if mode == "keep_end" and max_length is not None:
        kept = whole[-max_length:]
        start = max(1, len(kept) - len(response))
    options = RowOptions(
        max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=mode
    )
    if kept[start:]:
        assert cut_to_length(prompt, response, options) == (kept[:start], kept[start:])
    else:
        with pytest.raises(ExampleError, match="leave room"):
            cut_to_length(prompt, response, options)


def test_options_come_as_one_value_or_as_keywords(tokenizer):
    options = RowOptions(max_length=9, max_completion_length=2, add_eos=False)
    whole = encode(tokenizer, "Where?", " Cats sleep in the sun")
    cut = encode(tokenizer, "Where?", " Cats sleep in the sun", options)
    assert cut.response_ids == whole.response_ids[:2]
    assert encode(tokenizer, "Where?", " Cats sleep in the sun", options, max_length=None) == cut
    replaced = encode(
        tokenizer, "Where?", " Cats", options, max_completion_length=None, add_eos=True
    )
    assert replaced == encode(tokenizer, "Where?", " Cats", max_length=9)


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
    "kwargs", [{"truncation_mode": "keep_middle"}, {"max_length": 1}, {"max_prompt_length": 0}]
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
