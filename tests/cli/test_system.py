"""`lddyn audit | env | demo | report`, end to end."""

import json
import time
from pathlib import Path

import pytest
import torch
from commands import call, errors


def test_audit(model, data):
    result = call("audit", "--model", model, "--data", data)
    assert result.exit_code == 0, result.stderr
    for problem in ("unreadable_row", "identical_pair", "over_context", "token_out_of_range"):
        assert problem in result.stdout
    document = json.loads(call("audit", "--tokenizer", model, "--data", data, "--json").stdout)
    assert document["n_rows"] == 8 and "over_context" not in document["counts"]
    assert "give --model or --tokenizer" in errors("audit", "--data", data)
    assert "'--data': file 'nowhere' does not exist" in errors(
        "audit", "--data", "nowhere", "--model", model
    )


def test_env():
    document = json.loads(call("env", "--json").stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert str(Path.home()) not in json.dumps(document)
    assert "backends" in call("env").stdout


def test_report_without_a_run(tmp_path):
    assert "no decomposition.json" in errors("report", tmp_path)


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_CACHE_DIR", str(tmp_path / "cache"))
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
