"""A number that was sampled, and how far it may be off."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate with its standard error, elementwise.

    Attributes:
        value: The estimate, any shape.
        stderr: Its standard error, same shape; zero where the value is exact.
        samples: Independent repeats behind `stderr`, for the quantiles of Student's t; None: many.

    Example:
        >>> import torch
        >>> estimate = Estimate(torch.tensor([2.0]), torch.tensor([0.5]), samples=9)
        >>> low, high = estimate.interval(0.95)
        >>> round(float(low), 2), round(float(high), 2)
        (0.85, 3.15)
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
        """Bounds that hold the truth with this probability, by Student's t.

        Raises:
            ValueError: If level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        from scipy.stats import norm, t

        tail = 0.5 + level / 2
        quantile = norm.ppf(tail) if self.samples is None else t.ppf(tail, self.samples - 1)
        reach = self.stderr * float(quantile)
        return self.value - reach, self.value + reach

    def __getitem__(self, index: object) -> Estimate:
        """Some of the entries."""
        return Estimate(self.value[index], self.stderr[index], self.samples)  # type: ignore[index]

    def save(self, path: str | Path) -> None:
        """Writes `path`.safetensors and `path`.json."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"value": self.value.contiguous(), "stderr": self.stderr.contiguous()}
        save_file(tensors, path.with_name(path.name + ".safetensors"))
        path.with_name(path.name + ".json").write_text(json.dumps({"samples": self.samples}))

    @classmethod
    def load(cls, path: str | Path) -> Estimate:
        """Reads what `save` wrote."""
        from safetensors.torch import load_file

        path = Path(path)
        tensors = load_file(path.with_name(path.name + ".safetensors"))
        meta = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
        return cls(tensors["value"], tensors["stderr"], meta["samples"])
