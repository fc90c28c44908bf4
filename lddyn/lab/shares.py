"""How claims are decided: rates with intervals, resampled prompts, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lddyn.lab.record import Claim, Lab, Row, Verdict
from lddyn.stats import bootstrap

_RULE = 0.95


def verdict(holds: bool) -> Verdict:
    """Agrees or disagrees."""
    return "agrees" if holds else "disagrees"


@dataclass(frozen=True)
class Share:
    """`count` of `total` cases, and Wilson's 95 % interval for their probability."""

    count: int
    total: int

    @classmethod
    def of(cls, outcomes: Tensor) -> Share:
        """The number of true entries of a boolean tensor, and of all."""
        return cls(int(outcomes.sum()), outcomes.numel())

    @property
    def value(self) -> float:
        """Count over total; NaN without cases."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval, which is right also where the count is 0 or the total."""
        if not self.total:
            return 0.0, 1.0
        z = 1.959964
        share, n = self.value, self.total
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def tendency(self) -> Verdict:
        """The verdict on a comparison: agrees if the interval lies above one half."""
        return self._beyond(0.5)

    @property
    def rule(self) -> Verdict:
        """The verdict on a rule: agrees if the interval lies above 95 %."""
        return self._beyond(_RULE)

    def _beyond(self, threshold: float) -> Verdict:
        low, high = self.interval
        if low <= threshold <= high:
            return "not testable at this scale"
        return verdict(low > threshold)

    def row(self) -> Row:
        """Count, total, rate and interval, for a table."""
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


def claim_of_share(
    name: str,
    text: str,
    source: str,
    published: str,
    share: Share,
    reason: str,
    *,
    kind: Literal["guarantee", "rule", "tendency"] = "tendency",
    corrected: str = "",
) -> Claim:
    """A claim that is decided by how often something held.

    Args:
        name: As in `Claim`.
        text: As in `Claim`.
        source: As in `Claim`.
        published: As in `Claim`.
        share: How often it held.
        reason: As in `Claim`.
        kind: A guarantee must hold always, a rule in at least 95 % of the cases, a tendency in more
            than half; the last two by the 95 % interval.
        corrected: As in `Claim`.
    """
    decided = {
        "guarantee": verdict(share.count == share.total),
        "rule": share.rule,
        "tendency": share.tendency,
    }
    return Claim(
        name,
        text,
        source,
        published,
        str(share),
        decided[kind],
        reason,
        corrected,
        share.value,
        share.interval,
    )


def over_prompts(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    threshold: float,
    generator: torch.Generator,
) -> tuple[float, tuple[float, float] | None, Verdict, str]:
    """Whether a statistic is above a threshold for sure, where only prompts are independent.

    Whole prompts are resampled, with all their states. With three prompts or fewer, more than one
    resample in forty holds the lowest prompt alone, so the percentiles are merely the range: then
    there is no interval, and the range over single prompts decides. One prompt decides nothing, and
    neither does a threshold within the interval or the range.

    Args:
        values: (P, …).
        statistic: A function of such an array.
        threshold: The value to be exceeded.
        generator: Random numbers of the resampling.

    Returns:
        The statistic; its 95 % interval, or None; the verdict; the prompts, in words.
    """
    value, interval = statistic(values), None
    each = [statistic(values[[prompt]]) for prompt in range(len(values))]
    if len(each) == 1:
        return value, None, "not testable at this scale", "one prompt, so there is no interval"
    low, high = min(each), max(each)
    words = f"{len(each)} prompts"
    if len(each) > 3:
        value, interval = bootstrap(values, statistic, generator=generator)
        low, high = interval
    else:
        words += f", too few for an interval (single prompts: {low:+.3f} to {high:+.3f})"
    if low <= threshold <= high:
        return value, interval, "not testable at this scale", words
    return value, interval, verdict(low > threshold), words


def bootstrap_of(lab: Lab, name: str, values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean of one value per prompt, and its 95 % interval by resampling prompts.

    Args:
        lab: The experiment.
        name: Labels the random numbers.
        values: (P,), NaN where a response is missing.
    """
    return bootstrap(values, generator=lab.generator("bootstrap", name))
