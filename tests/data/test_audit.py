"""The audit: every problem is audited, named and counted; none stops it."""

import json
import re
from pathlib import Path

import pytest
from chats import make_tokenizer

import lddyn.errors
from lddyn.data import audit as module
from lddyn.data.audit import Audit, audit
from lddyn.data.encode import encode
from lddyn.data.findings import PROBLEMS

PROMPT = "Where do cats sleep?"


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
    audited = audit(tokenizer, [pair(), row], max_length=40, max_prompt_length=20)
    hits = [f for f in audited if f.problem == problem]
    assert [(f.row, f.field, f.severity) for f in hits if f.field == field] == [
        (1, field, severity)
    ]
    assert audited.counts()[problem] == 1
    assert (1 in audited.unusable) == (severity == "error")
    assert not [f for f in audited if f.row == 0]
    assert audited.n_rows == 2
    assert problem in str(audited)
    assert Audit.from_dict(json.loads(json.dumps(audited.to_dict()))) == audited


def test_audit_of_clean_data_finds_nothing(tokenizer):
    audited = audit(tokenizer, [pair(), pair(chosen=" Four")], vocab_size=400, max_positions=50)
    assert audited.ok
    assert len(audited) == 0
    assert (audited.n_rows, audited.n_responses, audited.n_eos_counted) == (2, 4, 4)
    assert "no problems" in str(audited)


def test_audit_is_summarised_explained_saved_and_loaded(tokenizer, tmp_path):
    table = audit(tokenizer, [pair(), pair(chosen=""), pair(chosen="  ")])
    assert table.summary() == {
        "rows": 3,
        "responses": 5,
        "eos_counted": 5,
        "tokens": 51,
        "counted": 21,
        "unusable": 1,
        "warnings": 1,
        "notes": 0,
    }
    assert list(table.counts()) == ["empty_response", "blank_response"]  # errors first
    assert str(table) == table.explain() and "row 1 chosen" in table.explain()
    numbers = (
        "rows=3, responses=5, eos_counted=5, tokens=51, counted=21, unusable=1, warnings=1, notes=0"
    )
    assert repr(table) == f"Audit({numbers})"
    table.save(tmp_path / "audit")
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"]
    assert Audit.load(tmp_path / "audit") == table


def test_audit_finds_duplicates(tokenizer):
    audited = audit(tokenizer, [pair(), pair(chosen=" Four"), pair()])
    assert [(f.row, f.detail) for f in audited.of("duplicate")] == [(2, "same as row 0")]


@pytest.mark.case("pad is EOS: an alarm only where the mask loses the EOS")
def test_audit_finds_pad_is_eos():
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    eos = tokenizer.eos_token_id
    assert audit(tokenizer, [pair()]).ok
    kept = {"input_ids": [40, 41, 42, eos], "labels": [-100, 41, 42, eos]}
    assert audit(tokenizer, [kept]).ok
    lost = audit(tokenizer, [{**kept, "labels": [-100, 41, 42, -100]}])
    assert {f.problem for f in lost} == {"pad_is_eos", "eos_not_counted"}
    assert lost.unusable == () and "index 3" in lost.of("pad_is_eos")[0].detail


def test_audit_finds_eos_outside_the_loss(tokenizer):
    eos = tokenizer.eos_token_id
    row = {"input_ids": [40, 41, 42, eos], "labels": [-100, 41, 42, -100]}
    audited = audit(tokenizer, [row, {**row, "labels": [-100, 41, 42, eos]}])
    assert [(f.row, f.problem) for f in audited] == [(0, "eos_not_counted")]
    assert audited.n_eos_counted == 1
    audited = audit(tokenizer, [pair()], add_eos=False)
    assert [f.problem for f in audited] == ["eos_not_counted"] * 2


def test_audit_checks_the_model(tokenizer):
    class Config:
        vocab_size = 300
        max_position_embeddings = 10

    audited = audit(tokenizer, [pair(prompt="cats"), pair()], config=Config())
    assert {"token_out_of_range"} <= set(audited.counts())
    longest = encode(tokenizer, PROMPT, " There").length
    audited = audit(
        tokenizer, [pair(prompt="cats"), pair()], vocab_size=400, max_positions=longest - 1
    )
    assert {f.problem for f in audited} == {"over_context"}
    assert audited.unusable == (1,)


def test_audit_reads_on_after_a_bad_line(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(pair()) + "\n{broken\n" + json.dumps(pair(chosen=" Four")) + "\n")
    audited = audit(tokenizer, path)
    assert [(f.row, f.problem) for f in audited] == [(1, "unreadable_row")]
    assert "data.jsonl, line 2" in audited.findings[0].detail
    assert (audited.n_rows, audited.n_responses) == (3, 4)


def test_audit_is_one_finding_per_field_not_a_crash(tokenizer):
    row = pair(chosen="", rejected=None, irr_train=" Four")
    audited = audit(tokenizer, [row], ["irr_train"])
    assert {(f.field, f.problem) for f in audited} == {
        ("chosen", "empty_response"),
        ("rejected", "not_text"),
    }
    assert audited.n_responses == 1


def test_every_raised_problem_is_in_the_table():
    files = [Path(lddyn.errors.__file__), *Path(module.__file__).parent.glob("*.py")]
    raised = {p for f in files for p in re.findall(r'problem="(\w+)"', f.read_text())}
    assert {"empty_response", "bad_mask", "unreadable_row", "bad_token_id"} <= raised
    assert raised <= set(PROBLEMS)


def test_real_rows_audit(hh):
    tokenizer, table = hh
    audited = audit(tokenizer, table[:100], "all", vocab_size=2048, max_positions=512)
    assert audited.n_rows == 100
    assert audited.n_responses == 1300 - len(
        [f for f in audited if f.problem in ("empty_response", "empty_prompt", "not_text")]
    )
    assert set(audited.counts()) <= {
        "special_in_response",
        "over_default_length",
        "over_context",
        "empty_response",
        "blank_response",
        "identical_pair",
        "boundary_merge",
    }
    over = [r for r in table[:100] if len(tokenizer(r["prompt"] + r["chosen"])["input_ids"]) > 511]
    assert len([f for f in audited.of("over_context") if f.field == "chosen"]) == len(over)
