"""The time that watching may take, as a share of the time of training."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Budget"]


def budget_share(budget: float | str) -> float:
    """The share that "5%" or 0.05 stands for.

    Raises:
        ValueError: If it is not a positive number.
    """
    text = str(budget).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ValueError(f"budget must be a share such as '5%' or 0.05, got {budget!r}")
    return share


class Budget:
    """Seconds spent on passes, held against the seconds of training since it was made.

    Args:
        share: Most seconds of passes for each second of training.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._began = time.monotonic()
        self._spent = 0.0
        self._recorded = 0.0  # of the seconds spent, those of passes that are complete
        self._costs: deque[float] = deque(maxlen=3)  # seconds of the latest passes

    @property
    def overhead(self) -> float:
        """Seconds of passes over seconds of training so far."""
        training = time.monotonic() - self._began - self._spent
        return self._spent / training if training > 0 else math.inf

    @property
    def cost(self) -> float:
        """Seconds that the next pass may take: the longest of the latest three."""
        return max(self._costs, default=0.0)

    def affords(self, passes: int) -> bool:
        """Whether so many more passes stay within the share."""
        training = time.monotonic() - self._began - self._spent
        return self._spent + passes * self.cost <= self.share * training

    @contextmanager
    def paid(self) -> Iterator[None]:
        """Count the time inside as spent."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - start

    def complete_pass(self) -> None:
        """Record the seconds spent since the last complete pass as the cost of one pass."""
        self._costs.append(self._spent - self._recorded)
        self._recorded = self._spent
