"""Kinds of rows that people hold, each with what should come out of it."""

import gzip
import json
import time

import pytest
from chats import assistant, make_tokenizer, user

from lddyn.data.audit import audit
from lddyn.data.checks import check_log_prob
from lddyn.data.columns import COLUMNS, feedback_label, reference_log_probs, unread_columns
from lddyn.data.example import Example
from lddyn.data.read import rows as read_rows
from lddyn.data.rows import encode_row
from lddyn.errors import ExampleError

THINK = (  # opens a thought in the prompt's last turn, and closes it in front of every answer
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}<think>\n</think>\n{% endif %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if tools %}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def problems(audited):
    return {(f.row, f.field, f.problem) for f in audited if f.severity != "note"}


def codes(audited, severity=("error", "warning")):
    return {f.problem for f in audited if f.severity in severity}


def text(example):
    return "".join(example.token_texts)


def shared(*turns):
    return [{"from": who, "value": said} for who, said in turns]


def parts(*said, **more):
    return [{"type": kind, "value": value} for kind, value in said], more


@pytest.mark.case("masks: attention_mask 0 is not read")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(side):
    ids, labels = [1, 5, 6, 7, 8, 2], [-100, -100, -100, 7, 8, 2]
    pad = [2, 2, 2], [-100] * 3, [0] * 3
    columns = (pad[0] + ids, pad[1] + labels, pad[2] + [1] * 6)
    if side == "right":
        columns = (ids + pad[0], labels + pad[1], [1] * 6 + pad[2])
    row = dict(zip(("input_ids", "labels", "attention_mask"), columns, strict=True))
    ex = encode_row(None, row)["input_ids"]
    assert (ex.prompt_ids, ex.response_ids, ex.response_mask) == ((1, 5, 6), (7, 8, 2), None)
    assert audit(None, [row]).ok
    counted = audit(None, [{**row, "labels": columns[0]}])
    assert "3 tokens" in counted.of("pad_counted")[0].detail


@pytest.mark.case("packed rows: attention_mask 1, 2, … numbers the documents")
def test_a_mask_numbers_documents():
    row = {"input_ids": [1, 5, 2, 1, 6, 7, 0], "attention_mask": [1, 1, 1, 2, 2, 2, 0]}
    documents = encode_row(None, row)
    assert {name: ex.ids for name, ex in documents.items()} == {
        "document_0": (1, 5, 2),
        "document_1": (1, 6, 7),
    }


@pytest.mark.case("packed rows: a mask of ones lets documents attend to each other")
def test_packed_rows_with_a_mask_of_ones():
    tokenizer = make_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [bos, 50, 51, eos, bos, 52, 53, eos]
    row = {"input_ids": ids, "position_ids": [0, 1, 2, 3] * 2, "attention_mask": [1] * 8}
    assert list(encode_row(tokenizer, row)) == ["document_0", "document_1"]
    assert codes(audit(tokenizer, [row])) == {"packed_attention"}
    assert codes(audit(tokenizer, [{"input_ids": ids}]), ("note",)) == {"packed_hint"}


@pytest.mark.case("a hole in the attention mask, positions that do not count from 0")
def test_masks_and_positions_that_are_not_followed(tokenizer):
    row = {"input_ids": [5, 6, 7, 50, 51, tokenizer.eos_token_id], "attention_mask": [1] * 6}
    assert not codes(audit(tokenizer, [row]))
    hole = {**row, "attention_mask": [1, 1, 0, 1, 1, 1]}
    assert codes(audit(tokenizer, [hole])) == {"mask_hole"}
    padded = {**row, "attention_mask": [0, 0, 1, 1, 1, 1], "position_ids": [1, 1, 0, 1, 2, 3]}
    assert not codes(audit(tokenizer, [padded]))
    for positions in ([3, 4, 5, 6, 7, 8], [0, 1, 2, 9, 10, 11], [0, 0, 0, 0, 0, 1]):
        found = codes(audit(tokenizer, [{**row, "position_ids": positions}]))
        assert ("positions" in found) == (positions != [0, 0, 0, 0, 0, 1])


@pytest.mark.case("a conversation without a last answer, or with a late system message")
def test_turns_that_are_out_of_place(tokenizer):
    user, assistant = ({"role": r, "content": "two"} for r in ("user", "assistant"))
    system = {"role": "system", "content": "two"}
    for messages, note in (
        ([system, user, assistant], set()),
        ([user, assistant, user], {"open_end"}),
        ([user, system, assistant], {"late_system"}),
    ):
        found = codes(audit(tokenizer, [{"messages": messages}]), ("note",))
        assert found - {"assistant_only"} == note


