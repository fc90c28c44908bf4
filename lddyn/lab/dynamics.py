"""Finetuning that is watched: what updates do to responses, measured, predicted, and by the kernel.

`train` is a plain loop. transformers' Trainer and TRL's DPOTrainer take the same steps
(tests/test_dynamics_trainers.py), but what is wanted here lies around and within the step: the
gradient of each term of the loss before it is clipped, the diagonal P that the optimizer has in
this very step, and the model on both sides of it:

    Δ log π(y_o) = Σ_terms ⟨∇ log π(y_o), −η P g_term⟩ + O(η²)           (paper Eq. 5 and 7)

`Tracker` measures a probing set on the way, `first_order` predicts it for a step, `kernel_norms`
measures ‖K‖_F beside what the paper measures in its place, `influence` is the Gram matrix of whole
responses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.gradient import flat_gradient, gradient_of
from lddyn.engine.gram import sequence_gram
from lddyn.engine.logits import own_response, sequence_log_probs
from lddyn.engine.pushforward import batched_shifts
from lddyn.entk.operator import ntk
from lddyn.entk.proxies import lbk, sign_delta
from lddyn.objectives import SFT
from lddyn.optimizers import Direction, optimizer_step
from lddyn.probes.measure import Measured, measure
from lddyn.probes.probe_set import Encoded
from lddyn.steps.setup import shifted_copy

__all__ = [
    "Batch",
    "Explained",
    "Loss",
    "Preference",
    "Supervised",
    "Tracker",
    "first_order",
    "influence",
    "kernel_norms",
    "some_tokens",
    "train",
]

Batch = Mapping[str, Sequence[Example]]  # term -> its examples, aligned


class Loss(Protocol):
    """A loss of sequence log-probs, by its derivatives.

    ∇L = Σ_terms Σ_i c_term,i ∇ log π(y_term,i): everything that a step needs.
    """

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the batch's parts that it learns from."""

    def coefficients(
        self, policy: Mapping[str, Tensor], reference: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The c (B,) of each term, from log π and log π_ref (B,) in nats."""


@dataclass(frozen=True)
class Supervised:
    """SFT: the mean over the batch of −Σ_l log π(y_l), added over the terms (paper Eq. 4)."""

    terms: tuple[str, ...] = ("chosen",)

    def coefficients(
        self, policy: Mapping[str, Tensor], reference: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """All −1/B."""
        return {t: torch.full_like(policy[t], -1 / len(policy[t])) for t in self.terms}


@dataclass(frozen=True)
class Preference:
    """DPO (paper App. B Eq. 12-15), with two remedies.

    c+ = −β(1 − a)/B − nll/(|y+| B),   c− = gate · β(1 − a)/B

    Attributes:
        beta: β.
        nll: Weight of the mean negative log-likelihood of y+ beside it (DPO+NLL, RPO).
        gate: (α, τ): the negative term is taken times σ(α (p − τ)), with p the geometric mean of
            y−'s token probabilities (Gate-DPO); None: 1.
    """

    beta: float = 0.1
    nll: float = 0.0
    gate: tuple[float, float] | None = None
    terms: tuple[str, ...] = ("chosen", "rejected")

    def coefficients(
        self, policy: Mapping[str, Tensor], reference: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """As above."""
        plus, minus = self.terms
        count = len(policy[plus])
        ratio = (policy[plus] - reference[plus]) - (policy[minus] - reference[minus])
        pull = self.beta * torch.sigmoid(-self.beta * ratio) / count
        up, down = -pull, pull.clone()
        if self.nll:
            up = up - self.nll / count / _lengths(batch[plus], policy[plus])
        if self.gate is not None:
            sharpness, threshold = self.gate
            typical = (policy[minus] / _lengths(batch[minus], policy[minus])).exp()
            down = down * torch.sigmoid(sharpness * (typical - threshold))
        return {plus: up, minus: down}


def _lengths(examples: Sequence[Example], like: Tensor) -> Tensor:
    return torch.tensor([float(len(e)) for e in examples]).to(like)


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


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    reference: nn.Module | None = None,
    warmup: int = 0,
    max_grad_norm: float | None = 10.0,
    observe: Callable[[int, nn.Module], None] | None = None,
    explain: Container[int] = (),
    probes: Encoded | None = None,
    explained: Callable[[Explained], None] | None = None,
    bar: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> list[float]:
    """Takes one step per batch; dropout is off, as in the paper.

    Args:
        model: Changed in place.
        batches: One mapping of term → examples per update.
        loss: Supervised, Preference, or anything with their two members.
        optimizer: SGD, Adam, AdamW or RMSprop of torch over the model's parameters.
        reference: π_ref of a Preference. None: no loss may need it.
        warmup: Updates of linear warm-up.
        max_grad_norm: The gradient's norm is clipped to it.
        observe: Called with the update's number and the model before it, and after the last.
        explain: Updates that are taken apart; needs `probes`.
        probes: What those are predicted for.
        explained: Called with each of them.
        bar: Wraps the batches in a progress bar.

    Returns:
        Mean −log π of the first term per token, at every update.

    Raises:
        FloatingPointError: If a loss is not finite.

    Cost: one forward and one backward pass per batch; an explained one has a backward pass per
    term, a forward-mode pass over the probes per term, and two probe passes.
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
        every = [example for term in loss.terms for example in batch[term]]
        sizes = [len(batch[term]) for term in loss.terms]
        policy = sequence_log_probs(model, every)
        if not bool(torch.isfinite(policy).all()):
            raise FloatingPointError(f"a log-prob of update {update} is not finite: lower the lr")
        with torch.no_grad():
            fixed = (
                sequence_log_probs(reference, every) if reference is not None else policy.detach()
            )
            now = dict(zip(loss.terms, policy.detach().split(sizes), strict=True))
            then = dict(zip(loss.terms, fixed.split(sizes), strict=True))
            weights = loss.coefficients(now, then, batch)
        first = loss.terms[0]
        losses.append(-float(now[first].sum()) / sum(len(e) for e in batch[first]))
        parts = dict(zip(loss.terms, policy.split(sizes), strict=True))
        taken_apart = update in explain and probes is not None
        gradients: dict[str, Direction] = {}
        if taken_apart:
            for term in loss.terms:
                share = (weights[term] * parts[term]).sum()
                gradients[term] = gradient_of(share, named, retain_graph=True)
        optimizer.zero_grad()
        total = torch.stack([(weights[term] * parts[term]).sum() for term in loss.terms]).sum()
        total.backward()
        if taken_apart and probes is not None:
            whole = {n: p.grad for n, p in named.items() if p.grad is not None}
            step = optimizer_step(optimizer, named, whole, max_grad_norm)
            directions = {term: step.gradient_part(gradients[term]) for term in loss.terms}
            directions |= {
                name: part
                for name, part in (("history", step.history), ("decay", step.decay))
                if part is not None
            }
            predicted = first_order(model, probes.examples, directions)
            before = measure(model, probes).log_prob
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
        optimizer.step()
        schedule.step()
        if taken_apart and explained and probes is not None:
            moved = measure(model, probes).log_prob - before
            explained(Explained(update, directions, predicted, moved))
    optimizer.zero_grad()
    if observe:
        observe(len(batches), model)
    return losses


@dataclass
class Tracker:
    """Measures a probing set every so many updates.

    Attributes:
        probes: The set, P prompts and F types.
        every: Updates between two passes; the last state is measured besides.
        last: Number of updates of the run.
        updates: At which of them it was measured, T.
        found: One Measured each.
        seconds: CPU time of all passes.
    """

    probes: Encoded
    every: int
    last: int
    updates: list[int] = field(default_factory=list)
    found: list[Measured] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, update: int, model: nn.Module) -> None:
        """Measure, if it is time."""
        if update % self.every and update != self.last:
            return
        start = time.process_time()
        self.found.append(measure(model, self.probes))
        self.updates.append(update)
        self.seconds += time.process_time() - start

    def grids(self, name: str, per_token: bool = False) -> np.ndarray:
        """One of Measured's sums over training, (T, P, F); NaN where there is no such response."""
        stacked = [
            self.probes.grid(getattr(m, name) / (m.tokens if per_token else 1)) for m in self.found
        ]
        return torch.stack(stacked).numpy()


