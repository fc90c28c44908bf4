"""One small step on a preference set, predicted from the Gram; no model is needed.

`lddyn.sets.training_step` has the formula: three numbers a pair, ‖g+‖², ‖g−‖² and ⟨g+, g−⟩, say
what it does to itself (Yuan et al., 2024, "gradient entanglement"), and the Gram of all sequences'
gradients says what pairs do to each other. The objective enters through w alone: all losses of
`lddyn.objectives.LOSSES` are compared without training any.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lddyn.objectives.loss import Loss
from lddyn.sets.pairs import PairSet
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.run import Batch
from lddyn.sets.scores import SCORES
from lddyn.sets.training_step import TrainingStep

__all__ = ["SOURCES", "SetStep"]

# What moves a sequence: the response that a step learns from, of its own pair or of others.
SOURCES = ("own chosen", "other chosen", "own rejected", "other rejected")


@dataclass(frozen=True)
class SetStep(TrainingStep):
    """One small step of an objective on the mean loss of N pairs, to first order.

    Attributes:
        loss: The loss of a pair.
        pairs: The set.
        readings: What forward passes say of it.
        gram: Inner products of all gradients.
        reference: log π_ref, (2, N) nats.
        reference_name: What the reference is, in words.
        remarks: What the trainer's settings ask for and the step leaves out, in sentences.
    """

    loss: Loss
    pairs: PairSet
    readings: Readings
    gram: Gram
    reference: Tensor
    reference_name: str = "the model itself before the step"
    remarks: tuple[str, ...] = ()

    @property
    def set_(self) -> PairSet:
        """The pairs."""
        return self.pairs

    @cached_property
    def weights(self) -> Tensor:  # type: ignore[override]
        """w± = ∂L/∂ log π(y±), (2, N)."""
        return self.weights_at(self.readings.log_probs)

    def weights_at(self, log_probs: Tensor) -> Tensor:
        """w± = ∂L/∂ log π(y±) where the policy has these log-probs (2, N)."""
        return self.loss.weights(log_probs, self.reference, self.pairs.lengths)

    def pull(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """−∂L/∂ log π of the loss of one optimizer step on B pairs, (2, B)."""
        return -self.weights_at(log_probs)[:, batch.pairs] * batch.weights

    @cached_property
    def contribution(self) -> Tensor:
        """Change of the mean log π(y+) by each pair's part of the step, (N,), per unit of lr."""
        n = len(self)
        return self.effects[:n].mean(0) / n

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Name -> (N,) float64; `SCORES` says what each is."""
        n, gram, index = len(self), self.gram.value, torch.arange(len(self))
        log_probs = self.readings.log_probs
        gain = log_probs - self.reference
        computed = {
            "set_chosen": self.change[0],
            "own_chosen": self.effects[index, index],
            "set_rejected": self.change[1],
            "own_rejected": self.effects[n + index, index],
            "contribution": self.contribution,
            "norm_chosen": gram[index, index],
            "norm_rejected": gram[n + index, n + index],
            "inner": gram[index, n + index],
            "entanglement": gram[index, n + index] / gram[index, index],
            "log_prob_chosen": log_probs[0],
            "log_prob_rejected": log_probs[1],
            "margin": gain[0] - gain[1],
            "weight_chosen": self.weights[0],
            "weight_rejected": self.weights[1],
        }
        merged = {**self.readings.facts, **computed}
        return {name: merged[name] for name in SCORES if name in merged}

    @cached_property
    def unit_lr(self) -> float:
        """Learning rate that moves the margins by one nat on average; 0 if no rate does."""
        return self.rate_of(self.change[0] - self.change[1])

    @property
    def entangled(self) -> list[int]:
        """Pairs whose own step lowers their chosen response, although the loss raises it."""
        lowers = self.scores["own_chosen"] < 0
        return torch.nonzero(lowers & (self.weights[0] <= 0)).flatten().tolist()

    def sources(self) -> dict[str, Tensor]:
        """Change of each sequence by source: which responses the step learns from (`SOURCES`).

        Returns:
            Name -> (2N,) nats of the step at `unit_lr`.
        """
        n, scale = len(self), self.unit_lr / len(self)
        index, parts = torch.arange(n), {}
        blocks = {"chosen": self.gram.value[:, :n], "rejected": self.gram.value[:, n:]}
        for (name, block), weight in zip(blocks.items(), -self.weights, strict=True):
            effect = block * weight * scale
            own = torch.cat([effect[index, index], effect[n + index, index]])
            parts[f"own {name}"], parts[f"other {name}"] = own, effect.sum(1) - own
        return {name: parts[name] for name in SOURCES}

    def strongest_source(self) -> tuple[str, int]:
        """The source that lowers most of the falling y+ most, and for how many of them."""
        falls = self.change[0] < 0
        parts = torch.stack([v[: len(self)][falls] for v in self.sources().values()])
        counts = Counter(SOURCES[i] for i in parts.argmin(0).tolist())
        return counts.most_common(1)[0]
