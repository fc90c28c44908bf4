"""`make gpu-check` where there is no GPU: its plan, its refusal, its figures on tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


def call(*args):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SCRIPT, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_dry_run_prints_the_plan():
    done = call("--dry-run")
    assert done.returncode == 0, done.stderr
    for step in ("build", "self-test", "tests", "memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"\n{step}: " in f"\n{done.stdout}"
    assert "engine 0.5B" in done.stdout and "engine 7B" in done.stdout


def test_without_a_gpu_nothing_runs_and_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = call()
    assert done.returncode == 1
    assert "NO CUDA GPU" in done.stdout and "nothing was built, run or measured" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_measuring_works_on_tiny_sizes(tmp_path):
    out = tmp_path / "results.json"
    for worker in ("ops", "engine small"):
        done = call("--device", "cpu", "--small", "--out", str(out), "--worker", worker)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    sections = {"ceilings", "gram", "residual", "sketch", "attention_pullback", "engine small"}
    assert set(found) == sections
    for ways in found["gram"]["result"].values():
        assert all(way["error"] < 0.02 and way["seconds"] > 0 for way in ways.values())
    assert found["engine small"]["result"]["flops"] > 0
    assert found["ceilings"]["made_by"]["torch"] == torch.__version__


def test_the_tests_that_scripts_name_exist():
    """A test file that was moved or renamed must not drop out of the GPU check or the matrix."""
    import gpu_check
    import matrix

    folder = Path(__file__).parent
    assert all(len(list(folder.glob(f"**/test_{name}.py"))) == 1 for name in matrix.TESTS)
    stems = [p.stem for p in gpu_check.op_tests()]
    assert len(stems) >= 7 and {"test_ops", "test_attention_ops"} <= set(stems)
