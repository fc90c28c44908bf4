"""A number that was sampled, with its standard error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lddyn.cells import Grid
from lddyn.files import JsonObject, json_safe
from lddyn.results import Result, load_result, save_result


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """Unbiased estimates with their standard errors, entry by entry.

    Attributes:
        value: The estimates, any shape.
        stderr: Their standard errors, same shape; zero where the value is exact.
        samples: Number of independent repeats behind `stderr`, for the quantiles of Student's t.
            None: so many that the normal distribution holds.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two samples.

    Example:
        >>> import torch
        >>> estimate = Estimate(torch.tensor([2.0]), torch.tensor([0.5]), samples=9)
        >>> low, high = estimate.interval(0.95)
        >>> round(float(low), 2), round(float(high), 2)
        (0.85, 3.15)
        >>> print(estimate)
        2 ± 0.5 (standard error of 9 samples)
    """

    value: Tensor
    stderr: Tensor
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.value.shape != self.stderr.shape:
            raise ValueError(
                f"stderr must have the shape of value {tuple(self.value.shape)}, got "
                f"{tuple(self.stderr.shape)}"
            )
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"a standard error needs two samples or more, got {self.samples}")

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds that hold the truth with this probability, by Student's t.

        Args:
            level: The probability, between 0 and 1.

        Raises:
            ValueError: If level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        from scipy.stats import norm, t

        tail = 0.5 + level / 2
        quantile = norm.ppf(tail) if self.samples is None else t.ppf(tail, self.samples - 1)
        reach = self.stderr * float(quantile)
        return self.value - reach, self.value + reach

    def __getitem__(self, index: object) -> Estimate:
        """Some of the entries, by an index of torch."""
        return Estimate(self.value[index], self.stderr[index], self.samples)  # type: ignore[index]

    def summary(self) -> JsonObject:
        """Shape, samples, mean of the values, and the largest standard error.

        `largest_relative_stderr` is the largest |stderr / value|, None if a value is zero.
        """
        value, stderr = self.value.double(), self.stderr.double()
        empty = value.numel() == 0
        return dict(
            json_safe(
                {
                    "shape": list(value.shape),
                    "samples": self.samples,
                    "mean": None if empty else float(value.mean()),
                    "largest_stderr": None if empty else float(stderr.max()),
                    "largest_relative_stderr": (
                        None
                        if empty
                        else float(
                            (stderr / value.abs()).nan_to_num(0.0, posinf=float("inf")).max()
                        )
                    ),
                }
            )
        )

    def explain(self) -> str:
        """The number with its standard error; of several numbers their range and largest error."""
        of = "" if self.samples is None else f" of {self.samples} samples"
        if self.value.numel() == 0:
            return f"no entries, shape {tuple(self.value.shape)}"
        if self.value.numel() == 1:
            value, stderr = float(self.value.reshape(())), float(self.stderr.reshape(()))
            if stderr == 0:
                return f"{value:.6g} (exact)"
            return f"{value:.4g} ± {stderr:.2g} (standard error{of})"
        low, high = float(self.value.min()), float(self.value.max())
        error = float(self.stderr.max())
        ending = "exact" if error == 0 else f"standard errors{of} up to {error:.2g}"
        return f"{tuple(self.value.shape)} estimates from {low:.4g} to {high:.4g}, {ending}"

    def _grids(self) -> list[Grid]:
        if self.value.ndim != 2 or not self.value.numel():
            return []
        names = [str(i) for i in range(self.value.shape[1])]
        tables = [("estimates", self.value)]
        if bool(self.stderr.any()):
            tables.append(("standard errors", self.stderr))
        return [
            Grid(title, names, [(str(i), row) for i, row in enumerate(x.tolist())], heat=True)
            for title, x in tables
        ]

    def to_dict(self) -> JsonObject:
        """Values and standard errors as nested lists, and samples; JSON-safe."""
        return {
            "value": json_safe(self.value.tolist()),
            "stderr": json_safe(self.stderr.tolist()),
            "samples": self.samples,
        }

    def save(self, path: str | Path) -> None:
        """Writes `path`.json and its tensors (`lddyn.results`), in one commit."""
        tensors = {"value": self.value, "stderr": self.stderr}
        save_result(path, "lddyn.Estimate", 1, tensors, {"samples": self.samples})

    @classmethod
    def load(cls, path: str | Path) -> Estimate:
        """Reads what `save` wrote.

        Raises:
            ValueError: If a file is missing, damaged or of another format.
        """
        tensors, facts = load_result(path, "lddyn.Estimate", 1)
        return cls(tensors["value"], tensors["stderr"], facts["samples"])
