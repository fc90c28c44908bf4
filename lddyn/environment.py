"""What an installation of lddyn runs on: versions, devices, backends, known traps, a self-test."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lddyn import ops, reference
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from collections.abc import Callable

    Trap = Callable[[str, object, str, str], None]  # name, got, expected, what to do

_PACKAGES = (
    *("lddyn", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "typer"),
    *("matplotlib", "triton", "peft", "trl", "accelerate", "datasets", "pyarrow"),
    *("scikit-learn", "faiss-cpu", "packaging"),
)
# Oldest and newest that the tests ran under (docs/versions.md).
_TESTED = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.15"),
    "transformers": ("4.57", "5.24"),
    "trl": ("0.24", "1.16"),
    "peft": ("0.18", "0.21"),
}
# Flags of /proc/cpuinfo that decide how fast a product is.
_FLAGS = (
    "fma",
    "f16c",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
)
# Variables whose value is a plain word; any other LDDYN_* may hold a path and is shown as "set".
_WORDS = ("LDDYN_BACKEND", "LDDYN_STRICT", "LDDYN_CUDA", "LDDYN_CUDA_ARCHS", "TRITON_INTERPRET")

# Largest relative error that the self-test accepts against float64, by operand dtype.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def env() -> JsonObject:
    """Versions, devices, compiled parts and backends of this installation, for a bug report.

    Returns:
        A dict that JSON can hold, without paths and user names:

        - `versions`: package → version, or "not installed".
        - `system`, `devices`: processor and GPUs; memory in bytes.
        - `compiled`: compiled part → "built", or the reason why not.
        - `backends`: op → device → backend → the reason why it cannot run; "" means that it can.
        - `others`: backends of other packages → their ops, or the reason why there are none.
        - `precision`: torch's settings that change results.
        - `variables`: environment variables of lddyn that are set.
        - `warnings`: known traps that this installation is in, each with `name`, `got`, `expected`
          and `do`.

    Cost: a tenth of a second; no kernel runs, and only torch is imported.

    Example:
        >>> import lddyn
        >>> lddyn.env()["backends"]["gram"]["cpu"]["reference"]
        ''
    """
    report = {
        "versions": {name: _version(name) for name in _PACKAGES} | _python(),
        "system": _system(),
        "devices": _devices(),
        "compiled": ops.compiled(),
        "backends": ops.backends(),
        "others": ops.others(),
        "precision": {
            "float32_matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "variables": {
            name: value if name in _WORDS else "set"
            for name, value in sorted(os.environ.items())
            if name.startswith("LDDYN_") or name in _WORDS
        },
    }
    return report | {"warnings": _traps(report)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _python() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),  # names the build, which its wheel may not
        "cuda": torch.version.cuda or "none (CPU torch)",
        "python": platform.python_version(),
    }


def _system() -> JsonObject:
    flags: set[str] = set()
    memory: dict[str, int] = {}
    if Path("/proc/meminfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            flags |= set(value.split()) if name.strip() in ("flags", "Features") else set()
        lines = (x.split() for x in Path("/proc/meminfo").read_text().splitlines())
        memory = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    build = torch.__config__.show()
    blas = next((part for part in build.replace("\n", ",").split(",") if "BLAS_INFO" in part), "")
    return {
        "os": platform.system(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "flags": [name for name in _FLAGS if name in flags],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "blas": blas.partition("=")[2] or "unknown",
        "onednn": torch.backends.mkldnn.is_available(),
        "memory": memory.get("MemTotal:", 0),
        "memory_available": memory.get("MemAvailable:", 0),
    }


def _cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[JsonObject]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": device.name,
                "capability": f"sm_{device.major}{device.minor}",
                "multiprocessors": device.multi_processor_count,
                "memory": device.total_memory,
            }
        )
    return devices


def _traps(report: JsonObject) -> list[dict[str, str]]:
    """Known traps that this report shows, each with what to do."""
    traps: list[dict[str, str]] = []

    def trap(name: str, got: object, expected: str, do: str) -> None:
        traps.append({"name": name, "got": str(got), "expected": expected, "do": do})

    _version_traps(report["versions"], trap)
    _unmet(trap)
    _system_traps(report, trap)
    _variable_traps(trap)
    _gpu_traps(report, trap)
    return traps


def _version_traps(versions: dict[str, str], trap: Trap) -> None:
    """Packages that are older or newer than those that were tested."""
    for name, (low, high) in _TESTED.items():
        if versions[name] != "not installed":
            short = ".".join(versions[name].split(".")[:2])
            order = [_number(short) < _number(low), _number(short) > _number(high)]
            if any(order):
                do = "upgrade it" if order[0] else "run lddyn env --selftest; report what differs"
                trap(name, versions[name], f"{low} to {high}, which are tested", do)


def _system_traps(report: JsonObject, trap: Trap) -> None:
    """Processor, memory and precision."""
    system = report["system"]
    if report["compiled"]["cpu"] != "built":
        trap(
            "compiled module",
            report["compiled"]["cpu"],
            "built: plain torch is slow at its work",
            "install a C++ compiler, then reinstall lddyn with pip --no-cache-dir",
        )
    if system["threads"] > system["cores"]:
        trap(
            "threads",
            system["threads"],
            f"at most the {system['cores']} cores of this process",
            f"set OMP_NUM_THREADS={system['cores']}",
        )
    if 0 < system["memory_available"] < 1 << 30:
        trap(
            "memory",
            f"{system['memory_available'] >> 20} MiB available",
            "1 GiB or more",
            'give lddyn less: memory="512MiB"',
        )
    if report["precision"]["float32_matmul"] != "highest":
        trap(
            "float32 products",
            report["precision"]["float32_matmul"],
            "highest: others round to TF32 or bfloat16",
            'torch.set_float32_matmul_precision("highest")',
        )


def _variable_traps(trap: Trap) -> None:
    """Environment variables that are for tests."""
    if backend := os.environ.get("LDDYN_BACKEND"):
        trap(
            "LDDYN_BACKEND",
            backend,
            "unset: the fastest backend that can run each call",
            "unset it, unless you compare backends",
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        trap("TRITON_INTERPRET", "1", "unset: the interpreter is for tests, and slow", "unset it")


def _gpu_traps(report: JsonObject, trap: Trap) -> None:
    """GPUs that are missing, too old, or without kernels."""
    versions, compiled, gpu = report["versions"], report["compiled"], report["devices"]
    if not gpu and torch.version.cuda:
        driver = shutil.which("nvidia-smi") is not None
        trap(
            "GPU",
            f"none, and torch {versions['torch']} built for CUDA {torch.version.cuda}",
            "a GPU, or a torch without CUDA (5 GB smaller)",
            "run nvidia-smi: is the driver as new as that CUDA?"
            if driver
            else "nothing, if this machine has no GPU",
        )
    for device in gpu:
        if int(device["capability"][3:]) < 80:
            trap(
                device["name"],
                device["capability"],
                "sm_80 or newer for lddyn's kernels",
                "nothing: plain torch does their work",
            )
    if gpu and versions["triton"] == "not installed":
        trap("triton", "not installed", "installed, for lddyn's kernels", "pip install triton")
    if gpu and compiled["cpu"] == "built" and "sm_" not in compiled["cuda"]:
        trap(
            "CUDA kernels",
            compiled["cuda"],
            "built for this GPU",
            "put nvcc on PATH, or set CUDA_HOME, and reinstall with LDDYN_CUDA=1",
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _unmet(trap: Trap) -> None:
    """Packages whose requirements the installed versions do not meet, as `pip check` finds them."""
    from packaging.requirements import InvalidRequirement, Requirement

    for package in (*_PACKAGES[1:], "torchvision", "torchaudio"):
        try:
            needs = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needs:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            have = _version(need.name)
            if have != "not installed" and not need.specifier.contains(have, prereleases=True):
                wanted = f"{need.name}{need.specifier}"
                trap(
                    f"{package} {_version(package)}",
                    f"{need.name} {have}",
                    wanted,
                    f"pip install --upgrade {package} '{wanted}'",
                )


def selftest() -> list[JsonObject]:
    """Errors of every op with every backend and dtype that can run here, against float64.

    Returns:
        One dict for each case: `op`, `device`, `backend`, `dtype`, `error` (relative, in the norm),
        `bound` and `ok`. An error of NaN is not ok.

    Cost: a second on CPU; the first call of a Triton kernel compiles it.

    Example:
        >>> import lddyn
        >>> all(row["ok"] for row in lddyn.selftest())
        True
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        _case(op, device, backend, dtype)
        for op in ops.OPS
        for device in devices
        for backend in ops.OPS[op].backends()
        for dtype in _BOUNDS
        if not ops.OPS[op].refusal(backend, torch.device(device), dtype)
    ]


def _case(op: str, device: str, backend: str, dtype: torch.dtype) -> JsonObject:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    args = ops.OPS[op].sample(normal)
    with ops.backend(backend):
        out = getattr(ops, op)(*args)
    double = (
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    )
    truth = getattr(reference, op)(*double)
    pairs = zip(out, truth, strict=True) if isinstance(out, tuple) else [(out, truth)]
    errors = [(x.double() - y).norm() / y.double().norm() for x, y in pairs]
    error = float(torch.stack(errors).max())  # a NaN stays
    bound = _BOUNDS[dtype]
    return {
        "op": op,
        "device": device,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "bound": bound,
        "ok": error <= bound,
    }
