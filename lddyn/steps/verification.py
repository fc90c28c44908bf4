"""A prediction compared with real optimizer steps on a copy of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lddyn.cells import Grid
from lddyn.files import json_safe, read_sealed, replace_file, sealed
from lddyn.report.data import CheckData
from lddyn.results import Result

KIND, FORMAT = "lddyn.Verification", 1


@dataclass(repr=False)
class Verification(Result):
    """Predictions and measurements at several learning rates, made by `Decomposition.verify`.

    Attributes:
        lrs: Learning rates, one per row below.
        measured: Δ log π of all observed tokens after a real step, (rates, ΣM), nats.
        predicted: The same by the decomposition's rule at that rate, (rates, ΣM), nats.
        errors: ‖measured − predicted‖ over all observed tokens, one per rate, nats.
        slope: Log-log slope of errors against rates; NaN where it cannot be told.
        expected: The slope that the rule must have: 2, 3 or 5.
        dtype: Of the copy that took the steps.
        answer_error: ‖measured − delta_logp‖ for the numbers of the decomposition itself, at its
            own learning rate; None when that is not among lrs.
        own_step: For a model with 16-bit weights, verified in another number type: its "dtype",
            the part of all weights that a real step in it moved ("moved"), and the sum of Δ log π
            over all observed tokens after it ("measured", nats). Else None.
    """

    lrs: list[float]
    measured: Tensor
    predicted: Tensor
    errors: list[float]
    slope: float
    expected: int
    dtype: str
    answer_error: float | None = None
    own_step: dict[str, Any] | None = None

    @property
    def relative_error(self) -> float:
        """‖measured − predicted‖ / ‖measured‖ at the first learning rate."""
        return self.errors[0] / max(float(self.measured[0].norm()), 1e-300)

    def summary(self) -> dict[str, Any]:
        """Largest rate, totals over tokens there in nats, relative error, slope and its target."""
        return dict(
            json_safe(
                {
                    "lr": self.lrs[0],
                    "measured": float(self.measured[0].sum()),
                    "predicted": float(self.predicted[0].sum()),
                    "relative_error": self.relative_error,
                    "slope": self.slope,
                    "expected": self.expected,
                    "answer_error": self.answer_error,
                    "dtype": self.dtype,
                }
            )
        )

    def explain(self) -> str:
        """One line per learning rate, then the slope, and what a wrong slope means."""
        lines = [
            f"lr {lr:.3g}: measured {float(m.sum()):+.6g} nats, predicted {float(p.sum()):+.6g}, "
            f"‖error‖ {e:.3g}"
            for lr, m, p, e in zip(
                self.lrs, self.measured, self.predicted, self.errors, strict=True
            )
        ]
        if self.answer_error is not None:
            lines.append(f"the decomposition's own numbers: ‖error‖ {self.answer_error:.3g}")
        if self.own_step is not None:
            own = self.own_step
            lines.append(
                f"in {own['dtype']} itself: {own['moved']:.2%} of the weights moved, measured "
                f"{own['measured']:+.6g} nats"
            )
        lines.append(f"slope {self.slope:.3f} (expected {self.expected}), {self.dtype}")
        if abs(self.slope - self.expected) > 0.5:
            lines.append(
                "the slope is not the expected one: the steps are too large for one power to "
                "dominate (try smaller lrs), or at the level of rounding"
            )
        return "\n".join(lines)

    def _grids(self) -> list[Grid]:
        rows = [
            (f"lr {lr:.3g}", [float(m.sum()), float(p.sum()), e])
            for lr, m, p, e in zip(
                self.lrs, self.measured, self.predicted, self.errors, strict=True
            )
        ]
        columns = ["measured", "predicted", "‖error‖ over tokens"]
        return [Grid("Δ log π of all observed tokens, nats", columns, rows)]

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
            "answer_error": self.answer_error,
            "own_step": self.own_step,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verification:
        """The verification that `to_dict` made these values of."""
        slope, answer = values["slope"], values["answer_error"]
        return cls(
            lrs=list(values["lrs"]),
            measured=torch.tensor(values["measured"], dtype=torch.float64),
            predicted=torch.tensor(values["predicted"], dtype=torch.float64),
            errors=list(values["errors"]),
            slope=math.nan if slope is None else float(slope),
            expected=int(values["expected"]),
            dtype=str(values["dtype"]),
            answer_error=None if answer is None else float(answer),
            own_step=values.get("own_step"),
        )

    def save(self, path: str | Path) -> None:
        """Writes a JSON file at this path, as a whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, sealed({"kind": KIND, "format": FORMAT, **self.to_dict()}), durable=True)

    @classmethod
    def load(cls, path: str | Path) -> Verification:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is missing, or no verification.
        """
        try:
            values = read_sealed(Path(path))
            if (values["kind"], values["format"]) != (KIND, FORMAT):
                raise ValueError(f"it holds {values['kind']} of format {values['format']}")
            return cls.from_dict(values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read as {KIND}: {error}") from error


def log_log_slope(lrs: Sequence[float], errors: Sequence[float]) -> float:
    """Least-squares slope of log error against log lr; NaN with fewer than two points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(lrs, errors, strict=True) if b > 0]
    if len(points) < 2:
        return math.nan
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan
