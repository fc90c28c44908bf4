"""One small step on the whole set, predicted from the Gram; no model is needed.

To first order a step of rate lr on pair j moves log π of sequence i by

    −lr (w_j+ ⟨g_i, g_j+⟩ + w_j− ⟨g_i, g_j−⟩),     g = ∇θ log π(y | x),  w± = ∂L/∂ log π(y±)

so three numbers a pair, ‖g+‖², ‖g−‖² and ⟨g+, g−⟩, say what it does to itself (Yuan et al., 2024,
"gradient entanglement"), and the Gram of all sequences' gradients says what pairs do to each other.
The objective enters through w alone: all losses of `lddyn.objectives.LOSSES` are compared without
training any.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lddyn.objectives.loss import Loss
from lddyn.sets.pairs import PairSet
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.scores import SCORES

__all__ = ["SOURCES", "SetStep", "pair_effects"]

# What moves a sequence: the response that a step learns from, of its own pair or of others.
SOURCES = ("own chosen", "other chosen", "own rejected", "other rejected")


def pair_effects(gram: Tensor, weights: Tensor) -> Tensor:
    """−Gram · w by pairs: d log π of sequence i by a step on pair j, (I, N), per unit of lr.

    Args:
        gram: Inner products of I sequences with all of the set (I, 2N).
        weights: w± (2, N).
    """
    n = weights.shape[1]
    pull = -weights
    return gram[:, :n] * pull[0] + gram[:, n:] * pull[1]


@dataclass(frozen=True)
class SetStep:
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

    def __len__(self) -> int:
        return len(self.pairs)

    def weights_at(self, log_probs: Tensor) -> Tensor:
        """w± = ∂L/∂ log π(y±) where the policy has these log-probs (2, N)."""
        return self.loss.weights(log_probs, self.reference, self.pairs.lengths)

    @cached_property
    def weights(self) -> Tensor:
        """w± = ∂L/∂ log π(y±), (2, N)."""
        return self.weights_at(self.readings.log_probs)

    @cached_property
    def effects(self) -> Tensor:
        """Derivative of log π of sequence i by a step on pair j alone, (2N, N), per unit of lr."""
        return pair_effects(self.gram.value, self.weights)

    @cached_property
    def change(self) -> Tensor:
        """Derivative of log π of y+ and y− by the step on the set, (2, N), per unit of lr."""
        return self.effects.mean(1).view(2, -1)

    @cached_property
    def observed_effects(self) -> Tensor:
        """Derivative of log π of each observed sequence by a step on pair j alone, (M, N)."""
        if not self.pairs.observed:
            return torch.zeros(0, len(self)).double()
        return pair_effects(self.gram.observed, self.weights)

    @property
    def observed_stderr(self) -> Tensor | None:
        """Standard errors of the mean of `observed_effects` over pairs, (M,); None: exact."""
        if self.gram.observed_stderr is None or not self.pairs.observed:
            return None
        variance = pair_effects(self.gram.observed_stderr**2, -(self.weights**2)).sum(1)
        return variance.sqrt() / len(self)

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

    @property
    def stderr(self) -> Tensor | None:
        """Standard errors of `change`, (2, N) per unit of lr; None where the Gram is exact.

        Errors of different entries of the Gram are taken as independent, which simulations bear
        out.
        """
        if self.gram.stderr is None:
            return None
        variance = pair_effects(self.gram.stderr**2, -(self.weights**2)).sum(1)
        return variance.sqrt().view(2, -1) / len(self)

    @cached_property
    def unit_lr(self) -> float:
        """Learning rate that moves the margins by one nat on average; 0 if no rate does."""
        mean = float((self.change[0] - self.change[1]).abs().mean())
        return 1 / mean if 0 < mean < math.inf else 0.0

    @property
    def entangled(self) -> list[int]:
        """Pairs whose own step lowers their chosen response, although the loss raises it."""
        lowers = self.scores["own_chosen"] < 0
        return torch.nonzero(lowers & (self.weights[0] <= 0)).flatten().tolist()

    def falling(self, count: int | None = None) -> list[int]:
        """Pairs by what the step does to their chosen response, the deepest fall first."""
        return self.change[0].argsort(stable=True)[:count].tolist()

    def culprits(self, pair: int, count: int = 5) -> list[tuple[int, float]]:
        """The pairs that lower this pair's chosen log-prob most: (pair, d log π per lr)."""
        effect = self.effects[pair] / len(self)
        order = effect.argsort(stable=True)[:count].tolist()
        return [(int(j), float(effect[j])) for j in order if effect[j] < 0]

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
