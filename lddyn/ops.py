"""Every op's schema, checks, fake and backend choice: the only door to ``_C`` and ``kernels``.

An op is defined in torch.library, runs *check, choose, call* on any device, and is a leaf: it has
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
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lddyn import reference

logger = logging.getLogger("lddyn")

BACKENDS = ("cuda", "triton", "cpp", "reference")
# What is tried without an override, best first; any other device type runs the reference.
_PREFERRED = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}
_override: ContextVar[str | None] = ContextVar("lddyn_backend", default=None)

# --------------------------------------------------------------------------- backends


@functools.cache
def _native() -> Any:
    """The compiled module, or the reason (a string) why there is none."""
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


def why_not(backend: str, device: torch.device) -> str:
    """Why a backend cannot run tensors of a device; empty if it can.

    >>> why_not("reference", torch.device("cpu"))
    ''
    """
    if backend == "reference":
        return ""
    if backend == "triton":
        if not _has_triton():
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type == "cuda" or (device.type == "cpu" and interpreted):
            return ""
        return f"triton needs cuda tensors, got {device.type}"
    native = _native()
    if isinstance(native, str):
        return native
    wanted = "cuda" if backend == "cuda" else "cpu"
    if backend == "cuda" and not native.cuda_archs:
        return "lddyn._C was built without CUDA (no nvcc, or LDDYN_CUDA=0)"
    if device.type != wanted:
        return f"{backend} needs {wanted} tensors, got {device.type}"
    if backend == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(int(arch.rstrip("af")) for arch in native.cuda_archs.split())
        if 10 * major + minor < oldest:
            return f"built for sm_{oldest} and later, this device is sm_{major}{minor}"
    return ""


def choose(device: str, override: str | None, refusals: dict[str, str]) -> str:
    """Backend to use: the override, or the first preferred one that is not refused.

    Args:
        device: Device type of the operands.
        override: A backend that must be used, or None.
        refusals: Per backend, why it cannot run this call; empty if it can.

    Raises:
        ValueError: If the override is not a backend.
        RuntimeError: If the override is refused; nothing falls back.

    >>> choose("cuda", None, {"triton": "not installed", "cuda": "not built", "reference": ""})
    'reference'
    """
    if override is None:
        preferred = _PREFERRED.get(device, ("reference",))
        return next(name for name in preferred if not refusals[name])
    if override not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {override!r}")
    if refusals[override]:
        raise RuntimeError(f"backend {override!r} cannot run this call: {refusals[override]}")
    return override


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend, and raise where that is impossible.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``. The environment variable
            ``LDDYN_BACKEND`` does the same for a whole process; the block wins over it.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: From an op that the backend cannot run. It never falls back.

    Example:
        >>> a, g = torch.ones(2, 3), torch.ones(1, 2, 4)
        >>> with backend("reference"):
        ...     gram(a, g, a, g)
        tensor([[48.]])
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """What can run here: ``{op: {device: {backend: reason}}}``; an empty reason means available.

    Example:
        >>> backends()["gram"]["cpu"]["reference"]
        ''
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return {
        op.name: {
            device.type: {name: op.refusal(name, device) for name in BACKENDS} for device in devices
        }
        for op in OPS.values()
    }


def compiled() -> dict[str, str]:
    """The compiled module: whether it is there, and the GPUs its CUDA kernels were built for."""
    native = _native()
    if isinstance(native, str):
        return {"cpu": native, "cuda": native}
    archs = " ".join(f"sm_{arch}" for arch in native.cuda_archs.split())
    return {"cpu": "built", "cuda": archs or why_not("cuda", torch.device("cuda"))}


# --------------------------------------------------------------------------- registration