@pytest.mark.case("a text of 100 million characters")
def test_a_text_that_no_model_reads_is_a_finding(tokenizer):
    long = {"prompt": "a", "completion": "b " * 2**23 + "c"}
    row = {"prompt": "a", "completion": "b"}
    began = time.process_time()
    found = audit(tokenizer, [long, row])
    assert time.process_time() - began < 20  # tokenizing takes minutes
    (finding,) = (f for f in found if f.row == 0)
    assert finding.problem == "invalid" and "at most 16,777,216 characters" in finding.detail


@pytest.mark.case("masks of a batch of reinforcement learning")
def test_masks_of_rl_batches():
    row = {
        "prompt_ids": [2, 2, 1, 5, 6],
        "prompt_mask": [0, 0, 1, 1, 1],
        "completion_ids": [7, 8, 2, 2, 2],
        "completion_mask": [1, 1, 1, 0, 0],
        "advantages": -1.0,
    }
    ex = encode_row(None, row)["completion"]
    assert (ex.prompt_ids, ex.response_ids, len(ex)) == ((1, 5, 6), (7, 8, 2), 3)
    assert "advantages" in audit(None, [row]).of("unread_column")[0].detail
    tool = {"prompt_ids": [1, 5], "completion_ids": [7, 30, 31, 2], "completion_mask": [1, 0, 0, 1]}
    ex = encode_row(None, tool)["completion"]
    assert (ex.response_ids, ex.targets) == ((7, 30, 31, 2), (7, 2))


@pytest.mark.case("ids that already hold the prompt")
def test_ids_that_hold_the_prompt():
    row = {
        "prompt_input_ids": [1, 5],
        "chosen_input_ids": [1, 5, 7, 2],
        "rejected_input_ids": [1, 5, 8, 2],
    }
    got = encode_row(None, row)
    assert (got["chosen"].prompt_ids, got["chosen"].response_ids) == ((1, 5), (7, 2))
    assert codes(audit(None, [row])) == {"prompt_in_response"}
    labelled = {f"{s}_input_ids": row[f"{s}_input_ids"] for s in ("chosen", "rejected")}
    labelled |= {"chosen_labels": [-100, -100, 7, 2], "rejected_labels": [-100, -100, 8, 2]}
    assert encode_row(None, labelled) == got and audit(None, [labelled]).ok
    labelled["rejected_input_ids"] = [1, 6, 8, 2]
    assert codes(audit(None, [labelled])) == {"different_prompts"}
    part = {"prompt_input_ids": [1, 5, 6], "completion_input_ids": [5, 6, 7, 2]}
    (finding,) = audit(None, [part])
    assert "completion_input_ids begins with the last 2" in finding.detail
    assert "prompt_input_ids" in finding.detail


@pytest.mark.case("messages with weight, train or loss_weight")
@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_weights_of_messages(tokenizer, off):
    turns = [user("Hi"), assistant("The cat") | off, user("more"), assistant("sleeps")]
    ex = encode_row(tokenizer, {"messages": turns})["messages"]
    assert text(ex) == "sleeps<|im_end|>\n"
    half = [user("Hi"), assistant("The cat") | {"weight": 0.5}]
    assert codes(audit(tokenizer, [{"messages": half}])) == {"partial_weight"}
    none = [user("Hi"), assistant("The cat") | off]
    assert codes(audit(tokenizer, [{"messages": none}])) == {"empty_response"}


@pytest.mark.case("a conversation counts all tokens, or the assistant's")
def test_counted_tokens_of_a_conversation(tokenizer):
    row = {"messages": [user("Hi"), assistant("The cat"), user("more"), assistant("sleeps")]}
    ex = encode_row(tokenizer, row)["messages"]
    assert text(ex) == "The cat<|im_end|>\nsleeps<|im_end|>\n"
    whole = encode_row(tokenizer, row, assistant_only=False)["messages"]
    assert len(whole) == whole.length - 1 and whole.ids == ex.ids
    note = audit(tokenizer, [row]).of("assistant_only")[0]
    assert note.severity == "note" and f"{len(ex)} of {ex.length} tokens" in note.detail
    pair = {"prompt": "The cat", "completion": " sleeps"}
    both = encode_row(tokenizer, pair, completion_only=False)["completion"]
    assert len(both) == both.length - 1 and len(both.tokens) == len(both.response_ids)


