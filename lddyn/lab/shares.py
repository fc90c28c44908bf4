"""How often something was so, with an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lddyn.lab.record import Verdict

_RULE = 0.95


def verdict(holds: bool) -> Verdict:
    """Whether what was claimed was seen."""
    return "agrees" if holds else "disagrees"


@dataclass(frozen=True)
class Share:
    """`count` of `total` cases, and Wilson's 95 % interval for their probability."""

    count: int
    total: int

    @classmethod
    def of(cls, outcomes: Tensor) -> Share:
        """Counts the true entries of a boolean tensor."""
        return cls(int(outcomes.sum()), outcomes.numel())

    @property
    def value(self) -> float:
        """Count over total; NaN without cases."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval: right also where nothing, or everything, was so."""
        if not self.total:
            return 0.0, 1.0
        z = 1.959964
        share, n = self.value, self.total
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def tendency(self) -> Verdict:
        """Of a comparison, "this more than that": more often than not, by the interval."""
        return self._beyond(0.5)

    @property
    def rule(self) -> Verdict:
        """Of a sentence without an "often": at most one exception in twenty, by the interval."""
        return self._beyond(_RULE)

    def _beyond(self, threshold: float) -> Verdict:
        low, high = self.interval
        if low <= threshold <= high:
            return "not testable at this scale"
        return verdict(low > threshold)

    def row(self) -> dict[str, Any]:
        """For a table."""
        low, high = self.interval
        return {
            "count": self.count,
            "total": self.total,
            "share": self.value,
            "low": low,
            "high": high,
        }

    def __str__(self) -> str:
        text = f"{100 * self.value:.4g}"
        if text == "100" and self.count < self.total:  # a rounded 100 % hides that it is not all
            return f"all but {self.total - self.count:,} of {self.total:,}"
        return f"{text} % of {self.total:,}"
