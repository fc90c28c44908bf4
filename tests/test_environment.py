"""The report of an installation, and its self-test."""

import getpass
import json
from pathlib import Path

import pytest
import torch

import lddyn
from lddyn import environment, ops
from lddyn.cli.console import print_parts
from lddyn.cli.environment import env_parts, selftest_parts


def test_env_is_json_and_complete():
    found = json.loads(json.dumps(lddyn.env()))
    assert found["versions"]["lddyn"] == lddyn.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(ops.OPS)
    assert found["system"]["memory"] >= found["system"]["memory_available"] >= 0
    assert found["system"]["cores"] >= 1 and found["system"]["threads"] == torch.get_num_threads()


def test_env_shows_no_path_and_no_user(monkeypatch):
    monkeypatch.setenv("LDDYN_CACHE_DIR", "/somewhere/private")
    monkeypatch.setenv("LDDYN_STRICT", "1")
    text = json.dumps(lddyn.env())
    assert "private" not in text and "/somewhere" not in text
    assert json.loads(text)["variables"]["LDDYN_CACHE_DIR"] == "set"
    assert json.loads(text)["variables"]["LDDYN_STRICT"] == "1"
    user = getpass.getuser()
    assert len(user) < 5 or user not in text


@pytest.fixture(scope="module")
def selftest():
    return lddyn.selftest()


def test_selftest_runs_every_available_backend(selftest):
    rows = selftest
    assert all(row["ok"] for row in rows), rows
    assert {row["op"] for row in rows} == set(ops.OPS)
    assert {"reference"} <= {row["backend"] for row in rows}


def test_selftest_catches_a_wrong_backend(monkeypatch):
    monkeypatch.setitem(
        ops.OPS["gram"].implementations, "reference", lambda *x: ops.OPS["gram"].fake(*x)
    )
    assert not all(row["ok"] for row in lddyn.selftest())


def printed(capsys, parts):
    print_parts(parts)
    return capsys.readouterr().out


def test_the_tables_print(capsys, selftest):
    text = printed(capsys, [*env_parts(lddyn.env()), *selftest_parts(selftest)])
    assert "reference" in text and "FAILED" not in text and "[green]" not in text


def test_a_failed_case_is_shown(capsys, selftest):
    (row, *_) = selftest
    assert "FAILED" in printed(capsys, selftest_parts([row | {"ok": False}]))


# --------------------------------------------------------------------------- known traps


def traps(**changes):
    """The warnings of an environment that differs from this one, by name."""
    found = {k: v for k, v in lddyn.env().items() if k != "warnings"}
    for name, change in changes.items():
        found[name] = found[name] | change if isinstance(change, dict) else change
    return {t["name"]: t for t in environment._traps(found)}


H100 = {"name": "H100", "capability": "sm_90", "multiprocessors": 132, "memory": 80 << 30}


@pytest.mark.parametrize(
    ("changes", "name", "got", "do"),
    [
        ({"versions": {"torch": "2.99.0"}}, "torch", "2.99.0", "selftest"),
        ({"versions": {"transformers": "4.30.1"}}, "transformers", "4.30.1", "upgrade"),
        ({"versions": {"trl": "0.9"}}, "trl", "0.9", "upgrade"),
        ({"compiled": {"cpu": "cannot be imported"}}, "compiled module", "cannot", "C++ compiler"),
        ({"system": {"threads": 64, "cores": 2}}, "threads", "64", "OMP_NUM_THREADS=2"),
        ({"system": {"memory_available": 100 << 20}}, "memory", "100 MiB", "memory="),
        ({"precision": {"float32_matmul": "high"}}, "float32 products", "high", "highest"),
        ({"devices": [H100 | {"name": "T4", "capability": "sm_75"}]}, "T4", "sm_75", "plain torch"),
        ({"devices": [H100], "versions": {"triton": "not installed"}}, "triton", "not", "pip"),
        (
            {"devices": [H100], "compiled": {"cpu": "built", "cuda": "no nvcc"}},
            "CUDA kernels",
            "no nvcc",
            "LDDYN_CUDA=1",
        ),
    ],
)
def test_traps_say_what_to_do(changes, name, got, do):
    found = traps(**changes)[name]
    assert set(found) == {"name", "got", "expected", "do"}
    assert got in found["got"] and do in found["do"] and found["expected"]
    assert (
        name
        not in traps(
            devices=[H100 | {"name": "H100"}], compiled={"cuda": "sm_90"}, system={"threads": 1}
        )
        or name == "triton"
    )


def test_a_driver_that_is_too_old_is_told_from_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for found, do in (("/bin/nvidia-smi", "driver"), (None, "nothing")):
        monkeypatch.setattr(environment.shutil, "which", lambda _, found=found: found)
        trap = traps(devices=[])["GPU"]
        assert "CUDA 13.0" in trap["got"] and do in trap["do"]


def test_packages_that_do_not_fit_are_named(monkeypatch):
    real = environment._version
    monkeypatch.setattr(
        environment, "_version", lambda name: "0.0.1" if name == "tokenizers" else real(name)
    )
    (trap,) = [t for n, t in traps().items() if n.startswith("transformers ")]
    assert trap["got"] == "tokenizers 0.0.1" and trap["expected"].startswith("tokenizers")


def test_forced_backends_are_named(monkeypatch, capsys):
    monkeypatch.setenv("LDDYN_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert traps()["LDDYN_BACKEND"]["got"] == "reference" and "TRITON_INTERPRET" in traps()
    text = printed(capsys, env_parts(lddyn.env()))
    assert "warning LDDYN_BACKEND\n  got:      reference\n  expected: unset" in text
    assert "\n  do this:  unset it" in text


def test_tested_versions_are_those_that_were_run():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "versions.json"
    rows = json.loads(path.read_text())["versions"]["rows"].values()
    for name, (low, high) in environment._TESTED.items():
        ran = [r["python"] if name == "python" else r["packages"][name] for r in rows]
        ran = sorted(environment._number(v)[:2] for v in ran if v != "not installed")
        assert (ran[0], ran[-1]) == (environment._number(low), environment._number(high)), name