@pytest.mark.case("KTO's label, and reference log-probs of a row")
def test_labels_and_reference_log_probs(tokenizer):
    row = {"messages": [user("Hi"), assistant("a"), user("b"), assistant("cat")], "label": False}
    ex = encode_row(tokenizer, row)["completion"]
    assert text(ex) == "cat<|im_end|>\n"  # feedback is on the last answer
    assert feedback_label(row) is False
    assert codes(audit(tokenizer, [row]), ("note",)) == {"undesirable"}
    with pytest.raises(ExampleError, match="label must be true"):
        encode_row(tokenizer, {"prompt": "a", "completion": " b", "label": "good"})
    pair = {"prompt": "The cat", "chosen": " sleeps", "rejected": " sun"}
    scored = {**pair, "ref_chosen_logps": -3.0, "ref_rejected_logps": -9.0}
    assert reference_log_probs(scored) == (-3.0, -9.0) and reference_log_probs(pair) is None
    assert codes(audit(tokenizer, [scored]), ("note",)) == {"row_reference"}
    half = audit(tokenizer, [{**pair, "ref_chosen_logps": -3.0}])
    assert problems(half) == {(0, "ref_rejected_logps", "bad_reference")}


@pytest.mark.case("LLaMA-Factory: alpaca")
def test_alpaca(tokenizer):
    row = {"instruction": "Say", "input": "it", "output": "The cat"}
    want = encode_row(tokenizer, {"messages": [user("Say\nit"), assistant("The cat")]})
    assert encode_row(tokenizer, row)["output"].ids == want["messages"].ids
    turns = {**row, "system": "Be red", "history": [["a", "b"]]}
    ex = encode_row(tokenizer, turns)["output"]
    assert text(ex) == "b<|im_end|>\nThe cat<|im_end|>\n"  # earlier answers are learned, too
    assert tokenizer.decode(ex.ids).startswith("<|im_start|>system\nBe red<|im_end|>")
    pair = {"instruction": "Say", "input": "", "chosen": "I see", "rejected": "I sun"}
    got = encode_row(tokenizer, pair)
    assert tokenizer.decode(got["chosen"].prompt_ids).endswith(
        "user\nSay<|im_end|>\n<|im_start|>assistant\n"
    )
    listed = {"instruction": "Say", "output": ["I see", "I sun"]}
    assert encode_row(tokenizer, listed) == got
    assert encode_row(tokenizer, {**row, "label": True})["output"].ids == want["messages"].ids


@pytest.mark.case("LLaMA-Factory: sharegpt pairs and v1 conversations with parts")
def test_sharegpt_pairs(tokenizer):
    turns = shared(("system", "Be red"), ("human", "a"), ("gpt", "b"), ("human", "c"))
    row = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "cat"},
        "rejected": {"from": "gpt", "value": "sun"},
    }
    got = encode_row(tokenizer, row)
    assert {name: text(ex) for name, ex in got.items()} == {
        "chosen": "cat<|im_end|>\n",
        "rejected": "sun<|im_end|>\n",
    }
    assert got["chosen"].prompt_ids == got["rejected"].prompt_ids
    prompt = [
        {"role": r, "content": [{"type": "text", "value": c}], "loss_weight": 0.0}
        for r, c in (("system", "Be red"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    sides = {
        f"{name}_messages": [
            *prompt,
            {"role": "assistant", "content": [{"type": "text", "value": word}], "loss_weight": 1.0},
        ]
        for name, word in (("chosen", "cat"), ("rejected", "sun"))
    }
    assert encode_row(tokenizer, sides) == got
    assert audit(tokenizer, [row, {**sides}]).of("duplicate")


@pytest.mark.case("LLaMA-Factory: tools, function_call and observation")
def test_sharegpt_tools(chat_tokenizer):
    call = json.dumps({"name": "add", "arguments": {"x": 1}})
    turns = shared(("human", "a"), ("function_call", call), ("observation", "2"), ("gpt", "cat"))
    tools = json.dumps([{"name": "add", "parameters": {"properties": {"x": {"type": "int"}}}}])
    row = {"conversations": turns, "tools": tools}
    ex = encode_row(chat_tokenizer, row)["messages"]  # the template knows no tools
    written = 'Action: add\nAction Input: {"x": 1}<|im_end|>\ncat<|im_end|>\n'
    assert text(ex) == written
    assert "> Tool Name: add" in chat_tokenizer.decode(ex.prompt_ids)
    assert codes(audit(chat_tokenizer, [row]), ("note",)) >= {"tools_as_text"}
    chat_tokenizer.chat_template = TOOLS
    ex = encode_row(chat_tokenizer, row)["messages"]
    assert text(ex) == "<call>add<|im_end|>\ncat<|im_end|>\n"
    assert "<|im_start|>tool\n2" in chat_tokenizer.decode(ex.ids)


@pytest.mark.case("tool calls that the chat template does not know")
def test_tool_calls_without_content(chat_tokenizer):
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"prompt": [user("a")], "chosen": [called], "rejected": [assistant("cat")]}
    after = {
        "prompt": [user("a"), called, {"role": "tool", "content": "2"}],
        "chosen": [assistant("cat")],
        "rejected": [assistant("sun")],
    }
    assert problems(audit(chat_tokenizer, [row, after])) == {
        (0, "chosen", "tool_calls_unknown"),
        (1, "prompt", "tool_calls_unknown"),
    }
    chat_tokenizer.chat_template = TOOLS
    assert text(encode_row(chat_tokenizer, row)["chosen"]) == "<call>add<|im_end|>\n"
    assert audit(chat_tokenizer, [row, after]).ok


@pytest.mark.case("content as a list of parts; content that is no text")
def test_contents_of_parts(tokenizer):
    listed = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    row = {"prompt": [user("a")], "completion": [assistant(listed)]}
    plain = {"prompt": [user("a")], "completion": [assistant("The cat")]}
    assert encode_row(tokenizer, row) == encode_row(tokenizer, plain)
    for content in ([{"type": "image", "image": "a.png"}], 7, None):
        bad = audit(tokenizer, [{"prompt": [user("a")], "completion": [assistant(content)]}])
        assert problems(bad) == {(0, "completion", "not_text")}
    thought = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "cat"}]
    lost = audit(tokenizer, [{"messages": [user("a"), assistant(thought)]}])
    assert codes(lost) == {"not_rendered"}


