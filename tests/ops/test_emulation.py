"""CUDA C++ kernels without a GPU: compiled by g++ and run by the fibers of emulate.h.

What no CPU can show is speed, and races that need true concurrency; indices, tile loaders, layouts
of tensor cores and the pipeline's waits are shown right here.
"""

import contextlib
import ctypes
import functools
import importlib
import mmap
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lddyn import reference

family = importlib.import_module("lddyn.ops.gram")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)  # g++ on a machine with much other work
DRIVER = """
#include "gram.cu"
extern "C" int gram(const lddyn::Gram* p) { return lddyn::gram_cuda(*p, 0); }
// The last chunk of columns alone, in bfloat16.
extern "C" void last_chunk(const lddyn::Gram* q) {
  using namespace lddyn;
  const Gram p = *q;
  const int64_t first = p.d_out - p.pitch;
  emulated::launch(dynamic_shared, dim3(tiles(p.t, p.pitch), 1, p.m), kThreads, 96 << 10, nullptr,
                   [=] { push_kernel<BFloat16, __nv_bfloat16>(p, first, p.pitch, true); });
  emulated::launch(dynamic_shared, dim3(1, 1, p.splits), kThreads, 96 << 10, nullptr,
                   [=] { pair_kernel<BFloat16, __nv_bfloat16>(p, first, p.pitch, true); });
}
"""
LAUNCH = re.compile(r"(\w+(?:<[^<>]*>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)


class Gram(ctypes.Structure):
    """The struct of csrc/lddyn.h."""

    _fields_ = (
        *((f"pointer_{i}", ctypes.c_void_p) for i in range(9)),
        *((f"size_{i}", ctypes.c_int64) for i in range(8)),
        ("dtype", ctypes.c_int),
    )


def build(name, driver, launches, folder):
    """Compile csrc/NAME.cu as host code: launches become calls, CUDA's headers are empty."""
    compiler = shutil.which("g++") or pytest.skip("NO g++: the CUDA kernels were not emulated")
    source = (ROOT / "csrc" / f"{name}.cu").read_text()
    shared = "extern __shared__ __align__(16) unsigned char dynamic_shared[]"
    memory = "dynamic_shared" if shared in source else "nullptr"
    source, found = LAUNCH.subn(rf"emulated::launch({memory}, \2, [=] {{ \1(\3); }});", source)
    assert found == launches
    source = source.replace(shared, "__align__(16) unsigned char dynamic_shared[96 << 10]")
    (folder / f"{name}.cu").write_text(source)
    for header in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / header).write_text("")
    (folder / "warp.cuh").write_text('#include "emulate.h"\n')
    (folder / "driver.cpp").write_text(driver)
    target = folder / "emulated.so"
    includes = [f"-I{path}" for path in (folder, ROOT / "tests" / "ops", ROOT / "csrc")]
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", *includes]
    done = subprocess.run(
        [*command, folder / "driver.cpp", "-o", target], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def load(name, driver, launches, made_once):
    """The library that `build` makes, compiled once for all workers."""
    folder = made_once(f"emulated-{name}", functools.partial(build, name, driver, launches))
    return ctypes.CDLL(str(folder / "emulated.so"))


@pytest.fixture(scope="module")
def library(made_once):
    return load("gram", DRIVER, 3, made_once)


@pytest.fixture
def emulated(library, monkeypatch):
    """lddyn.ops' own launch of the kernels, on CPU tensors."""

    def gram_cuda(operands, stream):
        return library.gram(ctypes.byref(Gram(*(x or None for x in operands[:9]), *operands[9:])))

    native = SimpleNamespace(Gram=lambda *operands: operands, gram_cuda=gram_cuda)
    monkeypatch.setattr(family, "native", lambda: native)
    monkeypatch.setattr(family, "stream", lambda x: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return family._launch_cuda


# (S, T, d_in, d_out, M, L): aligned; ragged rows; ragged everything; one; many tiles of each.
SHAPES = [
    (32, 16, 8, 64, 16, 8),
    (33, 9, 8, 16, 3, 5),
    (17, 9, 5, 13, 3, 7),
    (1, 1, 1, 1, 1, 1),
    (200, 5, 3, 136, 2, 131),
    (5, 131, 3, 8, 2, 3),
    (3, 2, 3, 8, 130, 2),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype):
    s, t, d_in, d_out, m, n = shape
    sizes = ((s, d_in), (m, s, d_out), (t, d_in), (n, t, d_out))
    return [torch.randn(size).to(dtype) for size in sizes]


def formed(a_o, g_o, a_u, g_u):
    """Weight gradients and their products, in the operands' dtype."""
    left = torch.einsum("si,msj->mij", a_o, g_o).flatten(1)
    return left @ torch.einsum("ti,ltj->lij", a_u, g_u).flatten(1).T


@pytest.mark.parametrize("dtype", LOW, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_gram_kernels(shape, dtype, emulated, assert_accurate):
    args = make(shape, dtype)
    out = family._push(emulated, *args, None, None)
    truth = formed(*(x.double() for x in args))
    assert_accurate(out, truth, formed(*args), dtype)
    assert torch.equal(out, family._push(emulated, *args, None, None))


@pytest.mark.parametrize("dtype", LOW, ids=["fp32", "bf16", "fp16"])
def test_gram_kernels_skip_what_is_promised_to_be_zero(dtype, emulated, assert_accurate):
    """NaN beyond the lengths: never multiplied, whole tiles or parts of them; also in chunks."""
    args = make((70, 40, 5, 24, 4, 6), dtype)
    lengths_o, lengths_u = torch.tensor([0, 1, 33, 70]), torch.tensor([0, 3, 40, 17, 8, 33])
    for g, lengths in ((args[1], lengths_o), (args[3], lengths_u)):
        for row, length in zip(g, lengths, strict=True):
            row[length:] = 0
    truth = formed(*(x.double() for x in args))
    plain = formed(*args)
    for g, lengths in ((args[1], lengths_o), (args[3], lengths_u)):
        for row, length in zip(g, lengths, strict=True):
            row[length:] = torch.nan
    out = family._push(emulated, *args, lengths_o, lengths_u)
    assert_accurate(out, truth, plain, dtype)
    out = family._push(emulated, *args, lengths_o, torch.full_like(lengths_u, 0))
    assert not out.any()


@pytest.mark.parametrize("dtype", LOW, ids=["fp32", "bf16", "fp16"])
def test_gram_kernels_in_chunks_of_columns_and_rows(dtype, emulated, monkeypatch, assert_accurate):
    args = make((6, 5, 4, 150, 3, 2), dtype)
    monkeypatch.setattr(family, "_PUSHED", 5 * 64 * 2)  # 64 columns, two cotangents
    out = family._push(emulated, *args, None, None)
    assert_accurate(out, formed(*(x.double() for x in args)), formed(*args), dtype)


def test_gram_kernels_read_operands_off_16_bytes(emulated, assert_accurate):
    args = make((9, 7, 4, 16, 3, 2), torch.bfloat16)
    for i in (1, 3):
        off = torch.empty(args[i].numel() + 1, dtype=torch.bfloat16)[1:].view(args[i].shape)
        args[i] = off.copy_(args[i])
        assert off.data_ptr() % 16
    out = family._push(emulated, *args, None, None)
    assert_accurate(out, formed(*(x.double() for x in args)), formed(*args), torch.bfloat16)


def test_gram_kernels_beyond_2_to_the_31_elements(library, assert_accurate):
    """Operands of 5e9 elements: the last 64 columns are touched, the rest costs no memory."""
    (m, s), d_out = (2, 5), (1 << 29) + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    memory = mmap.mmap(-1, 2 * m * s * d_out, flags=flags)
    g = torch.frombuffer(memory, dtype=torch.bfloat16).view(m, s, d_out)
    columns = g[:, :, -64:].copy_(torch.randn(m, s, 64))
    similarity = torch.zeros(s, 16, dtype=torch.bfloat16)
    similarity[:, :s] = torch.randn(s, s)
    pushed = torch.empty(m, s, 64, dtype=torch.bfloat16)
    partial, out = torch.zeros(2, m, m), torch.empty(m, m)
    tensors = (similarity, g, g, None, None, None, pushed, partial, out)
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    library.last_chunk(ctypes.byref(Gram(*pointers, s, s, d_out, m, m, 16, 64, 2, 1)))
    wide = similarity[:, :s].double(), columns.double()
    truth = torch.einsum("ts,msj,ltj->ml", wide[0], wide[1], wide[1])
    assert_accurate(partial.sum(0), truth, None, torch.bfloat16)


# --------------------------------------------------------------------------- sketch

SKETCH_DRIVER = """
#include "sketch.cu"
extern "C" int sketch(const lddyn::Sketch* p) { return lddyn::sketch_cuda(*p, 0); }
"""
# (T, d_in, d_out, C, size_out, size_in, repeats): aligned, ragged rows, ragged everything; one;
# many tiles of each.
SKETCH_SHAPES = [
    (32, 64, 128, 2, 16, 16, 8),
    (33, 32, 72, 3, 16, 8, 5),
    (17, 9, 13, 3, 5, 3, 14),
    (1, 1, 1, 1, 1, 1, 1),
    (131, 5, 70, 2, 70, 40, 2),
]


class Sketch(ctypes.Structure):
    """The struct of csrc/lddyn.h."""

    _fields_ = (
        *((f"pointer_{i}", ctypes.c_void_p) for i in range(5)),
        *((f"size_{i}", ctypes.c_int64) for i in range(9)),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def sketch_library(made_once):
    return load("sketch", SKETCH_DRIVER, 2, made_once)


@pytest.fixture
def emulated_sketch(sketch_library, monkeypatch):
    """lddyn.ops' own launch of the kernels, on CPU tensors."""
    module = importlib.import_module("lddyn.ops.sketch")
    native = SimpleNamespace(
        Sketch=Sketch, sketch_cuda=lambda p, stream: sketch_library.sketch(ctypes.byref(p))
    )
    monkeypatch.setattr(module, "native", lambda: native)
    monkeypatch.setattr(module, "stream", lambda x: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return module._launch_cuda


def make_sketch(shape, dtype):
    t, d_in, d_out, c, *sizes = shape
    return torch.randn(t, d_in).to(dtype), torch.randn(c, t, d_out).to(dtype), *sizes


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SKETCH_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_sketch_kernels(shape, dtype, emulated_sketch, assert_accurate):
    """Every product with a sign is exact: float32's floor holds for all dtypes."""
    a, g, *sizes = make_sketch(shape, dtype)
    out = emulated_sketch(a, g, *sizes, -77)
    assert_accurate(out, reference.sketch(a.double(), g.double(), *sizes, -77), None, torch.float32)
    assert torch.equal(out, emulated_sketch(a, g, *sizes, -77))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sketch_kernels_in_chunks_and_off_16_bytes(dtype, emulated_sketch, monkeypatch):
    """A cotangent has the same bits in any batch and launch, and wherever it lies."""
    a, g, *sizes = make_sketch((33, 32, 72, 3, 16, 8, 5), dtype)
    whole = emulated_sketch(a, g, *sizes, 3)
    shifted = torch.empty(g.numel() + 1, dtype=dtype)[1:].view(g.shape).copy_(g)
    assert torch.equal(emulated_sketch(a, shifted, *sizes, 3), whole)
    assert torch.equal(emulated_sketch(a, g[1:2], *sizes, 3), whole[1:2])
    monkeypatch.setattr(importlib.import_module("lddyn.ops.sketch"), "_PUSHED", 1)
    assert torch.equal(emulated_sketch(a, g, *sizes, 3), whole)
