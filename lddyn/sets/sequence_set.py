"""A set of single sequences under an objective: demonstrations, rated responses, rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.objectives.objective import Objective
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.run import Batch
from lddyn.sets.training_set import TrainingSet
from lddyn.sets.training_step import TrainingStep

__all__ = ["SequenceSet", "SequenceStep", "response_weights"]

_UNEVEN = 1e-4  # spread of a response's token weights beyond which they are not one weight


@dataclass(frozen=True)
class SequenceSet(TrainingSet):
    """N sequences, each a row of its own.

    Attributes:
        responses: The sequences.
        row_numbers: Row of the data set that each comes from; empty: named by place.
        observed: Name -> a sequence that is looked at and not trained on, M of them.
        labels: What the data says of each, such as "desirable" or "reward 0.5"; empty: nothing.
    """

    responses: tuple[Example, ...]
    row_numbers: tuple[int, ...] = ()
    observed: Mapping[str, Example] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    sides = 1

    def __post_init__(self) -> None:
        """Checks that there is one number and one label a sequence, where there are any."""
        for what, values in {"row_numbers": self.row_numbers, "labels": self.labels}.items():
            if values and len(values) != len(self.responses):
                raise ValueError(
                    f"{what} must be one per sequence, {len(self.responses)}, got {len(values)}"
                )

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def examples(self) -> list[Example]:
        """The N sequences."""
        return list(self.responses)

    @cached_property
    def representatives(self) -> Tensor:
        """Every sequence itself, (N + M,) int64."""
        return torch.arange(len(self.sequences))


def response_weights(objective: Objective, token_log_probs: Sequence[Tensor]) -> Tensor:
    """∂L/∂ log π of every response of a batch, (1, B) float64.

    Args:
        objective: The loss of the batch, prepared.
        token_log_probs: log π of every token, one (L_i,) a response, nats.

    Raises:
        ValueError: If the loss weighs the tokens of a response differently.
    """
    _, weights = objective.weights([lp.double() for lp in token_log_probs])
    means = []
    for name, weight in zip(objective.names, weights, strict=True):
        largest = float(weight.abs().amax())
        if float((weight - weight.mean()).abs().amax()) > _UNEVEN * largest:
            raise ValueError(
                f"{name!r}: the loss weighs the tokens of this response differently, and a "
                "diagnosis of a set has one gradient a response; lddyn.decompose takes such a step "
                "exactly"
            )
        means.append(weight.mean())
    return torch.stack(means)[None]


@dataclass(frozen=True)
class SequenceStep(TrainingStep):
    """One small step of an objective on N sequences, to first order.

    Attributes:
        described: Name ("objective") and parameters of the loss.
        sequences: The set.
        readings: What forward passes say of it.
        gram: Inner products of all gradients.
        token_log_probs: log π of every token before the step, one (L_i,) a sequence, nats.
        weights: N ∂L/∂ log π of the set as one batch, (1, N): those of the rows' own losses.
        objective: The loss of the set as one batch, prepared; None: of a saved diagnosis.
        remarks: What the step leaves out, in sentences.
    """

    described: Mapping[str, Any]
    sequences: SequenceSet
    readings: Readings
    gram: Gram
    token_log_probs: Sequence[Tensor]
    weights: Tensor
    objective: Objective | None = None
    remarks: tuple[str, ...] = ()

    @property
    def set_(self) -> SequenceSet:
        """The sequences."""
        return self.sequences

    def weights_at(self, log_probs: Tensor) -> Tensor:
        """N ∂L/∂ log π of the set as one batch where the policy has these log-probs, (1, N).

        The change of a response's log π since the start is spread evenly over its tokens.
        """
        rows = range(len(self))
        return response_weights(self._loss, self._tokens(rows, log_probs)) * len(self)

    def pull(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """−∂L/∂ log π of the loss of one optimizer step on B sequences, (1, B).

        SFT divides by the tokens of the whole step; other losses are means over its parts.
        """
        rows = batch.pairs.tolist()
        loss = self._loss.subset(rows)
        pull = -response_weights(loss, self._tokens(rows, log_probs))
        return pull if loss.divides_by_tokens else pull * batch.weights * len(rows)

    @property
    def _loss(self) -> Objective:
        if self.objective is None:
            raise ValueError("the loss is not known: a saved diagnosis predicts no other run")
        return self.objective

    def _tokens(self, rows: Sequence[int], log_probs: Tensor) -> list[Tensor]:
        """Log π of the tokens of some sequences, whose sums are these (1, N)."""
        moved = log_probs[0] - self.readings.log_probs[0]
        known = self.token_log_probs
        return [known[i].double() + moved[i] / len(known[i]) for i in rows]

    @cached_property
    def wanted(self) -> Tensor:
        """What the loss wants of each sequence: 1 raises it, −1 lowers it, 0 leaves it, (N,)."""
        largest = self.weights.abs().amax()
        return torch.where(self.weights[0].abs() <= 1e-9 * largest, 0.0, -self.weights[0].sign())

    @cached_property
    def unit_lr(self) -> float:
        """Learning rate that moves log π of the sequences by one nat on average; 0: none does."""
        return self.rate_of(self.change[0])