@pytest.mark.case("a text prompt beside messages; conversations of different prompts")
def test_prompts_beside_messages(tokenizer):
    answers = {"chosen": [assistant("cat")], "rejected": [assistant("sun")]}
    got = encode_row(tokenizer, {"prompt": "Say", **answers})
    assert got == encode_row(tokenizer, {"prompt": [user("Say")], **answers})
    different = {
        "chosen": [user("Say"), assistant("cat")],
        "rejected": [user("Tell"), assistant("sun")],
    }
    assert problems(audit(tokenizer, [different])) == {(0, "rejected", "different_prompts")}
    without = audit(tokenizer, [{"instruction": "Say", "chosen": 3, "rejected": "b"}])
    assert problems(without) == {(0, "chosen", "not_text")}
    (finding,) = audit(tokenizer, [{"question": "Q", "response_chosen": "A"}])
    assert "rename 'question' to 'prompt'" in finding.detail


@pytest.mark.case("columns that nobody reads")
def test_unread_columns(tokenizer):
    row = {"prompt": "The cat", "chosen": " sleeps", "rejected": " sun"}
    more = {"system": "Be red", "history": [["a", "b"]], "images": ["a.png"], "margin": 2.0}
    (finding,) = audit(tokenizer, [{**row, **more}, {**row, **more, "chosen": " in the sun"}])
    assert (finding.problem, finding.severity) == ("unread_column", "warning")
    assert all(name in finding.detail for name in more)
    quiet = audit(tokenizer, [{**row, "id": 3, "colour": "red"}])
    assert quiet.ok and codes(quiet, ("note",)) == {"other_column"}
    assert audit(tokenizer, [{**row, "system": "", "images": None}]).findings == ()
    # Whatever the table describes is read by a format, or named when it is not.
    unread = unread_columns({name: "x" for name in COLUMNS}, ())
    assert set(unread) == set(COLUMNS) and all(column.holds for column in unread.values())


@pytest.mark.case("special tokens and role headers inside a response")
def test_markup_in_responses(tokenizer):
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": head, "chosen": "The cat<|im_end|>", "rejected": "sun"}
    assert audit(tokenizer, [row]).ok  # an end token at the end is in its place
    for response, mark in (
        ("<|im_start|>assistant\nThe cat", "<|im_start|>"),
        ("The cat<|im_end|>\n<|im_start|>user\nmore", "<|im_end|>"),
        ("The cat [INST] more [/INST] red", "[INST]"),
    ):
        finding = audit(tokenizer, [{**row, "chosen": response}]).of("special_in_response")[0]
        assert finding.field == "chosen" and repr(mark) in finding.detail
    told = {"prompt": "Human: Hi\n\nAssistant:", "rejected": " sun"}
    leak = audit(tokenizer, [{**told, "chosen": " The cat\n\nHuman: more"}])
    assert codes(leak) == {"special_in_response"}
    assert audit(tokenizer, [{"prompt": "Hi", "completion": " The cat\nHuman: more"}]).ok


