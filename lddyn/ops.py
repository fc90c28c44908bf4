"""Every op's schema, checks, fake and backend choice: the only door to ``_C`` and ``kernels``.

An op is `define`d in torch.library, runs *check, choose, call* on any device, and is a leaf: it has
no derivative. A backward through it raises, and so does forward mode (`torch.func.jvp`), because an
op without a rule would otherwise return a zero tangent in silence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lddyn import reference

logger = logging.getLogger("lddyn")

BACKENDS = ("cuda", "triton", "cpp", "reference")
_override: ContextVar[str | None] = ContextVar("lddyn_backend", default=None)

# --------------------------------------------------------------------------- backends


@functools.cache
def _native() -> ModuleType | str:
    """The compiled module, or why it is missing."""
    try:
        return importlib.import_module("lddyn._C")
    except ImportError as error:
        return f"lddyn._C is not built ({type(error).__name__}); reinstall with a C++ compiler"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, device: str) -> str:
    """Why a backend cannot run tensors of a device type; empty if it can.

    >>> why_not("reference", "cpu")
    ''
    """
    if backend == "reference":
        return ""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device == "cuda" or (device == "cpu" and _interpreted()):
            return ""
        return f"triton needs CUDA tensors, got {device} (or TRITON_INTERPRET=1 for a slow check)"
    native = _native()
    if isinstance(native, str):
        return native
    if backend == "cuda" and not native.cuda_archs:
        return "lddyn._C was built without CUDA (nvcc was not found, or LDDYN_CUDA=0)"
    wanted = "cuda" if backend == "cuda" else "cpu"
    return "" if device == wanted else f"{backend} needs {wanted} tensors, got {device}"


def choose(
    implemented: tuple[str, ...], device: str, override: str | None, refusals: dict[str, str]
) -> str:
    """Backend to use: the override, or the first implemented one that is not refused.

    >>> choose(("triton", "reference"), "cpu", None, {"triton": "no GPU"})
    'reference'
    """
    if override is not None:
        if override not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {override!r}")
        reason = refusals.get(override, "")
        if override not in implemented:
            reason = f"this op has {', '.join(implemented)} only"
        if reason:
            raise RuntimeError(f"backend {override!r} cannot run {device} tensors: {reason}")
        return override
    return next(name for name in implemented if not refusals.get(name))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend; raise where that is impossible.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``. The environment variable
            ``LDDYN_BACKEND`` does the same for a whole process; this block wins over it.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: From the op, if the backend cannot run it. It never falls back.

    Example:
        >>> with backend("reference"):
        ...     gram(torch.ones(2, 3), torch.ones(1, 2, 4), torch.ones(2, 3), torch.ones(1, 2, 4))
        tensor([[48.]])
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


# --------------------------------------------------------------------------- registration


@dataclass(frozen=True)
class _Op:
    """One op: its checks and its implementations, best first on every device."""

    name: str
    check: Callable[..., None]
    implementations: dict[str, Callable[..., Any]]

    def run(self, *args: Tensor) -> Any:
        """Check, choose, call."""
        self.check(*args)
        device = args[0].device.type
        implemented = tuple(self.implementations)
        refusals = {name: why_not(name, device) for name in implemented}
        override = _override.get() or os.environ.get("LDDYN_BACKEND") or None
        name = choose(implemented, device, override, refusals)
        if name == "reference" and device == "cuda" and override is None:
            _fell_back(self.name, "; ".join(filter(None, refusals.values())))
        with torch.autocast(device, enabled=False):
            return self.implementations[name](*args)


def _fell_back(name: str, reasons: str) -> None:
    """The plain-torch path on a GPU: an error under LDDYN_STRICT=1, else logged."""
    message = f"lddyn::{name} runs as plain torch on cuda: {reasons}"
    if os.environ.get("LDDYN_STRICT") == "1":
        raise RuntimeError(f"{message} (LDDYN_STRICT=1 makes this an error)")
    logger.info(message)


class _Leaf(torch.autograd.Function):
    """Runs an op below autograd; its backward raises."""

    @staticmethod
    def forward(op: Any, *args: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].name()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_not_differentiable(ctx.name))


def _not_differentiable(name: str) -> str:
    return f"{name} is not differentiable: detach its inputs, or use lddyn.reference instead"


_library = torch.library.Library("lddyn", "DEF")
OPS: dict[str, _Op] = {}


def _register(op: _Op, schema: str, fake: Callable[..., Any]) -> None:
    """Define one op in torch.library: implementation, fake, and the derivative that raises."""
    _library.define(f"{op.name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lddyn::{op.name}", fake, lib=_library)
    overload = getattr(torch.ops.lddyn, op.name).default

    def leaf(*args: Tensor) -> Any:
        if any(forward_ad.unpack_dual(x).tangent is not None for x in args):
            raise RuntimeError(_not_differentiable(f"lddyn::{op.name}"))
        if torch.is_grad_enabled() and any(x.requires_grad for x in args):
            return _Leaf.apply(overload, *args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(op.name, leaf, "Autograd")
    OPS[op.name] = op


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """What can run here: ``{op: {device: {backend: reason}}}``, an empty reason meaning *available*.

    Example:
        >>> backends()["gram"]["cpu"]["reference"]
        ''
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        op.name: {
            device: {
                name: why_not(name, device) if name in op.implementations else "not implemented"
                for name in BACKENDS
            }
            for device in devices
        }
        for op in OPS.values()
    }


