"""Real steps of SGD on a copy of the model: what each score is worth on this set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.engine.door import copied
from lddyn.engine.gradient import flat_gradient
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import own_response
from lddyn.engine.turns import switching
from lddyn.ranks import ALONE, Ranks
from lddyn.sets.step import SetStep
from lddyn.stats import spearman

__all__ = ["validate"]


def validate(
    model: nn.Module,
    step: SetStep,
    scores: Mapping[str, Tensor],
    *,
    steps: int,
    batch: int,
    progress: bool,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Compares scores with real steps of SGD on random batches, each from the model as it is.

    Args:
        model: Copied; not changed.
        step: The set.
        scores: Name -> (N,), taken without these steps.
        steps: Number of real steps.
        batch: Pairs in a batch, at most half of the set.
        progress: Show a bar.
        ranks: Processes that divide the steps.

    Returns:
        "steps", "batch", "lr" (the largest predicted |Δ log π(y+)| is 0.1 nats); for the pairs of a
        batch ("own") and those outside of it ("others") the relative "error" of the Gram's
        prediction for this batch, and its rank correlation; "scores": rows "score", "own" and
        "others", rank correlations with a pair's mean Δ log π(y+) by its own and by other batches.

    Cost: per step a backward pass for each response of the batch and a forward pass for each y+.
    """
    n, generator = len(step), torch.Generator().manual_seed(0)
    batch = min(batch, n // 2)
    rounds = -(-steps * batch // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])
    batches = order[: steps * batch].split(batch)
    predicted = torch.stack([step.effects[:n, at].mean(1) for at in batches])
    largest = float(predicted.abs().max())
    lr = 0.1 / largest if largest else 0.0
    measured = _take_steps(model, step, batches, lr, progress, ranks)
    inside = torch.zeros_like(predicted, dtype=torch.bool)
    for row, at in enumerate(batches):
        inside[row, at] = True
    out: dict[str, Any] = {"steps": len(batches), "batch": batch, "lr": lr}
    means = {}
    for name, where in (("own", inside), ("others", ~inside)):
        expected, seen = lr * predicted[where], measured[where]
        error = (expected - seen).norm() / seen.norm().clamp(min=1e-300)
        out[name] = {"error": float(error), **spearman(expected, seen)}
        known = where.any(0)
        means[name] = known, (measured * where).sum(0)[known] / where.sum(0)[known]
    out["scores"] = [
        {"score": score, **{k: spearman(values[at], x) for k, (at, x) in means.items()}}
        for score, values in scores.items()
        if bool(values.isfinite().all())
    ]
    return out


def _take_steps(
    model: nn.Module,
    step: SetStep,
    batches: Sequence[Tensor],
    lr: float,
    progress: bool,
    ranks: Ranks,
) -> Tensor:
    """Measured Δ log π(y+) of all pairs by a step on each batch, (batches, N) nats."""
    measured = torch.zeros(len(batches), len(step), dtype=torch.float64)
    moved = copied(model)
    pairs = zip(moved.parameters(), model.parameters(), strict=True)
    parts = [(new, old) for new, old in pairs if old.requires_grad]
    own = [new for new, _ in parts]
    sizes = [p.numel() for p in own]
    pull = -step.weights
    with switching(moved, moves=True), evaluating(moved), torch.enable_grad():
        before = [own_response(moved, chosen).log_probs.detach() for chosen, _ in step.pairs]
        mine = ranks.share(list(enumerate(batches)))
        for row, at in tqdm(mine, desc="steps", disable=not progress, leave=False):
            direction = torch.zeros(sum(sizes))
            for j in at.tolist():
                for side, example in enumerate(step.pairs[j]):
                    gradient = flat_gradient(own_response(moved, example).log_probs.sum(), own)
                    direction += float(pull[side, j]) / len(at) * gradient
            with torch.no_grad():
                for p, part in zip(own, direction.split(sizes), strict=True):
                    p.add_(part.view(p.shape).to(p), alpha=lr)
                for i, (chosen, _) in enumerate(step.pairs):
                    after = own_response(moved, chosen).log_probs
                    measured[row, i] = float((after.double() - before[i].double()).sum())
                for new, old in parts:
                    new.copy_(old)
    ranks.add_up(measured)
    return measured