@pytest.mark.case("a long common start of both responses")
def test_common_starts(tokenizer, chat_tokenizer):
    system = "<|im_start|>system\nBe red<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": "Hi", "chosen": f"{system}The cat", "rejected": f"{system}sun"}
    assert {"common_start", "special_in_response"} <= codes(audit(tokenizer, [row]))
    empty = "<think>\n\n</think>\n\n"
    row = {"prompt": "Hi", "chosen": f"{empty}The cat sleeps", "rejected": f"{empty}sun"}
    assert codes(audit(tokenizer, [row])) == {"common_start"}
    text = "the cat sat on the mat and the cat sat"
    row = {"prompt": "Hi", "chosen": f"{text} down", "rejected": f"{text} up"}
    report = audit(tokenizer, [row])
    assert report.of("shared_start") and not report.of("common_start")
    chat_tokenizer.chat_template = THINK
    pair = {"prompt": [user("a")], "chosen": [assistant("cat")], "rejected": [assistant("sun")]}
    findings = audit(chat_tokenizer, [pair]).of("template_text")
    assert [f.field for f in findings] == ["chosen", "rejected"]
    assert "</think>" in findings[0].detail and "tokens)" in findings[0].detail


@pytest.mark.case("the chat template renders an earlier answer differently")
def test_rewritten_answers_count_as_they_stand(chat_tokenizer):
    chat_tokenizer.chat_template = THINK
    turns = [user("a"), assistant("hm</think>cat"), user("b"), assistant("sun")]
    ex = encode_row(chat_tokenizer, {"messages": turns})["messages"]
    assert text(ex).startswith("cat<|im_end|>\n") and text(ex).endswith("sun<|im_end|>\n")
    assert "template_rewrite" in dict(ex.notes)


@pytest.mark.case("double or missing BOS, double EOS")
def test_begin_and_end_tokens():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    row = {"prompt": "<|bos|>The cat", "chosen": " sleeps", "rejected": " sun"}
    assert problems(audit(tokenizer, [row])) == {(0, "prompt", "double_bos")}
    pair = {"prompt": [user("a")], "chosen": [assistant("cat")], "rejected": [assistant("sun")]}
    assert problems(audit(tokenizer, [pair])) == {(0, "prompt", "missing_bos")}
    twice = {"prompt": "The cat", "completion": " sleeps<|im_end|>\n"}
    assert codes(audit(tokenizer, [twice])) == {"double_eos"}


