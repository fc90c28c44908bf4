"""The package as a whole: rooms, what an import costs, what source may not contain."""

import ast
import doctest
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lddyn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lddyn"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Rooms, lowest first. A room may import rooms of lower rows only, TYPE_CHECKING included; `kernels`
# and `csrc` know nothing of lddyn. CONTRIBUTING.md says in one line what each room is for.
ROOMS = [
    {"lazy", "errors", "text", "stats", "reference", "ranks"},
    {"cells", "files", "finite", "frameworks"},
    {"arguments", "memory", "ops", "loading", "torch_files"},
    {"results", "settings"},
    {"data", "optimizers", "environment", "estimate", "report"},
    {"engine"},
    {"objectives"},
    {"entk", "sketches", "probes"},
    {"steps"},
    {"store"},
    {"sets"},
    {"integrations", "demo"},
    {"lab"},
    {"cli"},
    {"__main__"},
]
ROW = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}


def module_of(path):
    """lddyn/ops/gram.py → lddyn.ops.gram; a package's __init__.py → the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    """lddyn.ops.gram → ops."""
    return module.split(".")[1]


def imports_of(path):
    """(module, kind) of every import of a source file; kind is run, lazy or types."""
    waiting = [(ast.parse(path.read_text()), "run")]
    while waiting:
        node, kind = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            kind = "types"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and kind == "run":
            kind = "lazy"
        waiting += [(child, kind) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            yield from ((alias.name, kind) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: import absolutely"
            yield node.module, kind
            yield from ((f"{node.module}.{alias.name}", kind) for alias in node.names)


def imported(path):
    """Names under lddyn that a source file imports, for any reason: {"ops", "_C", ...}."""
    return {name.split(".")[1] for name, _ in imports_of(path) if name.startswith("lddyn.")}


MODULES = {module_of(path): path for path in SOURCES}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "lddyn"])
def test_arrows_between_rooms_point_downwards(module):
    room = room_of(module)
    assert room in ROW, f"give {room} a row in ROOMS"
    for other in imported(MODULES[module]) & ROW.keys() - {room}:
        assert ROW[other] < ROW[room], f"{module} may not import {other}"


def test_contributing_lists_the_rooms():
    """Highest first, each in its row, with one line on what it is for."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("<!-- rooms:begin -->")[1].split("<!-- rooms:end -->")[0]
    listed, row = [], 0
    for number, rooms, purpose in re.findall(r"^\| (\d*) *\| (`.*?) \| (.+) \|$", table, re.M):
        row = int(number or row)
        assert len(purpose) > 20
        listed += [(room.strip("/"), row) for room in re.findall(r"`([\w/]+)`", rooms)]
    assert dict(listed) == {room: at + 1 for room, at in ROW.items() if room != "__main__"}
    assert [at for _, at in listed] == sorted((at for _, at in listed), reverse=True)


def test_imports_have_no_circle():
    graph = {
        module: {n for n, kind in imports_of(path) if kind == "run" and n in MODULES}
        - {module, "lddyn"}
        for module, path in MODULES.items()
    }
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"import cycle: {' → '.join([*open_, module])}"
        if module in done:
            return
        open_.append(module)
        for other in graph[module]:
            visit(other)
        done.add(open_.pop())

    for module in graph:
        visit(module)


def test_no_module_is_named_like_a_public_name():
    """`lddyn.ntk` is the function whatever was imported before."""
    names = {path.stem for path in PACKAGE.iterdir()}
    assert not names & set(lddyn.__all__)


def test_a_module_is_reached_by_attribute_after_import_lddyn():
    """`import lddyn; lddyn.steps.verify`: every package imports its modules when they are named.

    lddyn.ops imports all of its modules at once: lddyn.ops.gram is the op.
    """
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent.name != "ops":
            source = path.read_text()
            assert "__getattr__, __dir__ = attributes(__name__" in source, path


