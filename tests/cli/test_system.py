"""`lddyn audit | env | demo | report`, end to end."""

import json
import time
from pathlib import Path

import pytest
import torch
from commands import call, errors

from lddyn.demo.training import ARCHITECTURE


def test_audit(model, data):
    result = call("audit", "--model", model, "--data", data)
    assert result.exit_code == 1, result.stderr  # rows that cannot be used
    for problem in ("unreadable_row", "identical_pair", "over_context", "token_out_of_range"):
        assert problem in result.stdout
    document = json.loads(call("audit", "--tokenizer", model, "--data", data, "--json").stdout)
    assert document["n_rows"] == 8 and "over_context" not in document["counts"]
    assert "give --model or --tokenizer" in errors("audit", "--data", data)
    assert "nowhere: no such file or folder; expected .jsonl" in errors(
        "audit", "--data", "nowhere", "--model", model
    )


def test_audit_exits_with_1_for_unusable_rows_and_if_strict_for_warnings(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, codes in (
        ({"prompt": "a b ?", "completion": " c d", "id": 7}, (0, 0)),
        ({"prompt": "a b ?", "completion": " c d", "weight": 0.5}, (0, 1)),
        ({"prompt": "a b ?", "completion": None}, (1, 1)),
    ):
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        arguments = ["audit", "--model", model, "--data", path]
        assert (call(*arguments).exit_code, call(*arguments, "--strict").exit_code) == codes
    assert "rows.jsonl, line 1) completion: completion must be text" in call(*arguments).stdout
    path.write_text("")
    empty = call(*arguments)
    assert empty.exit_code == 1 and "the data has no row" in empty.stdout


def test_env():
    document = json.loads(call("env", "--json").stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert str(Path.home()) not in json.dumps(document)
    assert "backends" in call("env").stdout


def test_report_without_a_run(tmp_path):
    assert "no decomposition.json" in errors("report", tmp_path)


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_CACHE_DIR", str(tmp_path / "cache"))
    for name, size in {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}.items():
        monkeypatch.setitem(ARCHITECTURE, name, size)
    began = time.process_time()  # what a busy machine adds to it is not the demo's
    result = call("demo", "--out", tmp_path / "demo", "--quick", "--json")
    assert result.exit_code == 0, result.stderr
    assert time.process_time() - began < 180
    summary = json.loads(result.stdout)
    assert [s["explained"] for s in summary["steps"]] == [False, True]
    for step in ("sft", "dpo"):
        assert summary[step]["rule"] == "midpoint"
        assert summary[step]["verification"]["relative_error"] < 0.05
        assert (tmp_path / "demo" / step / "influence-0-chosen.png").is_file()
    # the explained step is the step that was taken
    taken = summary["steps"][1]
    told = {o["name"]: o["delta_logp"] for o in summary["dpo"]["observed"]}
    assert told["chosen"] == pytest.approx(taken["y+"], rel=0.05, abs=1e-3)
    assert told["rejected"] == pytest.approx(taken["y-"], rel=0.05, abs=1e-3)
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 2
    assert call("report", tmp_path / "demo").exit_code == 0
    same = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8") == page
    assert same