@pytest.mark.case("EOS is not the end of turn, and the model stops at both")
def test_end_of_turn_is_no_eos():
    class Config:
        eos_token_id = None
        vocab_size = None

    tokenizer = make_tokenizer(eos_token="<|bos|>", pad_token="<|bos|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pair = {"prompt": [user("a")], "chosen": [assistant("cat")], "rejected": [assistant("sun")]}
    Config.eos_token_id = [tokenizer.eos_token_id, end]
    assert audit(tokenizer, [pair], generation_config=Config()).findings == ()
    assert codes(audit(tokenizer, [pair]), ("note",)) == {"end_of_turn"}
    Config.eos_token_id = tokenizer.eos_token_id
    (finding,) = audit(tokenizer, [pair] * 1, config=Config())
    assert (finding.row, finding.problem) == (-1, "end_of_turn_not_eos")


@pytest.mark.case("swapped, tied and near-identical pairs")
def test_suspicious_pairs(tokenizer):
    row = {"prompt": "The cat", "chosen": " sleeps", "rejected": " in the sun"}
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    assert problems(audit(tokenizer, [row, swapped])) == {(1, "", "swapped_pair")}
    for names in (("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")):
        scores = dict(zip(names, (1.0, 2.0), strict=True))
        assert codes(audit(tokenizer, [{**row, **scores}])) == {"swapped_pair"}
        assert codes(audit(tokenizer, [{**row, **dict.fromkeys(names, 2.0)}])) == {"tied_pair"}
        assert audit(tokenizer, [{**row, **dict(zip(names, (2, 1), strict=True))}]).ok
    blank = {"prompt": "The cat", "chosen": " sleeps", "rejected": " sleeps "}
    assert codes(audit(tokenizer, [blank])) == {"near_identical"}


@pytest.mark.case("what TRL's default max_length would cut")
def test_longer_than_the_default_of_a_trainer(tokenizer):
    row = {"prompt": "a", "completion": " the sun" * 600}
    (finding,) = audit(tokenizer, [row])
    assert finding.problem == "over_default_length" and "1024 keeps 1023 of" in finding.detail
    assert codes(audit(tokenizer, [row], max_length=4096)) == set()


@pytest.mark.case("merged tokens are named, and no others")
def test_merges_name_what_merged(tokenizer):
    row = {"prompt": "The ket", "chosen": "tle is red", "rejected": " sun"}
    chosen, rejected = audit(tokenizer, [row]).of("boundary_merge")
    assert "is" not in chosen.detail.split("become")[1].split("once")[0].replace("is not", "")
    assert "merge with the other response" in rejected.detail


@pytest.mark.case("files: CSV, TSV, .gz, text, save_to_disk, folders, globs")
def test_files_that_people_have(tmp_path):
    table = [
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": "d", "chosen": " e", "rejected": " f"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in table)
    (tmp_path / "a.csv").write_text(",prompt,chosen,rejected\n0,a, b, c\n1,d, e, f\n")
    (tmp_path / "a.tsv").write_text("prompt\tchosen\trejected\na\t b\t c\nd\t e\t f\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "split.json").write_text(json.dumps({"train": table}))
    (tmp_path / "pretty.json").write_text(json.dumps({"train": table}, indent=1))
    for name in ("a.csv", "a.tsv", "a.jsonl.gz", "split.json", "pretty.json"):
        assert read_rows(tmp_path / name) == table, name
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_rows(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}]
    chats = tmp_path / "chat.csv"
    chats.write_text("messages,label\n\"[{'role': 'user', 'content': 'a'}]\",True\n")
    assert read_rows(chats) == [{"messages": [{"role": "user", "content": "a"}], "label": True}]
    folder = tmp_path / "data"
    folder.mkdir()
    for index, row in enumerate(table):
        (folder / f"train-0000{index}-of-00002.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "README.md").write_text("about")
    assert read_rows(folder) == read_rows(str(folder / "train-*.jsonl")) == table
    (folder / "test-00000-of-00001.jsonl").write_text(lines)
    with pytest.raises(ExampleError, match=r"splits test, train: .*\*"):
        read_rows(folder)
    (tmp_path / "bad.csv").write_text("prompt,chosen\na\n")
    with pytest.raises(ExampleError, match=r"bad.csv, row 1: must have 2 cells, got 1"):
        read_rows(tmp_path / "bad.csv")


@pytest.mark.case("files: a data set of datasets.save_to_disk")
def test_saved_data_sets(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    arrow = pa.Table.from_pylist(table)
    file = str(folder / "data-00000-of-00001.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as writer:
        writer.write_table(arrow)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert read_rows(folder) == read_rows(tmp_path / "set") == table
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ExampleError, match="has the splits train, test: give one, such as"):
        read_rows(tmp_path / "set")


@pytest.mark.case("a bad row is named by file, row and field")
def test_places_of_bad_rows(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": " b"}\n{broken\n{"prompt": "a", "completion": 3}\n'
    )
    places = [finding.place for finding in audit(tokenizer, path)]
    assert places[0] == f"row 1 ({path}, line 2)"
    assert places[1] == f"row 2 ({path}, line 3) completion"
    assert [row["prompt"] for row in read_rows(path, skip=True)] == ["a", "a"]


def test_log_probs_below_a_uniform_guess():
    example = Example([3, 4], [5, 6])
    assert check_log_prob(example, -6.0, 49) is None
    assert "-20.0 nats per token" in check_log_prob(example, -40.0, 49)


@pytest.mark.case("a group of responses with rewards")
def test_a_group_of_responses_is_named(tokenizer):
    """There is no ready loss of groups; the error says what to write instead."""
    row = {"prompt": "2+2=", "completions": [" 4", " 5"], "rewards": [1, 0]}
    (finding,) = audit(tokenizer, [row]).of("missing_column")
    assert "'completions' holds a group of responses" in finding.detail
    assert "lddyn.GRPO" in finding.detail
    plain = audit(tokenizer, [{"prompt": "2+2=", "answers": " 4"}])
    assert "group" not in plain.of("missing_column")[0].detail
