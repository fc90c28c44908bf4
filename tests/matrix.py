"""Runs the tests under other versions of Python, torch, transformers and TRL, one row at a time.

python tests/matrix.py --list
python tests/matrix.py --only oldest,newest        # default: all rows
python benchmarks/report.py                        # renders docs/versions.md

A row is a fresh virtual environment into which the committed tree is installed as a user would do
it (the wheel is built, so a C++ compiler is needed), and in which its tests run. Its result goes to
benchmarks/results/versions.json. A row of a CUDA torch downloads and unpacks about 5 GB; its
environment is deleted afterwards unless --keep. Python is looked for on PATH and in pyenv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
HOME = ROOT / ".venv-matrix"

# Name → Python, and what pip is told beside lddyn itself. Together they take each end of each axis
# and the stacks that people have: LLaMA-Factory's (old), Axolotl's, a GPU image's without TRL.
ROWS = {
    "oldest": (
        "3.11",
        "torch==2.11.0 transformers==4.57.0 trl==0.24.0 peft==0.18.0 accelerate==1.11.0 "
        "datasets==4.0.0 safetensors==0.6.1 numpy==1.26.4 scipy==1.11.4 typer==0.19.2 rich==13.9.4 "
        "jinja2==3.1.4 matplotlib==3.8.4 tqdm==4.67.0 pyarrow==18.1.0 pandas==2.2.3",
    ),
    "llama-factory": (
        "3.11",
        "torch==2.13.0 transformers==4.57.6 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 "
        "datasets==4.0.0",
    ),
    "axolotl": (
        "3.11",
        "torch==2.13.0 transformers==5.16.1 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 "
        "datasets==4.8.4",
    ),
    "first-5": (
        "3.12",
        "torch==2.12.1 transformers==5.0.0 trl==1.0.0 peft==0.18.1 accelerate==1.12.0",
    ),
    "image": ("3.12", "torch==2.11.0 transformers==5.17.0 peft==0.21.2 accelerate==1.15.0"),
    "pinned": (
        "3.12",
        "torch==2.14.1 transformers==5.23.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 "
        "datasets==5.2.0",
    ),
    "newest": ("3.13", "torch==2.15.0 transformers>=5.24 trl peft accelerate datasets"),
}
TOOLS = "pytest pytest-timeout hypothesis pybind11"
# Ops, opened models and their ledger, exact answers, the integrations, what an import costs: what
# other versions can break. Not the laboratory, nor what tests C++ alone.
TESTS = (
    *(
        "trainer",
        "trl",
        "trl_losses",
        "loop",
        "ops",
        "elementwise_ops",
        "precondition_ops",
        "product",
        "sketch_ops",
    ),
    *("attention_ops", "layers", "anatomy", "decompose", "logits", "diagnose", "environment"),
    "package",
)
# Long, and of no other code; and the test that reads what this script writes.
LEFT_OUT = (
    "triton or untied or examples_in_docstrings or tested_versions or (decompose and not tied)"
)
SHOWN = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets"),
    *("tokenizers", "safetensors", "numpy", "scipy", "triton"),
)


def interpreter(version: str) -> str:
    """The command of Python `version`, from PATH or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [str(p / "bin" / "python") for p in sorted(pyenv.glob(f"{version}.*"))]
    command = found[-1] if found else shutil.which(f"python{version}")
    if command is None:
        raise SystemExit(f"Python {version} not found: put python{version} on PATH, or use pyenv")
    return command


def shell(*command: Any, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command; its output is captured."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, text=True, capture_output=True, **options)


def install(name: str, folder: Path) -> Path:
    """A fresh environment of the row with the committed tree in it; its folder of commands."""
    version, wanted = ROWS[name]
    shutil.rmtree(folder, ignore_errors=True)
    tree = folder / "tree"
    tree.mkdir(parents=True)
    shell("git", "archive", "-o", folder / "tree.tar", "HEAD", check=True)
    shutil.unpack_archive(folder / "tree.tar", tree)
    shell(interpreter(version), "-m", "venv", folder / "venv", check=True)
    programs = folder / "venv" / "bin"
    packages = [*wanted.split(), *TOOLS.split()]
    no_cuda = os.environ | {"LDDYN_CUDA": "0"}  # the rows run on CPU everywhere
    for step in (packages, [*packages, str(tree)]):  # what builds lddyn must not choose a torch
        done = shell(programs / "pip", "install", *step, env=no_cuda)
        if done.returncode:
            raise SystemExit(f"{name}: pip could not install it\n{done.stderr[-4000:]}")
    return programs


def run(name: str, keep: bool, tests: Sequence[str]) -> dict[str, Any]:
    """What the row's tests said."""
    folder = HOME / name
    commit = shell("git", "rev-parse", "--short", "HEAD", check=True).stdout.strip()
    print(f"{name}: installing {ROWS[name][1]}", flush=True)
    programs = install(name, folder)
    print(f"{name}: testing", flush=True)
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    files = [next((folder / "tree").glob(f"tests/**/test_{test}.py")) for test in tests]
    report = folder / "tests.xml"
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [programs / "pytest", "-v", "-k", f"not ({LEFT_OUT})", f"--junitxml={report}", *files],
            cwd=folder / "tree",
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if not report.exists():
        raise SystemExit(f"{name}: pytest did not start, see {folder / 'log'}")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {k: int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped")}
    wrong = [
        f"{case.attrib['classname'].removeprefix('tests.')}::{case.attrib['name']}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    said = shell(programs / "lddyn", "env", "--json", "--selftest", cwd=folder, env=environment)
    versions = json.loads(said.stdout)["versions"]
    if not keep:
        shutil.rmtree(folder / "venv")
    return {
        "python": versions["python"],
        "packages": {p: versions[p] for p in SHOWN},
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "skipped": counts["skipped"],
        "failed": wrong,
        "whole": done.returncode in (0, 1),  # not stopped halfway
        "selftest": not said.returncode,
        "seconds": round(time.monotonic() - began),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def record(name: str, found: dict[str, Any]) -> None:
    """Puts a row into the results."""
    rows = json.loads(RESULTS.read_text())["versions"]["rows"] if RESULTS.exists() else {}
    rows[name] = found
    ordered = {n: rows[n] for n in ROWS if n in rows}
    section = {"rows": ordered, "tests": TESTS, "left_out": LEFT_OUT}
    RESULTS.write_text(json.dumps({"versions": section}, indent=1) + "\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows, by name")
    parser.add_argument("--tests", help="test files, by name; such a run is not recorded")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - ROWS.keys():
        parser.error(f"--only: no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if args.list:
        for name, (version, wanted) in ROWS.items():
            print(f"{name}: Python {version}, {wanted}")
        return 0
    failed = 0
    for name in names:
        found = run(name, args.keep, args.tests.split(",") if args.tests else TESTS)
        if not args.tests:
            record(name, found)
        print(
            f"{name}: {found['passed']} passed, {len(found['failed'])} failed, "
            f"{found['skipped']} skipped",
            *found["failed"],
            sep="\n  ",
            flush=True,
        )
        failed += len(found["failed"]) + (not found["selftest"]) + (not found["whole"])
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
