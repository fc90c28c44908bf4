"""`residual` and `residual_gram`: gradients of log-probs by logits, and their inner products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lddyn import reference
from lddyn.ops.dispatch import DTYPES, Normal, Op, check_alike, launched, native, register, stream

_Residual = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_residual_shapes(logits: Tensor, targets: Tensor) -> None:
    check_alike(logits=logits)
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


def _check_finite(name: str, logits: Tensor) -> None:
    """Raise for the first row whose largest logit is not finite; reads all rows."""
    wrong = ~logits.amax(1).isfinite()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        values = logits[row]
        largest = "NaN" if values.isnan().any() else f"a maximum of {float(values.max())}"
        raise ValueError(
            f"{name} must be finite (or -inf for a masked token), got {largest} in row {row}; "
            "look for an overflow in the model (float16 weights, a NaN parameter)"
        )


def _finite(logits: Tensor, out: _Residual) -> _Residual:
    """The results; raises for the first row that is not finite (its ‖π‖² is NaN)."""
    if out[3].isnan().any():
        _check_finite("logits", logits)
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
    launch(native().Residual(*pointers, *logits.shape, logits.stride(0), DTYPES[logits.dtype]))
    return out


def _residual_cpp(logits: Tensor, targets: Tensor) -> _Residual:
    threads = torch.get_num_threads()
    return _finite(
        logits,
        _residual_native(logits, targets, lambda p: native().residual_cpu(p, threads)),
    )


def _residual_cuda(logits: Tensor, targets: Tensor) -> _Residual:
    with torch.cuda.device(logits.device):
        current = stream(logits)
        return _residual_native(
            logits, targets, lambda p: launched(native().residual_cuda(p, current))
        )


def _residual_triton(logits: Tensor, targets: Tensor) -> _Residual:
    from lddyn.kernels.residual import residual as launch

    out: _Residual = launch(logits, targets.contiguous())
    return _finite(logits, out) if logits.device.type == "cpu" else out


def _residual_sample(normal: Normal) -> tuple[Any, ...]:
    logits = normal(3, 1003)
    return logits, torch.tensor([0, 501, 1002], device=logits.device)


_residual = register(
    Op(
        "residual",
        _check_residual,
        _residual_fake,
        {
            "cuda": _residual_cuda,
            "triton": _residual_triton,
            "cpp": _residual_cpp,
            "reference": _residual_reference,
        },
        _residual_sample,
    ),
    "(Tensor logits, Tensor targets) -> (Tensor residual, Tensor logp, Tensor entropy, "
    "Tensor squared_norm, Tensor top)",
)


def residual(logits: Tensor, targets: Tensor) -> _Residual:
    """Softmax residual of every row, its log-prob, entropy, ‖π‖² and two likeliest tokens.

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
            holds NaN or +inf, or only -inf. On a GPU such a row comes back as NaN.
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
    return _residual(logits, targets)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- residual_gram


