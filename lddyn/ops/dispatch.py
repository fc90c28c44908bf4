"""How an op is registered, checked and run on a backend; the only user of ``_C`` and ``kernels``.

An op is defined in torch.library. A call checks its operands, chooses a backend and runs it, on any
device. An op has no derivative: a backward pass through it raises an error. So does forward mode
(`torch.func.jvp`), where torch would otherwise return a tangent of zero.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lddyn import reference

logger = logging.getLogger("lddyn")

BACKENDS = ("blas", "cuda", "triton", "cpp", "reference")
# Backends in the order in which they are tried, by type of device; other types run the reference.
_PREFERRED = {
    "cpu": ("blas", "cpp", "reference"),
    "cuda": ("blas", "triton", "cuda", "reference"),
}
GROUP = "lddyn.backends"  # of entry points: backend name = module with functions named as the ops
_override: ContextVar[str | None] = ContextVar("lddyn_backend", default=None)

# --------------------------------------------------------------------------- backends


@functools.cache
def native() -> Any:
    """The compiled module lddyn._C, or the reason (a string) why it cannot be imported."""
    try:
        return importlib.import_module("lddyn._C")
    except ImportError as error:
        return f"lddyn._C cannot be imported ({type(error).__name__}); reinstall with a compiler"


@functools.cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # hidden, or blocked by sys.modules["triton"] = None
        return False


@functools.cache
def foreign() -> dict[str, Any]:
    """Backends of other packages: name -> module, or the reason (a string) why it is not usable."""
    modules: dict[str, Any] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        source = f"{entry.value} of {entry.dist.name if entry.dist else 'a package'}"
        if entry.name in BACKENDS:
            modules[source] = f"a backend must not be called {entry.name}, as one of lddyn's own is"
        elif entry.name in modules:
            modules[source] = f"another package has a backend called {entry.name}"
        else:
            try:
                modules[entry.name] = entry.load()
            except Exception as error:  # whatever a package does while it is imported
                # Its text may hold a path, and `lddyn.env` is for bug reports.
                kind = type(error).__name__
                modules[entry.name] = f"{source} cannot be loaded ({kind}; import it to see why)"
    return modules


def known(name: str) -> bool:
    """True if a backend has this name; other packages are read only if lddyn has none.

    Raises:
        RuntimeError: If another package has a backend of this name that cannot be loaded.
    """
    if name in BACKENDS:
        return True
    if isinstance(foreign().get(name), str):
        raise RuntimeError(f"backend {name!r} cannot run: {foreign()[name]}")
    return name in foreign()


def why_not(backend: str, device: torch.device) -> str:
    """Reason why a backend cannot run tensors of a device; empty if it can.

    >>> why_not("reference", torch.device("cpu"))
    ''
    """
    if backend in ("reference", "blas"):  # torch's own products, on any device
        return ""
    if backend == "triton":
        if not _has_triton():
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type == "cuda" or (device.type == "cpu" and interpreted):
            return ""
        return f"triton needs cuda tensors, got {device.type}"
    module = native()
    if isinstance(module, str):
        return module
    wanted = "cuda" if backend == "cuda" else "cpu"
    if backend == "cuda" and not module.cuda_archs:
        return "lddyn._C was built without CUDA (no nvcc, or LDDYN_CUDA=0)"
    if device.type != wanted:
        return f"{backend} needs {wanted} tensors, got {device.type}"
    if backend == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(int(arch.rstrip("af")) for arch in module.cuda_archs.split())
        if 10 * major + minor < oldest:
            return f"built for sm_{oldest} and later, this device is sm_{major}{minor}"
    return ""


def choose(device: str, override: str | None, refusals: dict[str, str]) -> str:
    """Name of the backend for a call: the override, or the first preferred one that can run it.

    Args:
        device: Device type of the operands.
        override: Backend that is required, or None.
        refusals: Backend -> reason why it cannot run this call; empty if it can.

    Raises:
        ValueError: If the override is not a backend.
        RuntimeError: If the required backend cannot run this call; no other one is tried.

    >>> refusals = {"blas": "none", "triton": "not installed", "cuda": "", "reference": ""}
    >>> choose("cuda", None, refusals)
    'cuda'
    """
    if override is None:
        preferred = _PREFERRED.get(device, ("reference",))
        return next(name for name in preferred if not refusals[name])
    if override not in refusals:
        raise ValueError(f"backend must be one of {', '.join(refusals)}; got {override!r}")
    if refusals[override]:
        raise RuntimeError(f"backend {override!r} cannot run this call: {refusals[override]}")
    return override


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager: every op inside the block runs on one backend, or raises.

    The environment variable ``LDDYN_BACKEND`` does the same for a whole process; a block goes
    before it.

    Args:
        name: ``"blas"``, ``"cuda"``, ``"triton"``, ``"cpp"``, ``"reference"``, or the name of a
            backend of another package (entry points ``lddyn.backends``). An op that the other
            package does not have runs as it would without the block.

    Raises:
        ValueError: If no backend has this name.
        RuntimeError: If the backend cannot be loaded; and, from an op, if the backend cannot run
            it. No other backend is tried.

    Example:
        >>> from lddyn.ops import gram
        >>> a, g = torch.ones(2, 3), torch.ones(1, 2, 4)
        >>> with backend("reference"):
        ...     gram(a, g, a, g)
        tensor([[48.]])
    """
    if not known(name):
        names = ", ".join([*BACKENDS, *(n for n, m in foreign().items() if not isinstance(m, str))])
        raise ValueError(f"backend must be one of {names}; got {name!r}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def overridden() -> str | None:
    """Name of the backend that a block or the environment requires, or None."""
    return _override.get() or os.environ.get("LDDYN_BACKEND") or None


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """Which backend can run each op here: ``{op: {device: {backend: reason}}}``.

    The reason says why a backend cannot run the op; it is empty if the backend can.

    Example:
        >>> backends()["gram"]["cpu"]["reference"]
        ''
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return {
        op.name: {
            device.type: {name: op.refusal(name, device) for name in op.backends()}
            for device in devices
        }
        for op in OPS.values()
    }


def others() -> dict[str, str]:
    """Backends of other packages: name -> the ops that it has, or why it cannot be used."""
    return {
        name: module if isinstance(module, str) else ", ".join(n for n in OPS if hasattr(module, n))
        for name, module in foreign().items()
    }


def compiled() -> dict[str, str]:
    """State of lddyn._C: ``"cpu"`` -> built or why not, ``"cuda"`` -> GPUs it was built for."""
    module = native()
    if isinstance(module, str):
        return {"cpu": module, "cuda": module}
    archs = " ".join(f"sm_{arch}" for arch in module.cuda_archs.split())
    return {"cpu": "built", "cuda": archs or why_not("cuda", torch.device("cuda"))}


# --------------------------------------------------------------------------- registration


Normal = Callable[..., Tensor]  # shape -> a normal tensor of the dtype and device under test


@dataclass(frozen=True)
class Op:
    """One op: its checks, its implementations by backend, and operands to try them on."""

    name: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    implementations: dict[str, Callable[..., Any]]
    sample: Callable[[Normal], tuple[Any, ...]]  # odd-shaped operands, for the self-test
    leading: int = 0  # the operand whose device and dtype choose the backend

    def backends(self) -> list[str]:
        """Names of lddyn's backends, and of those of other packages that have this op."""
        return [
            *BACKENDS,
            *(name for name, module in foreign().items() if hasattr(module, self.name)),
        ]

    def implementation(self, backend: str) -> Callable[..., Any] | None:
        """Function that a backend runs for this op; None if it has none."""
        if backend in BACKENDS:
            return self.implementations.get(backend)
        function: Callable[..., Any] | None = getattr(foreign().get(backend), self.name, None)
        return function

    def refusal(self, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
        """Reason why a backend cannot run this op; empty if it can."""
        if self.implementation(backend) is None:
            return f"{self.name} has no {backend} implementation"
        if backend not in BACKENDS:
            judge = getattr(foreign()[backend], "why_not", None)
            return "" if judge is None else str(judge(self.name, device, dtype))
        if dtype == torch.float64 and backend in ("cuda", "triton"):
            return f"{backend} kernels take float32, bfloat16 and float16, got {dtype}"
        return why_not(backend, device)

    def run(self, *args: Any) -> Any:
        """Result of the op: check the operands, choose a backend, call it."""
        self.check(*args)
        operand: Tensor = args[self.leading]
        device, dtype = operand.device, operand.dtype
        name = self._choose(device, dtype)
        run = self.implementation(name)
        assert run is not None
        if not torch.is_autocast_enabled(device.type):
            return run(*args)
        with torch.autocast(device.type, enabled=False):
            return run(*args)

    def _choose(self, device: torch.device, dtype: torch.dtype) -> str:
        """Name of the backend for operands of a device and dtype."""
        override = overridden()
        if override is None:  # the usual call: the first backend that can run it, and no list
            for name in _PREFERRED.get(device.type, ()):
                if name != "reference" and not self.refusal(name, device, dtype):
                    return name
        names = [*BACKENDS]
        if override is not None and override not in BACKENDS and known(override):
            if self.implementation(override) is None:
                override = None  # not an op of that package
            else:
                names.append(override)
        refusals = {name: self.refusal(name, device, dtype) for name in names}
        name = choose(device.type, override, refusals)
        if name == "reference" and device.type != "cpu" and override is None:
            reasons = "; ".join(filter(None, refusals.values()))
            _report_fallback(f"lddyn::{self.name} runs as plain torch on {device.type}: {reasons}")
        return name


@functools.cache
def _report_fallback(message: str) -> None:
    """Log once that an op runs as plain torch on a GPU; raise under LDDYN_STRICT=1."""
    if os.environ.get("LDDYN_STRICT") == "1":
        raise RuntimeError(f"{message} (LDDYN_STRICT=1 makes this an error)")
    logger.info(message)


def differentiated(*tensors: Tensor) -> bool:
    """True if reverse or forward mode may differentiate with respect to one of the tensors."""
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return tracked or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


class _Leaf(torch.autograd.Function):
    """Runs an op below autograd; its backward raises."""

    @staticmethod
    def forward(op: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _not_differentiable(ctx.op)


def _not_differentiable(op: Any) -> RuntimeError:
    name = op.name().split(".")[0]
    return RuntimeError(
        f"{name} is not differentiable: detach its inputs, or call the plain-torch "
        f"lddyn.reference.{name.split('::')[1]}"
    )


def specification(name: str) -> Callable[..., Any]:
    """A function that calls `lddyn.reference.NAME`, looked up at the time of the call.

    `import lddyn.reference` imports torch, torch's import imports this package, and at that moment
    lddyn.reference has no names yet.
    """
    return lambda *args: getattr(reference, name)(*args)


_library = torch.library.Library("lddyn", "DEF")
OPS: dict[str, Op] = {}


def register(op: Op, schema: str) -> Any:
    """Overload ``torch.ops.lddyn.NAME.default`` of an op that this function defines.

    It gets an implementation, a fake, and a derivative that raises.
    """
    _library.define(f"{op.name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lddyn::{op.name}", op.fake, lib=_library)
    overload = getattr(torch.ops.lddyn, op.name).default

    def leaf(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        transformed = tracked and torch._C._are_functorch_transforms_active()  # torch.func.grad
        if transformed or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise _not_differentiable(overload)
        if tracked:
            return _Leaf.apply(overload, *args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(op.name, leaf, "Autograd")
    OPS[op.name] = op
    return overload


# --------------------------------------------------------------------------- checks and pointers

# Element types as csrc/lddyn.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def check_alike(**tensors: Tensor) -> None:
    """Raise unless all tensors have one supported floating dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it"
            )
        if x.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name} ({first.dtype}), got {x.dtype}; "
                "cast one of them"
            )
        if x.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name} ({first.device}), got {x.device}; "
                "move one of them"
            )


def stream(x: Tensor) -> int:
    """Address of the CUDA stream on which work on x is queued."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def launched(status: int) -> None:
    """Raise for the cudaError_t of a launch."""
    if status:
        raise RuntimeError(f"CUDA launch failed: {torch.cuda.CudaError(status)}")
