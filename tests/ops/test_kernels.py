"""Every kernel compiles, without a GPU, for the chips we name; and fits their registers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("80", "90", "100")
# Seconds for one capability or one CUDA file on a machine with much other work.
PATIENCE = 1800
# Shared memory a block may ask for, bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
ELEMENTS = ("fp32", "bf16", "fp16")
KERNELS = [f"residual-{element}" for element in ELEMENTS] + [
    f"gram-{product}-{element}{rows}"
    for product in ("push", "pair")
    for element in ELEMENTS
    for rows in ("", "-ragged")
]
KERNELS += [
    f"{kernel}-{element}{tokens}"
    for kernel, sizes in (
        ("preconditioned_push", ("-64", "-1000")),
        ("sketch-project", ("",)),
        ("sketch-pair", ("",)),
    )
    for element in ELEMENTS
    for tokens in sizes
]
KERNELS += [
    f"{kernel}-{element}{columns}"
    for kernel, sizes in (
        ("residual_gram", ("",)),
        ("residual_gram-statistics", ("",)),
        ("gated_pullback", ("",)),
        ("gated_pushforward", ("",)),
        ("norm_pullback", ("-896", "-4096", "-8192")),
        ("norm_pushforward", ("-896", "-4096", "-8192")),
        ("rotary", ("",)),
    )
    for element in ELEMENTS
    for columns in sizes
]
KERNELS += [
    f"attention-{kernel}-{variant}"
    for kernel in ("forward", "pullback_query", "pullback_key", "pushforward")
    for variant in ("bf16-64", "bf16-128", "fp16-128", "fp32-64")
]


@pytest.fixture(scope="session")
def compiled(made_once):
    """Function capability -> {kernel: row of compile_kernels.py}, run without the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels were not compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")

    def get(capability):
        def make(folder):
            with (folder / "rows.jsonl").open("w") as out:
                done = subprocess.run(
                    [sys.executable, script, str(capability)],
                    env=environment,
                    stdout=out,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            assert done.returncode == 0, done.stderr

        lines = (made_once(f"triton-{capability}", make) / "rows.jsonl").read_text().splitlines()
        return {row["kernel"]: row for row in map(json.loads, lines)}

    return get


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("capability", SHARED_LIMIT, ids="sm{}".format)
@pytest.mark.parametrize("kernel", KERNELS)
def test_triton_kernel_compiles_without_spills(kernel, capability, compiled):
    row = compiled(capability)[kernel]
    assert row["STACK"] == 0 and row["LOCAL"] == 0
    assert row["shared"] + row["SHARED"] <= SHARED_LIMIT[capability]
    if kernel in {f"residual_gram-{element}" for element in ELEMENTS}:
        assert row["mma"] == "mma.sync"  # three TF32 products, from registers
    dots = not kernel.startswith(("residual", "gated", "norm", "rotary"))
    if dots and "fp32" not in kernel:
        assert row["mma"] == TENSOR_CORES[capability]


def nvcc():
    """On PATH, or where NVIDIA's packages put it."""
    places = os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    return found or pytest.skip("NO nvcc: the CUDA C++ kernels were not compiled")


def cuobjdump():
    triton = pytest.importorskip("triton", reason="no cuobjdump: it comes with triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm{}".format)
@pytest.mark.parametrize("source", ["residual", "gram", "sketch"])
def test_cuda_kernel_compiles_without_spills(source, capability, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    command = [nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{capability}", "-o", cubin]
    done = subprocess.run(
        [*command, ROOT / "csrc" / f"{source}.cu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    usage, sass = (
        subprocess.run(
            [cuobjdump(), option, cubin], check=True, capture_output=True, text=True
        ).stdout
        for option in ("-res-usage", "-sass")
    )
    assert set(re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)) == {"0"}
    assert max(map(int, re.findall(r"SHARED:(\d+)", usage))) <= 48 << 10  # static shared memory
    if source != "residual":
        assert "HMMA" in sass  # tensor cores
        assert "BF16" in sass and "TF32" in sass


def test_one_op_has_one_name_in_every_layer():
    """A family of ops has one file name in every layer; each op is named there."""
    import torch

    from lddyn import ops, reference

    for name, op in ops.OPS.items():
        assert callable(getattr(reference, name)) and callable(getattr(ops, name))
        assert hasattr(torch.ops.lddyn, name)
        family = op.check.__module__.removeprefix("lddyn.ops.")
        for backend, path in (
            ("triton", f"kernels/{family}.py"),
            ("cpp", f"csrc/{family}.cpp"),
            ("cuda", f"csrc/{family}.cu"),
        ):
            if backend in op.implementations:
                assert f"{name}" in (ROOT / path).read_text(), f"{path} has no {name}"