def _check_residual_gram(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> None:
    _check_residual(logits_o, targets_o)
    _check_residual(logits_u, targets_u)
    _check_residual_gram_shapes(logits_o, targets_o, logits_u, targets_u)


def _check_residual_gram_shapes(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> None:
    check_alike(logits_o=logits_o, logits_u=logits_u)
    _check_residual_shapes(logits_o, targets_o)
    _check_residual_shapes(logits_u, targets_u)
    if logits_u.shape[1] != logits_o.shape[1]:
        raise ValueError(
            f"logits_u must have the {logits_o.shape[1]} columns of logits_o, got "
            f"{tuple(logits_u.shape)}; both sides need the same vocabulary"
        )


def _residual_gram_fake(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> Tensor:
    _check_residual_gram_shapes(logits_o, targets_o, logits_u, targets_u)
    dtype = reference.wide(logits_o.dtype)
    return logits_o.new_empty(len(logits_o), len(logits_u), dtype=dtype)


def _finite_gram(logits_o: Tensor, logits_u: Tensor, out: Tensor) -> Tensor:
    """The products; raises for the first row of logits that is not finite."""
    if out.isnan().any():
        _check_finite("logits_o", logits_o)
        _check_finite("logits_u", logits_u)
    return out


def _residual_gram_reference(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> Tensor:
    out = reference.residual_gram(logits_o, targets_o, logits_u, targets_u)
    return _finite_gram(logits_o, logits_u, out) if out.device.type == "cpu" else out


# Tiles of `residual_gram`: elements of both sides together (1 MiB of float32), fewest columns.
_WORKSPACE = 1 << 18
_MIN_COLUMNS = 128


@dataclass(frozen=True)
class _Side:
    """One side of `residual_gram`: w = exp(z - peak), 0 for the target, unnormalised.

    With others = Σ w and Z = others + exp(z_y - peak): r_y = others / Z, and r_v = -w_v / Z
    elsewhere. The peak leaves the target out, so that nothing is lost when π_y → 1.
    """

    logits: Tensor
    targets: Tensor
    peak: Tensor
    others: Tensor

    def finish(self) -> tuple[Tensor, Tensor]:
        """Per row, 1 / Z and r_y."""
        top = self.logits.gather(1, self.targets[:, None]).squeeze(1).double() - self.peak
        partition = self.others + top.exp()
        scale, own = 1 / partition, self.others / partition
        return scale.to(self.peak.dtype), own.to(self.peak.dtype)

    def probabilities(self, tokens: Tensor, scale: Tensor) -> Tensor:
        """π of some tokens in every row; not of its target."""
        z = self.logits[:, tokens].to(self.peak.dtype)
        return z.sub_(self.peak[:, None]).exp_().mul_(scale[:, None])


def _with_targets(out: Tensor, o: _Side, u: _Side) -> Tensor:
    """Turns Σ_v w_o w_u into ⟨r_o, r_u⟩ in place: normalises, and adds the targets' columns."""
    (scale_o, own_o), (scale_u, own_u) = o.finish(), u.finish()
    out.mul_(scale_o[:, None]).mul_(scale_u)
    crossed = own_o[:, None] * u.probabilities(o.targets, scale_u).T
    crossed.addcmul_(o.probabilities(u.targets, scale_o), own_u)
    same = o.targets[:, None] == u.targets
    out.sub_(torch.where(same, -own_o[:, None] * own_u, crossed))
    return _finite_gram(o.logits, u.logits, out) if out.device.type == "cpu" else out


def _residual_gram_cpp(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> Tensor:
    """C++ fills tiles of columns that stay in cache, BLAS multiplies them."""
    threads = torch.get_num_threads()

    def side(logits: Tensor, targets: Tensor) -> tuple[_Side, Any]:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        peak = logits.new_empty(len(logits), dtype=reference.wide(logits.dtype))
        others = logits.new_zeros(len(logits), dtype=torch.float64)
        operands = _Side(logits, targets.contiguous(), peak, others)
        pointers = [x.data_ptr() for x in (operands.logits, operands.targets, peak, others)]
        sizes = *logits.shape, logits.stride(0), DTYPES[logits.dtype]
        rows = native().ResidualRows(*pointers, *sizes)
        native().residual_gram_peaks_cpu(rows, threads)
        return operands, rows

    (o, rows_o), (u, rows_u) = side(logits_o, targets_o), side(logits_u, targets_u)
    rows, vocabulary = len(logits_o) + len(logits_u), logits_o.shape[1]
    width = min(vocabulary, max(_MIN_COLUMNS, _WORKSPACE // max(1, rows)))
    spaces = o.peak.new_empty(rows, width).split([len(logits_o), len(logits_u)])
    out = o.peak.new_zeros(len(logits_o), len(logits_u))
    for lo in range(0, vocabulary, width):
        hi = min(lo + width, vocabulary)
        for operands, space in zip((rows_o, rows_u), spaces, strict=True):
            tile = native().Tile(space.data_ptr(), width, lo, hi)
            native().residual_gram_fill_cpu(operands, tile, threads)
        out.addmm_(spaces[0][:, : hi - lo], spaces[1][:, : hi - lo].T)
    return _with_targets(out, o, u)


def _residual_gram_triton(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> Tensor:
    from lddyn.kernels.residual import residual_gram as launch

    targets_o, targets_u = targets_o.contiguous(), targets_u.contiguous()
    out, sums_o, sums_u = launch(logits_o, targets_o, logits_u, targets_u)
    return _with_targets(
        out, _Side(logits_o, targets_o, *sums_o), _Side(logits_u, targets_u, *sums_u)
    )


def _residual_gram_sample(normal: Normal) -> tuple[Any, ...]:
    return *_residual_sample(normal), *_residual_sample(normal)


_residual_gram = register(
    Op(
        "residual_gram",
        _check_residual_gram,
        _residual_gram_fake,
        {
            "triton": _residual_gram_triton,
            "cpp": _residual_gram_cpp,
            "reference": _residual_gram_reference,
        },
        _residual_gram_sample,
    ),
    "(Tensor logits_o, Tensor targets_o, Tensor logits_u, Tensor targets_u) -> Tensor",
)


def residual_gram(
    logits_o: Tensor, targets_o: Tensor, logits_u: Tensor, targets_u: Tensor
) -> Tensor:
    """Inner products of softmax residuals, ⟨e_y − π_m, e_y − π_l⟩ for all pairs of rows.

    This is the head's part of the kernel between log-probs, without the factor ⟨h_m, h_l⟩. The
    entries of the targets are complement sums (see `residual`). π is computed a few columns at a
    time.

    Args:
        logits_o: Shape (M, V), V >= 2, float32/bfloat16/float16/float64, any strides.
        targets_o: Realised tokens, shape (M,), int64.
        logits_u: Shape (L, V), same dtype and device.
        targets_u: Realised tokens, shape (L,), int64.

    Returns:
        Shape (M, L), float32 (float64 for float64). Not differentiable.

    Raises:
        ValueError: If shapes disagree, a target is out of range, or, on CPU, a row is not finite.
        TypeError: If a dtype is not supported.

    Cost: 2 M L V flops and (M + L) V exponentials; the lower bound of its time is reading both
    logits once. The workspace is a few MiB for any V.

    Example:
        >>> z, y = torch.zeros(1, 4), torch.tensor([2])
        >>> residual_gram(z, y, z, y)
        tensor([[0.7500]])
    """
    return _residual_gram(logits_o, targets_o, logits_u, targets_u)  # type: ignore[no-any-return]