def test_tests_are_laid_out_like_the_rooms():
    folders = {p.name for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py"))}
    assert folders <= {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}


def test_only_ops_opens_the_compiled_doors():
    door = re.compile(r"lddyn\._C|lddyn\.kernels|import _C|import kernels")
    for path in SOURCES:
        if "ops" not in path.relative_to(PACKAGE).parts:
            assert not door.search(path.read_text()), f"{path.name} names _C or kernels"
            assert not imported(path) & {"_C", "kernels"}


def test_kernels_know_nothing_of_lddyn():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imported(path)


BANNED = {
    "pickle": r"\bimport pickle\b|\bpickle\.",
    "torch.load": r"\btorch\.load\(",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "yaml.load": r"\byaml\.load\(",
    "shell=True": r"shell\s*=\s*True",
    "allow_pickle": r"allow_pickle",
}


@pytest.mark.parametrize("name", BANNED)
def test_nothing_runs_what_it_reads(name):
    for path in SOURCES:
        assert not re.search(BANNED[name], path.read_text()), f"{path.name} uses {name}"


# --------------------------------------------------------------------------- imports


def python(code, **environment):
    """Standard output of a fresh interpreter; not in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env=os.environ | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = "torch", "transformers", "triton", "numpy", "matplotlib"
    code = f"import sys, lddyn; lddyn.__version__; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_public_names_bring_torch_alone():
    heavy = (
        *("transformers", "triton", "peft", "trl", "accelerate", "datasets", "pandas", "pyarrow"),
        *("matplotlib", "scipy", "sklearn", "jinja2", "rich", "typer", "safetensors", "tokenizers"),
    )
    code = f"""
import sys, lddyn, lddyn.integrations.loop
for name in lddyn.__all__:
    getattr(lddyn, name)
print([m for m in {heavy} if m in sys.modules])
"""
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("order", ["lddyn, torch", "torch, lddyn", "lddyn, torch, lddyn.ops"])
def test_ops_are_registered_in_any_order_of_import(order):
    code = (
        f"import {order}; print(torch.ops.lddyn.residual(torch.zeros(1, 4), torch.tensor([0]))[1])"
    )
    assert python(code).startswith("tensor([-1.3863])")


@pytest.mark.parametrize("name", lddyn.__all__)
def test_public_names_exist(name):
    assert getattr(lddyn, name) is not None
    assert name in dir(lddyn)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lddyn' has no attribute 'decompoze'"):
        _ = lddyn.decompoze


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden}: raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hidden())
"""


def test_ops_work_without_triton_and_without_the_compiled_module():
    code = (
        HIDE.format(hidden={"triton", "lddyn._C"})
        + """
import torch, lddyn
lddyn.residual(torch.randn(2, 5), torch.tensor([0, 1]))
print(lddyn.backends()["residual"]["cpu"])
"""
    )
    out = python(code, TRITON_INTERPRET="0")
    assert "lddyn._C cannot be imported" in out and "'reference': ''" in out


def test_help_is_light():
    code = """
import sys
from lddyn.cli.app import main
sys.argv = ["lddyn", "--help"]
try:
    main()
except SystemExit as leave:
    assert not leave.code
print("HEAVY", [m for m in ("torch", "transformers") if m in sys.modules])
"""
    assert "HEAVY []" in python(code)


@pytest.mark.skipif(os.name == "nt", reason="needs the resources of a child process")
def test_help_takes_less_than_a_second():
    import resource

    def used():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    before = used()  # of a processor: what a loaded machine takes on top is not ours
    text = python(
        "import sys; sys.argv = ['lddyn', '--help']; from lddyn.cli.app import main; main()"
    )
    assert "decompose" in text and used() - before < 1.0


# --------------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"lddyn": lddyn, "torch": torch})
    assert result.failed == 0


def test_the_readme_of_the_package_has_no_relative_link(monkeypatch):
    """A package index shows it outside the repository."""
    setuptools, said = pytest.importorskip("setuptools"), {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    links = re.findall(r"\]\(([^)]*)\)", said["long_description"])
    assert all(link.startswith("https://") for link in links), links
    assert said["long_description"].startswith("# lddyn")


def test_the_version_is_one():
    from importlib.metadata import version

    assert version("lddyn") == lddyn.__version__


def test_no_source_file_names_a_machine():
    """No home folder and no registry host: what is committed is for everyone."""
    telling = re.compile(r"/home/\w|/Users/\w|/root/|index-url|https?://[\w.-]*(pypi|mirror|proxy)")
    for folder in ("lddyn", "kernels", "csrc", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h") or path.name == "run":
                assert not telling.search(path.read_text()), path.name


@pytest.mark.parametrize(
    "statement",
    ["import lddyn.reference", "from lddyn import reference", "import lddyn; lddyn.reference.gram"],
)
def test_the_specification_can_be_imported_first(statement):
    check = "; import torch; assert torch.ops.lddyn.gram; assert 'lddyn.ops' in sys.modules"
    python(f"import sys; {statement}{check}")