def first_order(
    model: nn.Module, examples: Sequence[Example], directions: Mapping[str, Direction]
) -> dict[str, Tensor]:
    """⟨∇ log π(y), Δθ⟩ of every example for every direction: name → (N,) nats, float64.

    Cost: see `batched_shifts`.
    """
    sums = torch.zeros(len(directions), len(examples), dtype=torch.float64)
    for index, shift in batched_shifts(model, examples, list(directions.values())):
        sums[:, index] = shift.realised.double().sum(1).cpu()
    return dict(zip(directions, sums, strict=True))


def influence(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """⟨∇ log π(y_i), ∇ log π(y_j)⟩ of whole responses, (N, N) float64.

    Times η it is what one SGD step on −log π(y_j) does to log π(y_i), to first order.

    Cost: one backward pass and one gradient in memory per example.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return sequence_gram(
        [flat_gradient(own_response(model, e).log_probs.sum(), parameters) for e in examples]
    )


def some_tokens(example: Example, count: int) -> Example:
    """The example with `count` evenly spaced response tokens counted, all if it has fewer."""
    chosen = {round(float(k)) for k in np.linspace(0, len(example.response_ids) - 1, count)}
    if len(example.response_ids) <= count:
        return example
    mask = tuple(k in chosen for k in range(len(example.response_ids)))
    return replace(example, response_mask=mask)


def kernel_norms(
    model: nn.Module,
    updated: Example,
    observed: Mapping[str, Example],
    *,
    lr: float = 1e-5,
    rtol: float = 0.1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """‖K(χo, χu)‖_F, and the paper's LBK and SignDelta of one real SGD step on χu.

    All of the same counted tokens. K is centred, which loses nothing of log π; to first order
    lr² ‖K‖_F² >= LBK (paper App. C.2).

    Args:
        model: A causal LM of transformers.
        updated: χu, learned by plain SGD with this rate; the model stays as it is.
        observed: χo by name.
        lr: η of the step.
        rtol: Wanted relative standard error of ‖K‖_F.
        seed: Of the estimator's probes.

    Returns:
        One row per observed: "norm", "stderr", "lbk_norm" (√LBK / η, on the norm's scale), "sign"
        (SignDelta / η), "realised" (first-order Δ log π / η).

    Cost: one estimate of ‖K‖_F each, see NTK.frobenius; one forward pass each for the rest.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = own_response(model, updated)
    step = gradient_of(SFT(updated, reduction="sum").loss([start.log_probs]), parameters)
    step = {n: -lr * g for n, g in step.items()}
    moved = shifted_copy(model, step)
    rows = []
    with torch.no_grad():
        hot = nn.functional.one_hot(start.targets, start.logits.shape[1])
        residual = start.logits.softmax(-1) - hot
    for name, example in observed.items():
        estimate = ntk(model, example, updated).frobenius(rtol, reduce="all", seed=seed)
        with torch.no_grad():
            before, after = own_response(model, example), own_response(moved, example)
            delta = after.logits.double().log_softmax(-1) - before.logits.double().log_softmax(-1)
        rows.append(
            {
                "observed": name,
                "norm": float(estimate.value),
                "stderr": float(estimate.stderr),
                "lbk_norm": float(lbk(delta, before.logits, residual).sqrt()) / lr,
                "sign": float(sign_delta(delta)) / lr,
                "realised": float((after.log_probs.double() - before.log_probs.double()).sum())
                / lr,
            }
        )
    return rows
