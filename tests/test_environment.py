"""The report of an installation, and its self-test."""

import getpass
import io
import json

import torch
from rich.console import Console

import lddyn
from lddyn import environment, ops


def test_env_is_json_and_complete():
    found = json.loads(json.dumps(lddyn.env()))
    assert found["versions"]["lddyn"] == lddyn.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(ops.OPS)


def test_env_shows_no_path_and_no_user(monkeypatch):
    monkeypatch.setenv("LDDYN_CACHE_DIR", "/somewhere/private")
    monkeypatch.setenv("LDDYN_STRICT", "1")
    text = json.dumps(lddyn.env())
    assert "private" not in text and "/somewhere" not in text
    assert json.loads(text)["variables"]["LDDYN_CACHE_DIR"] == "set"
    assert json.loads(text)["variables"]["LDDYN_STRICT"] == "1"
    user = getpass.getuser()
    assert len(user) < 5 or user not in text


def test_selftest_runs_every_available_backend():
    rows = lddyn.selftest()
    assert all(row["ok"] for row in rows), rows
    assert {row["op"] for row in rows} == set(ops.OPS)
    assert {"reference"} <= {row["backend"] for row in rows}


def test_selftest_catches_a_wrong_backend(monkeypatch):
    monkeypatch.setitem(
        ops.OPS["gram"].implementations, "reference", lambda *x: ops.OPS["gram"].fake(*x)
    )
    assert not all(row["ok"] for row in lddyn.selftest())


def test_the_tables_print():
    console = Console(file=io.StringIO(), width=120)
    environment.print_env(console)
    assert environment.print_selftest(console)
    text = console.file.getvalue()
    assert "reference" in text and "FAILED" not in text
