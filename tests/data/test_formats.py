"""Rows of other programs' formats: what is read, what counts, and what is said of the rest."""

import csv
import gzip
import io
import json

import pytest
from chats import assistant, make_tokenizer, user

from lddyn.data.audit import audit
from lddyn.data.formats import recognise
from lddyn.data.read import rows as read_rows
from lddyn.data.rows import encode_row
from lddyn.errors import ExampleError

TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if tools %}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
ASKED = "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tools_tokenizer():
    made = make_tokenizer()
    made.chat_template = TOOLS
    return made


def texts(tokenizer, row):
    """Field → (prompt, counted response) in words."""
    return {
        name: (tokenizer.decode(example.prompt_ids), "".join(example.token_texts))
        for name, example in encode_row(tokenizer, row).items()
    }


def codes(audited, *severities):
    return {f.problem for f in audited if f.severity in (severities or ("error", "warning"))}


@pytest.mark.case("ms-swift: messages with a rejected response, query and response")
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("red?"), assistant("yes")], "rejected_response": "no"},
        {
            "messages": [user("red?"), assistant("yes")],
            "rejected_messages": [user("red?"), assistant("no")],
        },
        {"query": "red?", "response": "yes", "rejected_response": "no"},
        {
            "input": {"messages": [user("red?")], "tools": []},
            "preferred_output": [assistant("yes")],
            "non_preferred_output": [assistant("no")],
        },
    ],
    ids=["rejected_response", "rejected_messages", "query", "OpenAI"],
)
def test_pairs_of_other_programs(tokenizer, row):
    want = {"chosen": (ASKED, "yes<|im_end|>\n"), "rejected": (ASKED, "no<|im_end|>\n")}
    assert texts(tokenizer, row) == want
    assert not codes(audit(tokenizer, [row]), "error", "warning", "note")


def test_query_and_history(tokenizer):
    row = {"query": "red?", "response": "yes", "history": [["a", "b"]], "system": "s"}
    prompt, answer = texts(tokenizer, row)["response"]
    assert prompt.startswith("<|im_start|>system\ns") and answer == "b<|im_end|>\nyes<|im_end|>\n"
    assert codes(audit(tokenizer, [{**row, "query": ""}])) == {"empty_prompt"}
    ends = {"messages": [user("red?")], "rejected_response": "no"}
    assert codes(audit(tokenizer, [ends])) == {"bad_message"}
    assert codes(audit(tokenizer, [{**ends, "messages": "red?"}])) == {"not_text"}
    bare = {"input": "red?", "preferred_output": "yes", "non_preferred_output": "no"}
    assert codes(audit(tokenizer, [bare])) == {"not_text"}


@pytest.mark.case("messages as JSON in a text")
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_messages_as_json(tokenizer, column):
    row = {
        column: json.dumps([{"from": "human", "value": "red?"}, {"from": "gpt", "value": "yes"}])
    }
    assert texts(tokenizer, row) == {"messages": (ASKED, "yes<|im_end|>\n")}
    pair = {
        k: json.dumps([user("red?"), assistant(v)])
        for k, v in (("chosen", "yes"), ("rejected", "no"))
    }
    assert texts(tokenizer, pair)["rejected"] == (ASKED, "no<|im_end|>\n")
    (finding,) = audit(tokenizer, [{column: "[not JSON]"}]).of("not_text")
    assert finding.field == column and "must be a list of chat messages" in finding.detail
    assert texts(tokenizer, {"text": '[{"role": 1'})["text"][1].endswith("<|im_end|>")  # a text


@pytest.mark.case("messages whose role and words have other names")
@pytest.mark.parametrize(
    ("who", "words"), [("role", "value"), ("role", "text"), ("from", "content"), ("from", "value")]
)
@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("prompter", "bing")])
def test_names_of_roles_and_words(tokenizer, who, words, asks, answers):
    said = [{who: asks, words: "red?"}, {who: answers, words: "yes"}]
    assert texts(tokenizer, {"messages": said}) == {"messages": (ASKED, "yes<|im_end|>\n")}


def test_a_role_that_nobody_knows_is_named(tokenizer):
    unknown = {"messages": [user("red?"), {"role": "oracle", "content": "yes"}]}
    (finding,) = audit(tokenizer, [unknown]).of("empty_response")
    assert "got the roles user, oracle" in finding.detail
    empty = {"messages": [user("red?"), {"role": "assistant", "body": "yes"}]}
    (finding,) = audit(tokenizer, [empty]).of("not_text")
    assert "its keys are role, body" in finding.detail


@pytest.mark.case("a message's own training mask: training, loss, train_detail")
@pytest.mark.parametrize("key", ["weight", "train", "loss_weight", "training", "loss"])
def test_masks_of_messages(tokenizer, key):
    row = {
        "messages": [
            user("a"),
            assistant("no", **{key: False}),
            user("b"),
            assistant("yes", **{key: True}),
        ]
    }
    assert texts(tokenizer, row)["messages"][1] == "yes<|im_end|>\n"


def test_what_of_a_message_is_not_read_is_said(tokenizer):
    def said(**more):
        return audit(tokenizer, [{"messages": [user("red?"), assistant("yes", **more)]}] * 2)

    assert "these messages count whole: 1" in said(train_detail=[{}]).of("partial_weight")[0].detail
    assert "thinking" in said(thinking="hm").of("not_rendered")[0].detail
    assert "keys mood, votes" in said(mood="calm", votes=3).of("other_key")[0].detail
    assert len(said(mood="calm").of("other_key")) == 1  # once for the set
    assert codes(said(name="x", id=3, tool_calls=None)) == {"duplicate"}


