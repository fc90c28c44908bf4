"""Predicting a run with the model: Adam's diagonal at the start, the net step through the softmax.

This is the only part of a forecast that needs gradients; the run itself is `simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.engine.gradient import flatten, gradient_of_logits
from lddyn.engine.gram import sequence_gram
from lddyn.sets.access import Access
from lddyn.sets.forecast import AdamMetric, Forecast, Run, simulate
from lddyn.sets.rows import GradientRows
from lddyn.sets.step import SetStep

__all__ = ["Preconditioner", "predict_run"]

_COLUMNS = 1 << 18  # of gradients in one product


@dataclass(frozen=True)
class Preconditioner:
    """Adam's diagonal P = 1/(√v + ε) at the start.

    Attributes:
        diagonal: (P,) float32.
        metric: J P Jᵀ and Σ v.
    """

    diagonal: Tensor
    metric: AdamMetric

    @classmethod
    def of(cls, rows: GradientRows, step: SetStep, batch: int) -> Preconditioner:
        """Computes P = 1/(√v + ε) at the start.

        v is the expected squared gradient of a batch B of the loss: E[g]² + Var[g]/|B|, mean and
        variance over pairs, for each parameter.

        Args:
            rows: Gradients of all sequences.
            step: One small step on the set; its weights ∂L/∂ log π turn gradients of log π into
                gradients of the loss.
            batch: |B|, pairs in a batch.
        """
        matrix, n = rows.matrix, len(step)
        up, down = (-step.weights).float()[:, :, None]
        diagonal = torch.empty(matrix.shape[1])
        total = 0.0
        for start in range(0, matrix.shape[1], _COLUMNS):
            at = slice(start, start + _COLUMNS)
            part = matrix[:, at]
            pulls = up * part[:n] + down * part[n:]
            mean = pulls.mean(0).square()
            v = mean + (pulls.square().mean(0) - mean).clamp(min=0) / batch
            total += float(v.sum(dtype=torch.float64))
            diagonal[at] = 1 / (v.sqrt() + 1e-8)
        return cls(diagonal, AdamMetric(sequence_gram(matrix, diagonal), total))


def predict_run(
    access: Access, rows: GradientRows, step: SetStep, run: Run, *, progress: bool
) -> tuple[Forecast, AdamMetric | None]:
    """Predicts a run: first as a linear model in log π, then its net step through the softmax.

    Returns:
        The forecast, and Adam's metric at the start (None for SGD).

    Raises:
        UnsupportedModelError: If the model cannot be pushed through.

    Cost: the simulation; for every pair two pushes and one backward pass.
    """
    preconditioner = None
    if run.optimizer == "adamw":
        preconditioner = Preconditioner.of(rows, step, run.batch)
    metric = None if preconditioner is None else preconditioner.metric
    linear = simulate(
        step.gram.value,
        metric,
        step.readings.log_probs,
        step.weights_at,
        run,
        range(len(step)),
        torch.ones(len(step)).double(),
    )
    diagonal = None if preconditioner is None else preconditioner.diagonal
    return _through_softmax(access, rows, diagonal, step, linear, progress), metric


def _through_softmax(
    access: Access,
    rows: GradientRows,
    diagonal: Tensor | None,
    step: SetStep,
    forecast: Forecast,
    progress: bool,
) -> Forecast:
    """The forecast with its net step in all logits, and every y+ divided among pairs."""
    n, net = len(step), forecast.coefficients

    def preconditioned(flat: Tensor) -> Tensor:
        return flat if diagonal is None else flat * diagonal

    direction = preconditioned(net.flatten().float() @ rows.matrix)
    change, effects = torch.zeros(2, n).double(), torch.zeros(n, n).double()
    for i, pair in enumerate(tqdm(step.pairs, desc="run", disable=not progress, leave=False)):
        for side, example in enumerate(pair):
            trace, moved = access.push(example, [direction])
            before = trace.logits.double().log_softmax(-1)
            at = trace.targets[:, None]
            halfway, after = ((before + s * moved[0]).log_softmax(-1) for s in (0.5, 1.0))
            change[side, i] = (after - before).gather(1, at).sum()
            if side == 0:
                # Simpson's rule for the mean of ∇ log π(y+) on logits that move evenly.
                mean = (before.exp() + 4 * halfway.exp() + after.exp()) / 6
                cotangents = (-mean).scatter_add(1, at, torch.ones_like(mean))
                gradient = gradient_of_logits(access.anatomy, example, cotangents)
                flat = flatten(gradient)
                inner = (rows.matrix @ preconditioned(flat)).double().view(2, n)
                effects[i] = (net * inner).sum(0)
    return replace(forecast, change=change, effects=effects, curved=True)
