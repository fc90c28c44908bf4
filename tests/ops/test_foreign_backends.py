"""Backends of other packages, as a small installed distribution: found, listed, used, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE = '''
"""A backend of one op, which counts its calls."""
import torch
from lddyn import reference

calls = 0

def gram(*args):
    global calls
    calls += 1
    return reference.gram(*args)

def why_not(op, device, dtype):
    return "" if dtype in (None, torch.float32) else f"{op} of toy takes float32, got {dtype}"
'''
ENTRIES = """
[lddyn.backends]
toy = toy_backend
cpp = toy_backend
broken = toy_backend.absent
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as pip leaves it: a module, and what the distribution says of itself."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_backend.py").write_text(MODULE)
    about = folder / "toy_lddyn-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-lddyn\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    return folder


def python(installed, code, **environment):
    path = os.pathsep.join([str(installed), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
    )


def test_a_backend_of_another_package_is_listed_and_used(installed):
    code = """
import json, pytest, torch, transformers, lddyn, toy_backend
a, g = torch.randn(5, 3), torch.randn(2, 5, 4)
plain = lddyn.gram(a, g, a, g)
assert not toy_backend.calls  # nothing changes by being installed
with lddyn.backend("toy"):
    assert torch.allclose(lddyn.gram(a, g, a, g), plain)
    assert toy_backend.calls == 1
    lddyn.residual(torch.randn(2, 9), torch.tensor([1, 2]))  # has none: as without it
    with pytest.raises(RuntimeError, match="gram of toy takes float32, got torch.float64"):
        lddyn.gram(a.double(), g.double(), a.double(), g.double())
for name, message in {"broken": "toy_backend.absent of toy-lddyn cannot be loaded"}.items():
    with pytest.raises(RuntimeError, match=message), lddyn.backend(name):
        pass
with pytest.raises(ValueError, match="cpp, reference, toy; got 'gpu'"), lddyn.backend("gpu"):
    pass
config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
model = transformers.LlamaForCausalLM(config)
ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
usual, calls = lddyn.ntk(model, ex, ex).gram(), toy_backend.calls
with lddyn.backend("toy"):  # the whole engine, with this op of the package
    assert torch.allclose(lddyn.ntk(model, ex, ex).gram(), usual, rtol=1e-4)
assert toy_backend.calls > calls
rows = [row for row in lddyn.selftest() if row["backend"] == "toy"]
assert [(row["op"], row["dtype"], row["ok"]) for row in rows] == [("gram", "float32", True)]
print(json.dumps(lddyn.env()))
"""
    done = python(installed, code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["others"]["toy"] == "gram"
    assert "ModuleNotFoundError" in found["others"]["broken"]
    assert "must not be called cpp" in found["others"]["toy_backend of toy-lddyn"]
    assert found["backends"]["gram"]["cpu"]["toy"] == ""
    assert "toy" not in found["backends"]["residual"]["cpu"]


def test_the_environment_asks_for_it(installed):
    code = """
import torch, lddyn, toy_backend
a, g = torch.randn(5, 3), torch.randn(2, 5, 4)
lddyn.gram(a, g, a, g)
print(toy_backend.calls)
"""
    assert python(installed, code, LDDYN_BACKEND="toy").stdout.strip() == "1"
    broken = python(installed, code, LDDYN_BACKEND="broken")
    assert "RuntimeError: backend 'broken' cannot run: toy_backend.absent" in broken.stderr


def test_env_prints_it(installed):
    done = python(
        installed, "from lddyn.cli import main; import sys; sys.argv[1:] = ['env']; main()"
    )
    assert done.returncode == 0, done.stderr
    assert "others" in done.stdout and "toy" in done.stdout