@dataclass(frozen=True)
class _Op:
    """One op: its checks and its implementations by backend."""

    name: str
    check: Callable[..., None]
    implementations: dict[str, Callable[..., Any]]

    def refusal(self, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
        """Why a backend cannot run this op; empty if it can."""
        if backend not in self.implementations:
            return f"{self.name} has no {backend} implementation"
        if dtype == torch.float64 and backend in ("cuda", "triton"):
            return f"{backend} kernels take float32, bfloat16 and float16, got {dtype}"
        return why_not(backend, device)

    def run(self, *args: Tensor) -> Any:
        """Check, choose, call."""
        self.check(*args)
        device, dtype = args[0].device, args[0].dtype
        override = _override.get() or os.environ.get("LDDYN_BACKEND") or None
        refusals = {name: self.refusal(name, device, dtype) for name in BACKENDS}
        name = choose(device.type, override, refusals)
        if name == "reference" and device.type != "cpu" and override is None:
            reasons = "; ".join(filter(None, refusals.values()))
            _report_fallback(f"lddyn::{self.name} runs as plain torch on {device.type}: {reasons}")
        with torch.autocast(device.type, enabled=False):
            return self.implementations[name](*args)


@functools.cache
def _report_fallback(message: str) -> None:
    """Plain torch on an accelerator: logged once, an error under LDDYN_STRICT=1."""
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


_library = torch.library.Library("lddyn", "DEF")
OPS: dict[str, _Op] = {}


def _register(op: _Op, schema: str, fake: Callable[..., Any]) -> None:
    """Define one op in torch.library: implementation, fake, and a derivative that raises."""
    _library.define(f"{op.name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lddyn::{op.name}", fake, lib=_library)
    overload = getattr(torch.ops.lddyn, op.name).default

    def leaf(*args: Tensor) -> Any:
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in args)
        transformed = tracked and torch._C._are_functorch_transforms_active()  # torch.func.grad
        if transformed or any(forward_ad.unpack_dual(x).tangent is not None for x in args):
            raise _not_differentiable(overload)
        if tracked:
            return _Leaf.apply(overload, *args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(op.name, leaf, "Autograd")
    OPS[op.name] = op


# --------------------------------------------------------------------------- checks and pointers

# Element types as csrc/lddyn.h numbers them.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _check_alike(**tensors: Tensor) -> None:
    """One supported floating dtype and one device for all."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
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


def _stream(x: Tensor) -> int:
    """The raw CUDA stream that work on x belongs to."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def _launched(status: int) -> None:
    """Raise for the cudaError_t of a launch."""
    if status:
        raise RuntimeError(f"CUDA launch failed: {torch.cuda.CudaError(status)}")


# --------------------------------------------------------------------------- residual

_Residual = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_residual_shapes(logits: Tensor, targets: Tensor) -> None:
    _check_alike(logits=logits)
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
            f"targets must be on the device of logits ({logits.device}), got {targets.device}; "
            "move one of them"
        )


def _check_residual(logits: Tensor, targets: Tensor) -> None:
    _check_residual_shapes(logits, targets)
    wrong = (targets < 0) | (targets >= logits.shape[1])
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {logits.shape[1]}), got {int(targets[row])} in row {row}; "
            "drop masked positions (-100) before the call"
        )


def _finite(logits: Tensor, out: _Residual) -> _Residual:
    """The results, or an error for the first row that has none (its ‖π‖² is NaN)."""
    wrong = out[3].isnan()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        values = logits[row]
        found = "NaN" if values.isnan().any() else f"a maximum of {float(values.max())}"
        raise ValueError(
            f"logits must be finite (or -inf for a masked token), got {found} in row {row}; "
            "look for an overflow in the model (float16 weights, a NaN parameter)"
        )
    return out


def _residual_fake(logits: Tensor, targets: Tensor) -> _Residual:
    _check_residual_shapes(logits, targets)
    (n, vocabulary), dtype = logits.shape, reference.wide(logits.dtype)
    logp, entropy, squared_norm = (logits.new_empty(n, dtype=dtype) for _ in range(3))
    full, top = logits.new_empty(n, vocabulary, dtype=dtype), targets.new_empty(n, 2)
    return full, logp, entropy, squared_norm, top


def _residual_reference(logits: Tensor, targets: Tensor) -> _Residual:
    out = reference.residual(logits, targets)
    return _finite(logits, out) if logits.device.type == "cpu" else out


