"""What lddyn runs on: versions, devices, backends with reasons against them, a self-test."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from lddyn import ops, reference

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = (
    *("lddyn", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
    *("triton", "peft", "trl", "accelerate", "datasets"),
)
# Variables whose value is a plain word; any other LDDYN_* may hold a path and is shown as "set".
_WORDS = ("LDDYN_BACKEND", "LDDYN_STRICT", "LDDYN_CUDA", "LDDYN_CUDA_ARCHS", "TRITON_INTERPRET")

# Largest relative error that the self-test accepts against float64, by operand dtype.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def env() -> dict[str, Any]:
    """Versions, devices, compiled parts and backends of this installation, ready for a bug report.

    Returns:
        A dict that JSON can hold: ``versions``, ``system``, ``devices`` (memory in bytes),
        ``compiled``, ``backends`` (per op, device and backend the reason against it; empty means
        available), ``others`` (backends of other packages: their ops, or why not), ``precision``
        and ``variables`` (those in effect). No path and no user name.

    Cost: no kernel runs; importing nothing but torch.

    Example:
        >>> import lddyn
        >>> lddyn.env()["backends"]["gram"]["cpu"]["reference"]
        ''
    """
    return {
        "versions": {name: _version(name) for name in _PACKAGES} | _python(),
        "system": {
            "os": platform.system(),
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _python() -> dict[str, str]:
    return {"python": platform.python_version(), "cuda": torch.version.cuda or "none (CPU torch)"}


def _devices() -> list[dict[str, Any]]:
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


def selftest() -> list[dict[str, Any]]:
    """Every op, backend and dtype that can run here, against float64 on odd shapes.

    Returns:
        One row per case: ``op``, ``device``, ``backend``, ``dtype``, ``error`` (relative, in the
        norm), ``bound`` and ``ok``. An error of NaN is not ok.

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


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _case(op: str, device: str, backend: str, dtype: torch.dtype) -> dict[str, Any]:
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


def print_env(console: Console | None = None) -> None:
    """Print `env` as tables.

    Args:
        console: Where to print. Default: standard output.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    found = env()
    for title in ("versions", "system", "compiled", "others", "precision", "variables"):
        table = Table("", "", title=title, show_header=False, title_justify="left")
        for name, value in found[title].items():
            table.add_row(name, str(value))
        console.print(table if found[title] else f"{title}: none")
    for device in found["devices"]:
        gib = device["memory"] / 2**30
        console.print(f"{device['name']}, {device['capability']}, {gib:.0f} GiB", markup=False)
    if not found["devices"]:
        console.print("devices: no GPU, cpu only")
    table = Table("op", "device", "backend", "", title="backends", title_justify="left")
    for op, devices in found["backends"].items():
        for name, reasons in devices.items():
            for backend, reason in reasons.items():
                table.add_row(op, name, backend, reason or "[green]available[/green]")
    console.print(table)


def print_selftest(console: Console | None = None) -> bool:
    """Run `selftest`, print its rows, and say whether all passed.

    Args:
        console: Where to print. Default: standard output.

    Returns:
        True if every case is within its bound.
    """
    from rich.console import Console
    from rich.table import Table

    rows = selftest()
    table = Table("op", "device", "backend", "dtype", "error", "bound", "", title="self-test")
    for row in rows:
        verdict = "[green]ok[/green]" if row["ok"] else "[red]FAILED[/red]"
        numbers = f"{row['error']:.1e}", f"{row['bound']:.0e}"
        table.add_row(row["op"], row["device"], row["backend"], row["dtype"], *numbers, verdict)
    (console or Console()).print(table)
    return all(row["ok"] for row in rows)


if __name__ == "__main__":
    print_env()
    raise SystemExit(not print_selftest())
