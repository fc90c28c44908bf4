"""One small step on a set, predicted from the Gram of its gradients; no model is needed.

To first order a step of rate lr on the loss L_j of row j moves log π of sequence i by

    −lr Σ_s w_js ⟨g_i, g_js⟩,     g = ∇θ log π(y | x),  w_js = ∂L_j/∂ log π(y_js)

summed over the sequences s of the row. The objective enters through w alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.run import Batch
from lddyn.sets.training_set import TrainingSet

__all__ = ["TrainingStep", "row_effects"]


def row_effects(gram: Tensor, weights: Tensor) -> Tensor:
    """−Gram · w by rows: d log π of sequence i by a step on row j, (I, N), per unit of lr.

    Args:
        gram: Inner products of I sequences with all of the set (I, S).
        weights: w (sides, N).
    """
    return (gram.reshape(len(gram), *weights.shape) * -weights).sum(1)


class TrainingStep(ABC):
    """One small step of an objective on the mean loss of N rows, to first order.

    Attributes:
        readings: What forward passes say of the set.
        gram: Inner products of all gradients.
        weights: ∂L/∂ log π of the rows' own losses before the step, (sides, N).
        remarks: What the trainer's settings ask for and the step leaves out, in sentences.
    """

    readings: Readings
    gram: Gram
    weights: Tensor
    remarks: tuple[str, ...]

    @property
    @abstractmethod
    def set_(self) -> TrainingSet:
        """The rows, and what is observed."""

    @abstractmethod
    def weights_at(self, log_probs: Tensor) -> Tensor:
        """∂L/∂ log π of the rows' own losses where the policy has these log-probs.

        Args:
            log_probs: (sides, N) nats.

        Returns:
            (sides, N).
        """

    @abstractmethod
    def pull(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """−∂L/∂ log π of the loss of one optimizer step on B rows, (sides, B)."""

    def __len__(self) -> int:
        return len(self.set_)

    @cached_property
    def effects(self) -> Tensor:
        """Derivative of log π of sequence i by a step on row j alone, (S, N), per unit of lr."""
        return row_effects(self.gram.value, self.weights)

    @cached_property
    def change(self) -> Tensor:
        """Derivative of log π of the sequences by the step on the set, (sides, N), per lr."""
        return self.effects.mean(1).view_as(self.weights)

    @cached_property
    def observed_effects(self) -> Tensor:
        """Derivative of log π of each observed sequence by a step on row j alone, (M, N)."""
        if not self.set_.observed:
            return torch.zeros(0, len(self)).double()
        return row_effects(self.gram.observed, self.weights)

    @property
    def observed_stderr(self) -> Tensor | None:
        """Standard errors of the mean of `observed_effects` over rows, (M,); None: exact."""
        if self.gram.observed_stderr is None or not self.set_.observed:
            return None
        variance = row_effects(self.gram.observed_stderr**2, -(self.weights**2)).sum(1)
        return variance.sqrt() / len(self)

    @property
    def stderr(self) -> Tensor | None:
        """Standard errors of `change`, (sides, N) per unit of lr; None where the Gram is exact.

        Errors of different entries of the Gram are taken as independent, which simulations bear
        out.
        """
        if self.gram.stderr is None:
            return None
        variance = row_effects(self.gram.stderr**2, -(self.weights**2)).sum(1)
        return variance.sqrt().view_as(self.weights) / len(self)

    def rate_of(self, change: Tensor) -> float:
        """Learning rate at which these derivatives are one nat on average; 0 if none is."""
        mean = float(change.abs().mean())
        return 1 / mean if 0 < mean < math.inf else 0.0

    def falling(self, count: int | None = None) -> list[int]:
        """Rows by what the step does to their first sequence, the deepest fall first."""
        return self.change[0].argsort(stable=True)[:count].tolist()

    def culprits(self, row: int, count: int = 5) -> list[tuple[int, float]]:
        """The rows that lower this row's first sequence most: (row, d log π per lr)."""
        effect = self.effects[row] / len(self)
        order = effect.argsort(stable=True)[:count].tolist()
        return [(int(j), float(effect[j])) for j in order if effect[j] < 0]