@pytest.mark.case("tool calls as JSON, and OpenAI's function_call")
@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "add", "arguments": '{"x": 1}'}},
    ],
    ids=["list", "JSON", "function_call"],
)
def test_tool_calls_of_all_forms(tools_tokenizer, call):
    messages = [user("red?"), {"role": "assistant", "content": "", **call}]
    assert texts(tools_tokenizer, {"messages": messages})["messages"][1] == "<call>add<|im_end|>\n"
    broken = {"messages": [user("red?"), assistant("", tool_calls="[")]}
    assert codes(audit(tools_tokenizer, [broken])) == {"bad_message"}


@pytest.mark.case("columns of other formats that a joined data set leaves None")
@pytest.mark.parametrize(
    ("row", "field"),
    [
        (
            {"messages": [user("red?"), assistant("yes")], "prompt": None, "chosen": None},
            "messages",
        ),
        ({"messages": None, "text": None, "prompt": "red?", "completion": " yes"}, "completion"),
        ({"prompt": "red?", "completion": " yes", "chosen": None, "rejected": None}, "completion"),
        ({"messages": None, "text": "red? yes"}, "text"),
        ({"instruction": None, "prompt": "red?", "chosen": " a", "rejected": " b"}, "chosen"),
    ],
)
def test_columns_without_a_value_are_not_there(tokenizer, row, field):
    assert field in encode_row(tokenizer, row)
    for missing in (
        {"prompt": None, "chosen": "ab c", "rejected": "ab d"},
        {"prompt": "red?", "chosen": None, "rejected": " b"},
        {"prompt": None, "completion": " yes"},
    ):
        assert codes(audit(tokenizer, [missing])) == {"not_text"}


@pytest.mark.case("the prompt under another name is never cut out of the responses")
@pytest.mark.parametrize("name", ["question", "query", "input", "problem", "Prompt", "prompt "])
def test_a_prompt_under_another_name_is_named(tokenizer, name):
    row = {name: "red?", "chosen": "I say yes", "rejected": "I say no"}
    (finding,) = audit(tokenizer, [row]).of("missing_column")
    assert f"rename {name!r} to 'prompt'" in finding.detail
    whole = {
        "question": "red?",
        **{k: [user("red?"), assistant(k)] for k in ("chosen", "rejected")},
    }
    assert texts(tokenizer, whole)["chosen"][0] == ASKED


@pytest.mark.case("a thought in a column of its own")
def test_a_thought_in_a_column_is_a_warning(tokenizer):
    row = {"prompt": "red?", "completion": " yes", "reasoning": "hm", "score": 3}
    audited = audit(tokenizer, [row])
    assert "reasoning" in audited.of("unread_column")[0].detail
    assert "score" in audited.of("other_column")[0].detail


# ----- files

PAIRS = [
    {"prompt": "Say:", "chosen": " a", "rejected": " b"},
    {"prompt": "Say\nit:", "chosen": ' "c", d', "rejected": " b; e"},
]


def as_csv(delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, PAIRS[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return text.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in PAIRS)
COLUMNS = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
SERVED = {"rows": [{"row_idx": i, "row": row} for i, row in enumerate(PAIRS)], "num_rows_total": 2}
FILES = {
    "utf16.jsonl": LINES.encode("utf-16"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "columns.json": json.dumps(COLUMNS).encode(),
    "pretty-columns.json": json.dumps(COLUMNS, indent=2).encode(),
    "about.json": json.dumps({"version": 2, "license": {}, "data": PAIRS}).encode(),
    "served.json": json.dumps(SERVED).encode(),
    "utf16.csv": as_csv().encode("utf-16"),
    "semicolon.csv": as_csv(";").encode(),
    "tabs.csv": as_csv("\t").encode(),
    "packed.csv.gz": gzip.compress(as_csv().encode()),
    "packed-utf16.jsonl.gz": gzip.compress(LINES.encode("utf-16")),
}


@pytest.mark.case("files: UTF-16, semicolons, columns instead of rows, served rows")
@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds_hold_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert read_rows(tmp_path / name) == PAIRS


def test_rows_that_look_like_tables_are_rows(tmp_path):
    for row in (
        {"prompt_ids": [1, 5], "completion_ids": [6, 2]},
        {"prompt": "x", "completion": " y", "data": [{"a": 1}]},
        {"messages": [user("a"), assistant("b")], "tools": [{"name": "x"}]},
    ):
        (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
        assert read_rows(tmp_path / "row.jsonl") == [row]
    assert read_rows(COLUMNS) == PAIRS


@pytest.mark.case("a file without rows, or of a kind that is not read")
def test_files_without_rows(tmp_path, tokenizer):
    for name, content in (("a.jsonl", ""), ("a.csv", "prompt,chosen\r\n"), ("a.json", "[]")):
        (tmp_path / name).write_text(content)
        audited = audit(tokenizer, tmp_path / name)
        assert codes(audited) == {"no_rows"} and not audited.ok
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ExampleError, match=r"\.xlsx is not read: export it as JSONL"):
        read_rows(tmp_path / "a.xlsx")
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfea")
    with pytest.raises(ExampleError, match="begins as UTF-16 and is not"):
        read_rows(tmp_path / "odd.jsonl")


@pytest.mark.case("a prompt beside whole conversations that is none of their turns")
def test_a_prompt_that_no_conversation_holds_is_named():
    def conversation(answer):
        return [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": answer}]

    row = {"chosen": conversation("Yes."), "rejected": conversation("No.")}
    for prompt, read in (("Is it red?", True), (" Is it red?\n", True), ("Is it blue?", False)):
        content = recognise({**row, "prompt": prompt}, None)
        assert ("prompt" in content.reads) == read
        assert content.prompt == conversation("")[:1]
