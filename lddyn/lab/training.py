"""A training loop whose updates can be taken apart.

transformers' Trainer and TRL's DPOTrainer take the same steps
(tests/lab/test_dynamics_trainers.py). The laboratory has a loop of its own because it measures
within the step: the gradient of each term of the loss before the terms are added and clipped, and
the diagonal P that the optimizer has at that moment:

    Δ log π(y_o) = Σ_terms ⟨∇ log π(y_o), −η P g_term⟩ + O(η²)           (paper Eq. 5 and 7)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.gradient import gradient_of
from lddyn.engine.logits import sequence_log_probs
from lddyn.lab.first_order import first_order
from lddyn.objectives.loss import Loss
from lddyn.optimizers import Direction, optimizer_step
from lddyn.probes.measure import measure
from lddyn.probes.probe_set import Encoded

__all__ = [
    "Batch",
    "Explained",
    "Explanations",
    "Preferring",
    "Supervised",
    "TrainingLoss",
    "train",
]

Batch = Mapping[str, Sequence[Example]]  # term -> its examples, aligned


# --------------------------------------------------------------------------- losses


class TrainingLoss(Protocol):
    """A loss of a batch, known by its derivatives with respect to log π of whole responses."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the batch's parts that the loss learns from, T of them."""

    def weights(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """∂L/∂log π(y) of every response, (T, B); negative raises the response.

        Args:
            policy: log π, (T, B) nats.
            reference: log π_ref, (T, B) nats.
            lengths: Counted tokens, (T, B).
        """


@dataclass(frozen=True)
class Supervised:
    """SFT: −Σ_l log π(y_l), averaged over the batch and summed over the terms (paper Eq. 4)."""

    terms: tuple[str, ...] = ("chosen",)

    def weights(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """−1/B each."""
        return torch.full_like(policy, -1 / policy.shape[1])


@dataclass(frozen=True)
class Preferring:
    """A loss of the table in `lddyn.objectives`, averaged over the pairs of the batch.

    Attributes:
        loss: The table's loss.
        gate: (α, τ) of Gate-DPO: the weight of y− is multiplied by σ(α (p − τ)), with p the
            geometric mean of y−'s token probabilities. None: no gate.
    """

    loss: Loss = field(default_factory=lambda: Loss("dpo"))
    gate: tuple[float, float] | None = None
    terms: tuple[str, ...] = ("chosen", "rejected")

    def weights(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """The table's weights over B, gated."""
        weights = self.loss.weights(policy, reference, lengths) / policy.shape[1]
        if self.gate is not None:
            sharpness, threshold = self.gate
            typical = (policy[1] / lengths[1]).exp()
            opened = torch.sigmoid(sharpness * (typical - threshold))
            weights = torch.stack([weights[0], weights[1] * opened])
        return weights


# --------------------------------------------------------------------------- forward


@dataclass
class _Forward:
    """The loss of one batch.

    Attributes:
        parts: Term → Σ_i w_i log π(y_i), a scalar with its graph; their sum has the loss's
            gradient.
        per_token: Mean −log π of the first term per token, nats.
    """

    parts: dict[str, Tensor]
    per_token: float

    @property
    def total(self) -> Tensor:
        """The scalar whose gradient is the loss's."""
        return torch.stack(list(self.parts.values())).sum()


def _forward(
    model: nn.Module, reference: nn.Module | None, batch: Batch, loss: TrainingLoss
) -> _Forward:
    """Runs policy and reference on a batch.

    Raises:
        FloatingPointError: If a log-prob is not finite.
    """
    every = [example for term in loss.terms for example in batch[term]]
    lengths = torch.tensor([float(len(example)) for example in every])
    policy = sequence_log_probs(model, every)
    if not bool(torch.isfinite(policy).all()):
        raise FloatingPointError("a log-prob is not finite: lower the lr")
    with torch.no_grad():
        now = policy.detach()
        fixed = sequence_log_probs(reference, every) if reference is not None else now
        grid = (len(loss.terms), -1)
        weights = loss.weights(now.view(grid), fixed.view(grid), lengths.to(now).view(grid))
    rows = zip(loss.terms, weights, policy.view(grid), strict=True)
    first = batch[loss.terms[0]]
    return _Forward(
        {term: (w * row).sum() for term, w, row in rows},
        -float(now[: len(first)].sum()) / sum(len(example) for example in first),
    )


# --------------------------------------------------------------------------- the loop


@dataclass
class Explained:
    """One update with its parts.

    Attributes:
        update: Its number, from 0.
        directions: Term → its part of Δθ; "history" and "decay" where the optimizer has them.
        predicted: Term → first-order Δ log π of every probe (N,), nats.
        measured: Δ log π of every probe (N,), nats.
    """

    update: int
    directions: dict[str, Direction]
    predicted: dict[str, Tensor]
    measured: Tensor


@dataclass(frozen=True)
class Explanations:
    """Which updates are explained.

    Attributes:
        updates: Their numbers, from 0.
        probes: The responses whose change is predicted and measured.
        receive: Called with each explanation.
    """

    updates: Container[int]
    probes: Encoded
    receive: Callable[[Explained], None]


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: TrainingLoss,
    optimizer: torch.optim.Optimizer,
    *,
    reference: nn.Module | None = None,
    warmup: int = 0,
    max_grad_norm: float | None = 10.0,
    observe: Callable[[int, nn.Module], None] | None = None,
    explanations: Explanations | None = None,
    bar: Callable[[Iterable[Batch]], Iterable[Batch]] | None = None,
) -> list[float]:
    """Takes one step per batch; dropout is off, as in the paper.

    Args:
        model: Changed in place.
        batches: One mapping of term → examples per update.
        loss: Supervised, Preferring, or anything with their two members.
        optimizer: SGD, Adam, AdamW or RMSprop of torch over the model's parameters.
        reference: π_ref. None: the policy of the moment.
        warmup: Updates of linear warm-up.
        max_grad_norm: The gradient's norm is clipped to it.
        observe: Called with the update's number and the model before it, and after the last.
        explanations: Which updates are taken apart. None: none.
        bar: Wraps the batches in a progress bar.

    Returns:
        Mean −log π of the first term per token, nats, at every update.

    Raises:
        FloatingPointError: If a log-prob is not finite.

    Cost: one forward and one backward pass per batch; an explained update has besides a backward
    pass per term, a forward-mode pass over the probes per term, and two probe passes.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1))
    )
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    model.eval()
    for update, batch in enumerate(bar(batches) if bar else batches):
        if observe:
            observe(update, model)
        forward = _forward(model, reference, batch, loss)
        losses.append(forward.per_token)
        explain = explanations is not None and update in explanations.updates
        gradients = {
            term: gradient_of(part, named, retain_graph=True)
            for term, part in (forward.parts.items() if explain else ())
        }
        optimizer.zero_grad()
        forward.total.backward()
        opened = None
        if explanations is not None and explain:
            opened = _Opened.before_step(
                model, named, optimizer, max_grad_norm, gradients, explanations.probes
            )
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
        optimizer.step()
        schedule.step()
        if explanations is not None and opened is not None:
            explanations.receive(opened.after_step(update, model, explanations.probes))
    optimizer.zero_grad()
    if observe:
        observe(len(batches), model)
    return losses


@dataclass
class _Opened:
    """An update that is explained, before it is taken."""

    directions: dict[str, Direction]
    predicted: dict[str, Tensor]
    before: Tensor

    @classmethod
    def before_step(
        cls,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        gradients: Mapping[str, Direction],
        probes: Encoded,
    ) -> _Opened:
        """Splits the step that the optimizer is about to take into the terms' parts."""
        whole = {name: p.grad for name, p in named.items() if p.grad is not None}
        step = optimizer_step(optimizer, dict(named), whole, max_grad_norm)
        directions = {term: step.gradient_part(g) for term, g in gradients.items()}
        if step.history is not None:
            directions["history"] = step.history
        if step.decay is not None:
            directions["decay"] = step.decay
        predicted = first_order(model, probes.examples, directions)
        return cls(directions, predicted, measure(model, probes).log_prob)

    def after_step(self, update: int, model: nn.Module, probes: Encoded) -> Explained:
        """The explanation, with what the step really did."""
        moved = measure(model, probes).log_prob - self.before
        return Explained(update, self.directions, self.predicted, moved)
