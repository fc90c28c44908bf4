"""Measures a probing set at intervals while a model trains."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lddyn.probes.measure import Measured, measure
from lddyn.probes.probe_set import Encoded


@dataclass
class Tracker:
    """Measures a probing set before every `every`-th update.

    Attributes:
        probes: The set, P prompts and F types.
        every: Updates between two passes; the last state is measured too.
        last: Number of updates of the run.
        updates: Numbers of updates before the T passes.
        passes: What each pass measured.
        seconds: CPU time of all passes.
    """

    probes: Encoded
    every: int
    last: int
    updates: list[int] = field(default_factory=list)
    passes: list[Measured] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, update: int, model: nn.Module) -> None:
        """Measures the model, if a pass is due before this update."""
        if update % self.every and update != self.last:
            return
        start = time.process_time()
        self.passes.append(measure(model, self.probes))
        self.updates.append(update)
        self.seconds += time.process_time() - start

    def grids(self, name: str, per_token: bool = False) -> np.ndarray:
        """One of Measured's sums over training, (T, P, F); NaN where a response is missing."""
        stacked = [
            self.probes.grid(getattr(m, name) / (m.tokens if per_token else 1)) for m in self.passes
        ]
        return torch.stack(stacked).numpy()
