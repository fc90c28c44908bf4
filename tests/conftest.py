"""What every test shares: seeds, the interpreter switch, NaN poison, backends and error bounds."""

import os
import shutil
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from filelock import FileLock

# Before lddyn (and triton) are imported: without a GPU, Triton kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import lddyn

HERE = Path(__file__).parent
# So that tests can `import zoo`, and what another test file defines.
sys.path[:0] = [str(HERE), *(str(p) for p in sorted(HERE.iterdir()) if p.is_dir())]

from covering import covering  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# Floor of the error bound: what one rounding of operands to the dtype may cost.
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


def pytest_configure(config):
    # torch.empty and friends return NaN, so an output that nobody wrote fails its test.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("case"):
            item.user_properties.append(("case", mark.args[0]))


# Folder or file of tests → what its kinds are of, in the order of the table of `make cases`.
TOPICS = {
    "data": "Rows and files",
    "objectives": "Losses",
    "test_settings.py": "Settings of trainers",
    "integrations": "Runs that are watched",
    "engine": "Models and adapters",
}
OTHERS = "Steps, diagnoses and commands"


def pytest_terminal_summary(terminalreporter, config):
    """The table of `make cases`: one line for each kind of @pytest.mark.case(KIND)."""
    if config.option.markexpr != "case" or config.option.collectonly:
        return
    outcomes, seconds, kinds = defaultdict(Counter), Counter(), defaultdict(set)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            for kind in (value for name, value in report.user_properties if name == "case"):
                outcomes[kind][outcome] += 1
                seconds[kind] += report.duration
                path = report.nodeid.split("::")[0].removeprefix("tests/")
                kinds[TOPICS.get(path.split("/")[0], OTHERS)].add((kind, path))
    right = {kind for kind, count in outcomes.items() if not count.keys() - {"passed", "skipped"}}
    checked = {kind for kind in right if outcomes[kind]["passed"]}
    terminalreporter.section("kinds of rows, models and trainers that people hold")
    terminalreporter.write_line(
        "right: lddyn says what the tests of this kind hold, which is made by autograd, a real\n"
        "step or the trainer itself. The number is that of the tests."
    )
    for topic in (*TOPICS.values(), OTHERS):
        entries = sorted(kinds[topic], key=lambda entry: entry[0].lower())
        if entries:
            terminalreporter.write_line(f"\n{topic}")
        for kind, path in entries:
            word = "right" if kind in checked else "skipped" if kind in right else "WRONG"
            count = sum(outcomes[kind].values())
            terminalreporter.write_line(
                f"  {word:7} {count:3}  {kind:72} {seconds[kind]:6.1f} s  {path}"
            )
    skipped, wrong = right - checked, outcomes.keys() - right
    terminalreporter.write_line(
        f"\n{len(checked)} kinds right, {len(wrong)} wrong, {len(skipped)} skipped"
        + (f"; wrong: {'; '.join(sorted(wrong))}" if wrong else "")
    )


def pytest_generate_tests(metafunc):
    """Parametrizes dtype, backend and the axes of @pytest.mark.covering, by covering pairs.

    dtype is each of DTYPES. A test named test_<op>_<property> that has `use` runs on every backend
    that its op has for this machine's device, in the dtypes that the backend takes.
    @pytest.mark.covering(NAME=VALUES, ..., allowed=FUNCTION) adds axes, and drops cases for which
    FUNCTION(**case) is False.
    """
    axes, rules = {}, []
    for mark in metafunc.definition.iter_markers("covering"):
        axes |= {name: values for name, values in mark.kwargs.items() if name != "allowed"}
        rules += [mark.kwargs["allowed"]] if "allowed" in mark.kwargs else []
    parametrized = {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "dtype" in metafunc.fixturenames and "dtype" not in parametrized:
        axes["dtype"] = DTYPES.values()
    if "use" in metafunc.fixturenames:
        test = metafunc.function.__name__.removeprefix("test_")
        op = lddyn.ops.OPS[max((name for name in lddyn.ops.OPS if test.startswith(name)), key=len)]
        other = "cpp" if DEVICE == "cuda" else "cuda"
        axes["backend"] = [name for name in op.implementations if name != other]
        # A backend that is not here at all stays, so that its tests are skipped with the reason.
        here = {x for x in axes["backend"] if not op.refusal(x, torch.device(DEVICE))}
        rules.append(
            lambda backend, dtype=None, **_: (
                dtype is None
                or backend not in here
                or not op.refusal(backend, torch.device(DEVICE), dtype)
            )
        )
    if axes:
        cases = covering(axes, lambda **case: all(rule(**case) for rule in rules))
        names = {dtype: name for name, dtype in DTYPES.items()}
        ids = ["-".join(names.get(x) or label(x) for x in case) for case in cases]
        metafunc.parametrize(tuple(axes), cases, ids=ids)


def label(value):
    """Name of a parameter: (3, 700) → 3x700, ("gram", "cpp") → gram-cpp."""
    if not isinstance(value, tuple):
        return str(value)
    return ("-" if isinstance(value[0], str) else "x").join(map(label, value))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def use(backend, device):
    """A context manager factory: run an op of a dtype on the backend, or skip with the reason."""

    def enter(op, dtype=torch.float32):
        reason = lddyn.ops.OPS[op].refusal(backend, torch.device(device), dtype)
        if reason:
            pytest.skip(f"{op} on {backend}: {reason}")
        return lddyn.backend(backend)

    return enter


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Function (name, make) -> folder that make(folder) filled, once for all workers of a session.

    Other workers wait for the one that makes it: a test that asks for it needs a timeout that
    allows for a busy machine, which pytest's default for a test does not.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def get(name, make):
        folder = base / name
        with FileLock(base / f"{name}.lock"):
            if not (folder / "made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (folder / "made").touch()
        return folder

    return get


@pytest.fixture(scope="session")
def small_worlds(made_once):
    """A folder in which `build_world` finds a small Llama, taught for 20 steps, in its cache.

    It stands there for the demo's full training, and for steps=20.
    """

    def make(folder):
        from lddyn.demo import training
        from lddyn.demo import world as demo

        there = [demo.world_folder(folder, steps=steps) for steps in (None, 20)]
        sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
        with pytest.MonkeyPatch.context() as patch:
            for name, size in sizes.items():
                patch.setitem(training.ARCHITECTURE, name, size)
            taught = demo.build_world(folder / "taught", progress=False, steps=20)
        for place in there:
            shutil.copytree(taught.path, place)

    return made_once("worlds", make)


@pytest.fixture
def assert_accurate():
    """The house's bound: at most twice as wrong as plain torch in the same dtype, plus a floor.

    Errors are relative to the norm of the float64 truth. A NaN fails.
    """

    def check(out, truth, plain, floor_dtype):
        def error(x):
            size = truth.norm()
            return float((x.double() - truth).norm() / (size if size > 0 else 1.0))

        assert out.shape == truth.shape
        if out.numel() == 0:
            return
        bound = FLOOR[floor_dtype] + (2 * error(plain) if plain is not None else 0.0)
        assert error(out) <= bound, f"error {error(out):.2e} above the bound {bound:.2e}"

    return check
