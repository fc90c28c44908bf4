"""Every C++ op under AddressSanitizer and UndefinedBehaviorSanitizer, through its Python entry."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-std=c++17 -O0 -g -fopenmp -fPIC -shared -fvisibility=hidden -fno-omit-frame-pointer"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"

# Run in a process of its own: the sanitized module takes the place of lddyn._C. Operands are as
# they come, and as views with gaps, on one thread and on three.
PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lddyn._C", sys.argv[1])
sys.modules["lddyn._C"] = native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
import torch
import lddyn
from lddyn import ops

if sys.argv[2] == "overflow":
    x, y, out = torch.randn(1, 100), torch.zeros(1, dtype=torch.int64), torch.empty(1, 200)
    native.residual_cpu(
        native.Residual(*(z.data_ptr() for z in (x, y, *[out] * 4, y)), 1, 200, 200, 0), 1
    )
    sys.exit()
ran = set()
for op in ops.OPS.values():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if op.refusal("cpp", torch.device("cpu"), dtype):
            continue
        for gaps in (False, True):
            def normal(*shape):
                wide = torch.randn(*shape[:-1], shape[-1] + 3 * gaps).to(dtype)
                return wide[..., : shape[-1]]

            for threads in (1, 3):
                torch.set_num_threads(threads)
                with lddyn.backend("cpp"):
                    getattr(ops, op.name)(*op.sample(normal))
        ran.add(op.name)
with lddyn.backend("cpp"):  # several tiles, the last of them ragged
    q, k, v = torch.randn(4, 130, 33), torch.randn(2, 290, 33), torch.randn(2, 290, 21)
    mask = torch.full((1, 130, 290), -torch.inf).triu(160)
    ops.attention_pullback(q, k, v, mask, torch.randn(2, 4, 130, 21), 0.2)
    tangents = (torch.randn(2, *x.shape) for x in (q, k, v))
    ops.attention_pushforward(q, k, v, mask, *tangents, 0.2)
    a, g, lengths = torch.randn(37, 260), torch.randn(35, 37, 203), torch.arange(35) + 2
    ops.gram(a, g, a, g, lengths, lengths.flip(0))
print(" ".join(sorted(ran)))
"""


pytestmark = pytest.mark.timeout(1800)  # g++ and the sanitizers on a machine with much other work


@pytest.fixture(scope="module")
def probe(made_once):
    """Runs PROBE on a sanitized build of csrc/*.cpp."""
    compiler = shutil.which("g++") or pytest.skip("NO g++: the C++ ops were not sanitized")
    pybind11 = pytest.importorskip("pybind11")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("NO libasan: the C++ ops were not sanitized")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [compiler, *FLAGS.split(), *SANITIZERS.split(), '-DLDDYN_CUDA_ARCHS=""', *includes]
    sources = sorted((ROOT / "csrc").glob("*.cpp"))

    def lighter(source):
        # pybind11's templates: no arithmetic of ours, and half of the compiler's time.
        return ["-fno-sanitize=undefined"] if source.stem == "bindings" else []

    def build(folder):
        objects = [folder / f"{source.stem}.o" for source in sources]
        compiling = [
            subprocess.Popen(
                [*(x for x in command if x != "-shared"), *lighter(source), "-c", source, "-o", to]
            )
            for source, to in zip(sources, objects, strict=True)
        ]
        assert [process.wait() for process in compiling] == [0] * len(sources)
        subprocess.run([*command, *objects, "-o", folder / "_C.so"], check=True)

    target = made_once("sanitized", build) / "_C.so"

    def run(what):
        options = "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0"
        environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options}
        environment |= {"UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONMALLOC": "malloc"}
        return subprocess.run(
            [sys.executable, "-c", PROBE, target, what],
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.slow
def test_every_cpp_op_is_clean(probe):
    from lddyn import ops

    done = probe("ops")
    assert done.returncode == 0, done.stderr[-4000:]
    expected = {name for name, op in ops.OPS.items() if "cpp" in op.implementations}
    assert set(done.stdout.split()) == expected


@pytest.mark.slow
def test_the_sanitizer_sees_an_overflow(probe):
    done = probe("overflow")
    assert done.returncode and "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