def _residual_native(logits: Tensor, targets: Tensor, launch: Callable[[Any], Any]) -> _Residual:
    """Allocate, pack the pointers, launch."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets, out = targets.contiguous(), _residual_fake(logits, targets)
    pointers = [x.data_ptr() for x in (logits, targets, *out)]
    launch(_native().Residual(*pointers, *logits.shape, logits.stride(0), _DTYPES[logits.dtype]))
    return out


def _residual_cpp(logits: Tensor, targets: Tensor) -> _Residual:
    threads = torch.get_num_threads()
    return _finite(
        logits,
        _residual_native(logits, targets, lambda p: _native().residual_cpu(p, threads)),
    )


def _residual_cuda(logits: Tensor, targets: Tensor) -> _Residual:
    with torch.cuda.device(logits.device):
        stream = _stream(logits)
        return _residual_native(
            logits, targets, lambda p: _launched(_native().residual_cuda(p, stream))
        )


def _residual_triton(logits: Tensor, targets: Tensor) -> _Residual:
    from lddyn.kernels.residual import residual as launch

    out: _Residual = launch(logits, targets.contiguous())
    return _finite(logits, out) if logits.device.type == "cpu" else out


_register(
    _Op(
        "residual",
        _check_residual,
        {
            "cuda": _residual_cuda,
            "triton": _residual_triton,
            "cpp": _residual_cpp,
            "reference": _residual_reference,
        },
    ),
    "(Tensor logits, Tensor targets) -> (Tensor residual, Tensor logp, Tensor entropy, "
    "Tensor squared_norm, Tensor top)",
    _residual_fake,
)


def residual(logits: Tensor, targets: Tensor) -> _Residual:
    """Softmax residual of every row, with the statistics that come with it.

        residual[n] = e_y - π_n,   π_n = softmax(logits[n]),   y = targets[n]

    The entry of y is the complement sum Σ_{v≠y} π_v, not 1 - π_y: it keeps its digits when π_y → 1,
    and so do logp and entropy. A logit of -inf is a masked token, with π = 0. This is ∂log π(y)/∂z;
    the G of SFT in Ren & Sutherland (ICLR 2025) is its negative.

    Args:
        logits: Shape (N, V), V >= 2, float32/bfloat16/float16/float64, any strides.
        targets: Realised token of each row, shape (N,), int64, in [0, V).

    Returns:
        ``residual`` (N, V); ``logp`` (N,), log π(y) in nats; ``entropy`` (N,), nats;
        ``squared_norm`` (N,), ‖π‖²; all float32, or float64 for float64 logits; and ``top`` (N, 2),
        int64, the most and the second most probable token, ties to the lower id. Not
        differentiable: a backward, or forward mode, raises.

    Raises:
        ValueError: If shapes disagree, a target is out of range (with its row), or, on CPU, a row
            holds NaN, +inf or nothing but -inf. On a GPU such a row comes back as NaN.
        TypeError: If a dtype is not supported.

    Cost: about 8 N V flops; reads the logits twice and writes the residual once (8 to 12 bytes per
    logit); no memory besides the results.

    Example:
        >>> r, logp, entropy, squared_norm, top = residual(torch.zeros(1, 4), torch.tensor([2]))
        >>> r
        tensor([[-0.2500, -0.2500,  0.7500, -0.2500]])
        >>> top
        tensor([[0, 1]])
    """
    return torch.ops.lddyn.residual(logits, targets)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- gram


def _check_gram(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> None:
    _check_alike(activations_o=a_o, grads_o=g_o, activations_u=a_u, grads_u=g_u)
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
                f"got {name} {tuple(x.shape)} and {other_name} {tuple(other.shape)}; "
                "check that both come from the same layer and sequence"
            )


def _gram_fake(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    _check_gram(a_o, g_o, a_u, g_u)
    return g_o.new_empty(g_o.shape[0], g_u.shape[0], dtype=reference.wide(g_o.dtype))


def _gram_triton(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    from lddyn.kernels.gram import gram as launch

    out: Tensor = launch(a_o, g_o, a_u, g_u)
    return out


# Elements of the pushed gradients that one CUDA launch keeps: 512 MiB in bfloat16.
_PUSHED = 1 << 28


def _gram_cuda(a_o: Tensor, g_o: Tensor, a_u: Tensor, g_u: Tensor) -> Tensor:
    out = _gram_fake(a_o, g_o, a_u, g_u)
    (m, s, d_out), (n, t, _) = g_o.shape, g_u.shape
    if 0 in (m, n, s, t, a_o.shape[1], d_out):
        return out.zero_()
    a_o, g_o, a_u, g_u = (x.contiguous() for x in (a_o, g_o, a_u, g_u))
    rows = min(m, 65535, max(1, _PUSHED // (t * d_out)))
    splits = min(512, -(-t * d_out // 1024))  # at least 1024 products a split, in a fixed order
    workspace = g_o.dtype if g_o.dtype == torch.bfloat16 else torch.float32
    similarity = g_o.new_empty(t, s, dtype=workspace)
    pushed = g_o.new_empty(rows, t, d_out, dtype=workspace)
    partial = out.new_empty(splits, rows, n)
    with torch.cuda.device(out.device):
        for lo in range(0, m, rows):
            chunk, chunk_out = g_o[lo : lo + rows], out[lo : lo + rows]
            tensors = (a_o, chunk, a_u, g_u, similarity, pushed, partial, chunk_out)
            sizes = (s, t, a_o.shape[1], d_out, len(chunk), n, splits, _DTYPES[g_o.dtype])
            operands = _native().Gram(*(x.data_ptr() for x in tensors), *sizes)
            _launched(_native().gram_cuda(operands, _stream(out)))
    return out


_register(
    _Op(
        "gram",
        _check_gram,
        {"cuda": _gram_cuda, "triton": _gram_triton, "reference": reference.gram},
    ),
    "(Tensor activations_o, Tensor grads_o, Tensor activations_u, Tensor grads_u) -> Tensor",
    _gram_fake,
)


def gram(activations_o: Tensor, grads_o: Tensor, activations_u: Tensor, grads_u: Tensor) -> Tensor:
    """Token Gram of one linear layer, from its inputs and the gradients at its output.

        G[m, l] = Σ_{s,t} <a_o[s], a_u[t]> <g_o[m,s], g_u[l,t]>

    The inner product of the weight gradients Σ_s g_o[m,s] ⊗ a_o[s] and Σ_t g_u[l,t] ⊗ a_u[t], which
    need not be formed: S = a_o a_uᵀ pushes one side's gradients onto the other's tokens, where they
    are paired. On CPU this is dense products alone, so BLAS does it in plain torch (there is no C++
    for it), in the order that `lddyn.reference.gram_order` finds cheapest.

    Args:
        activations_o: Layer input of the observed sequence, shape (S, d_in),
            float32/bfloat16/float16/float64, any strides.
        grads_o: M cotangents at the layer's output, shape (M, S, d_out), same dtype and device.
        activations_u: Layer input of the updated sequence, shape (T, d_in).
        grads_u: L cotangents, shape (L, T, d_out).

    Returns:
        Shape (M, L), float32, accumulated in float32 (float64 for float64). Zeros if S or T is 0.
        Not differentiable: a backward, or forward mode, raises.

    Raises:
        ValueError: If shapes or devices disagree. The message gives both shapes.
        TypeError: If dtypes differ or are not supported.

    Cost: the least of 2STd_in + 2 M T d_out (S + L), the same with the sides exchanged, and
    2 d_in d_out (MS + LT + ML) flops; 32 MiB of workspace, and a float32 copy of low-precision
    grads on CPU.

    Example:
        >>> a, g = torch.eye(2), torch.ones(3, 2, 4)
        >>> gram(a, g, a, g)
        tensor([[8., 8., 8.],
                [8., 8., 8.],
                [8., 8., 8.]])
    """
    return torch.ops.lddyn.gram(  # type: ignore[no-any-return]
        activations_o, grads_o, activations_u, grads_u
    )
