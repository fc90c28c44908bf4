"""Real optimizer steps on a copy of the model, compared with the prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.errors import UnsupportedModelError
from lddyn.optimizers import (
    Direction,
)
from lddyn.report.data import CheckData

ORDERS = {"start": 2, "midpoint": 3, "simpson": 5}  # of the error, in the learning rate


@dataclass
class Verification:
    """Predictions against real optimizer steps on a copy.

    errors[i] is ‖measured − predicted‖ over all observed tokens at learning rate lrs[i], in nats;
    slope is its log-log slope, to be compared with `expected`. answer_error is
    ‖measured − delta_logp‖ for the numbers of the decomposition itself, at its own learning rate
    (None when that is not among lrs).
    """

    lrs: list[float]
    measured: Tensor
    predicted: Tensor
    errors: list[float]
    slope: float
    expected: int
    dtype: str
    answer_error: float | None = None

    @property
    def relative_error(self) -> float:
        """‖measured − predicted‖ / ‖measured‖ at the first learning rate."""
        return self.errors[0] / max(float(self.measured[0].norm()), 1e-300)

    def to_dict(self) -> CheckData:
        """All numbers, JSON-safe; a slope that is not known is None."""
        return {
            "lrs": list(self.lrs),
            "errors": list(self.errors),
            "relative_error": self.relative_error,
            "slope": self.slope if math.isfinite(self.slope) else None,
            "expected": self.expected,
            "dtype": self.dtype,
            "measured": self.measured.tolist(),
            "predicted": self.predicted.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verification:
        """Makes a verification again of what `to_dict` returned."""
        slope = values["slope"]
        return cls(
            lrs=list(values["lrs"]),
            measured=torch.tensor(values["measured"], dtype=torch.float64),
            predicted=torch.tensor(values["predicted"], dtype=torch.float64),
            errors=list(values["errors"]),
            slope=math.nan if slope is None else float(slope),
            expected=int(values["expected"]),
            dtype=str(values["dtype"]),
        )

    def __str__(self) -> str:
        lines = [
            f"lr {lr:.3g}: measured {float(m.sum()):+.6g} nats, predicted {float(p.sum()):+.6g}, "
            f"‖error‖ {e:.3g}"
            for lr, m, p, e in zip(
                self.lrs, self.measured, self.predicted, self.errors, strict=True
            )
        ]
        if self.answer_error is not None:
            lines.append(f"the decomposition's own numbers: ‖error‖ {self.answer_error:.3g}")
        lines.append(f"slope {self.slope:.3f} (expected {self.expected}), {self.dtype}")
        if abs(self.slope - self.expected) > 0.5:
            lines.append(
                "the slope is not the expected one: the steps are too large for one power to "
                "dominate (try smaller lrs), or at the level of rounding"
            )
        return "\n".join(lines)


def shifted_copy(model: nn.Module, shift: Direction | None, scale: float = 1.0) -> nn.Module:
    """A copy of the model at θ + scale · Δθ that shares frozen parameters and buffers."""
    memo = {id(p): p for p in model.parameters() if not p.requires_grad}
    memo |= {id(b): b for b in model.buffers()}  # type: ignore[misc]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        moved = copy.deepcopy(model, memo)
    finally:
        for parameter, grad in gradients:
            parameter.grad = grad
    for (name, old), new in zip(model.named_modules(), moved.modules(), strict=True):
        own = old.__dict__.get("forward")
        if own is not None and new.__dict__["forward"] is own:
            raise UnsupportedModelError(
                f"the forward of {name or type(model).__name__} was replaced by a plain function, "
                "which in a copy of the model would still run the original's weights: use "
                "types.MethodType or functools.partial"
            )
    if shift:
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in shift:
                    parameter.add_(shift[name], alpha=scale)
    return moved


def log_log_slope(lrs: Sequence[float], errors: Sequence[float]) -> float:
    """Least-squares slope of log error against log lr; NaN with fewer than two points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(lrs, errors, strict=True) if b > 0]
    if len(points) < 2:
        return math.nan
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan


# rule -> [(point on the step, weight)]: the integral of d log π along θ + s Δθ.
RULES = {
    "start": [(0.0, 1.0)],
    "midpoint": [(0.5, 1.0)],
    "simpson": [(0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)],
}