# --------------------------------------------------------------------------- residual

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_floats(**tensors: Tensor) -> None:
    """One supported floating dtype and one device for all."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.dtype not in _FLOATS:
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


def _check_residual_shapes(logits: Tensor, targets: Tensor) -> None:
    _check_floats(logits=logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (N, V) with V >= 2, got {tuple(logits.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}; use targets.long()")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets must be ({logits.shape[0]},), one per row of logits, "
            f"got {tuple(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(
            f"targets must be on the device of logits ({logits.device}), got {targets.device}"
        )


def _check_residual(logits: Tensor, targets: Tensor) -> None:
    _check_residual_shapes(logits, targets)
    vocabulary = logits.shape[1]
    wrong = (targets < 0) | (targets >= vocabulary)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {vocabulary}), got {int(targets[row])} at row {row}; "
            "drop masked positions (-100) before the call"
        )


def check_logits(logits: Tensor, squared_norm: Tensor) -> None:
    """Raise for the first row whose statistics are NaN: a NaN, a +inf, or nothing but -inf."""
    wrong = squared_norm.isnan()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        values = logits[row]
        found = "NaN" if values.isnan().any() else f"{float(values.max())} as its largest value"
        raise ValueError(
            f"logits must be finite (or -inf for a masked token), got {found} in row {row}; "
            "find where the model overflows (float16?) before decomposing it"
        )


def _residual_reference(logits: Tensor, targets: Tensor) -> Any:
    out = reference.residual(logits, targets)
    if logits.device.type == "cpu":
        check_logits(logits, out[3])
    return out


def _residual_fake(logits: Tensor, targets: Tensor) -> Any:
    _check_residual_shapes(logits, targets)
    dtype = reference.wide(logits.dtype)
    rows = [torch.empty_like(targets, dtype=dtype) for _ in range(3)]
    full = logits.new_empty(logits.shape, dtype=dtype)
    return full, *rows, targets.new_empty(logits.shape[0], 2)


_register(
    _Op("residual", _check_residual, {"reference": _residual_reference}),
    "(Tensor logits, Tensor targets) -> (Tensor residual, Tensor logp, Tensor entropy, "
    "Tensor squared_norm, Tensor top)",
    _residual_fake,
)


def residual(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax residual e_y - π of every row, with its statistics, in one pass over V."""
    return torch.ops.lddyn.residual(logits, targets)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- gram


def _check_gram(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> None:
    _check_floats(activations_o=a_o, grads_o=g_o, activations_u=a_u, grads_u=g_u)
    for name, x, shape in (
        ("activations_o", a_o, "(S, d_in)"),
        ("grads_o", g_o, "(M, S, d_out)"),
        ("activations_u", a_u, "(T, d_in)"),
        ("grads_u", g_u, "(L, T, d_out)"),
    ):
        if x.ndim != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    for name, x, axis, other_name, other, other_axis in (
        ("grads_o", g_o, 1, "activations_o", a_o, 0),
        ("grads_u", g_u, 1, "activations_u", a_u, 0),
        ("activations_u", a_u, 1, "activations_o", a_o, 1),
        ("grads_u", g_u, 2, "grads_o", g_o, 2),
    ):
        if x.shape[axis] != other.shape[other_axis]:
            raise ValueError(
                f"{name}.shape[{axis}] must equal {other_name}.shape[{other_axis}], "
                f"got {name} {tuple(x.shape)} and {other_name} {tuple(other.shape)}"
            )


def _gram_fake(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    _check_gram(a_o, g_o, a_u, g_u)
    return g_o.new_empty(g_o.shape[0], g_u.shape[0], dtype=reference.wide(g_o.dtype))


_register(
    _Op("gram", _check_gram, {"reference": reference.gram}),
    "(Tensor activations_o, Tensor grads_o, Tensor activations_u, Tensor grads_u) -> Tensor",
    _gram_fake,
)


def gram(activations_o: Tensor, grads_o: Tensor, activations_u: Tensor, grads_u: Tensor) -> Tensor:
    """Token Gram of one linear layer, from its inputs and its output gradients."""
    return torch.ops.lddyn.gram(  # type: ignore[no-any-return]
        activations_o, grads_o, activations_u, grads_u
    )
