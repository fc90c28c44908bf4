"""Training on a copy without the worst pairs, to check a diagnosis."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.engine.gradient import flat_gradient
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import own_response
from lddyn.sets.diagnosis import Diagnosis
from lddyn.stats import spearman


def validate_without(
    model: nn.Module, found: Diagnosis, steps: int, batch: int, progress: bool
) -> dict[str, Any]:
    """Real steps of SGD on batches that no score knows of, each from the model as it is.

    Returns:
        "steps", "batch", "lr" (the largest foretold |Δ log π(y+)| is 0.1 nats); for the pairs of a
        batch ("own") and those outside of it ("others") the relative "error" of what the Gram
        foretells of this batch, and its rank correlation; "scores": rows "score", "own" and
        "others", rank correlations with a pair's mean Δ log π(y+) by its own and by other batches.
    """
    n, generator = len(found), torch.Generator().manual_seed(0)
    batch = min(batch, n // 2)
    rounds = -(-steps * batch // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])
    batches = order[: steps * batch].split(batch)
    w = torch.stack([found.scores["weight_chosen"], found.scores["weight_rejected"]])
    effects = found.gram[:n, :n] * w[0] + found.gram[:n, n:] * w[1]
    foretold = torch.stack([effects[:, at].mean(1) for at in batches])
    largest = float(foretold.abs().max())
    rate = 0.1 / largest if largest else 0.0
    measured, inside = torch.empty_like(foretold), torch.zeros_like(foretold, dtype=torch.bool)
    moved = copy.deepcopy(model)
    pairs = zip(moved.parameters(), model.parameters(), strict=True)
    parts = [(new, old) for new, old in pairs if old.requires_grad]
    own = [new for new, _ in parts]
    with evaluating(moved), torch.enable_grad():
        for row, at in enumerate(tqdm(batches, desc="steps", disable=not progress, leave=False)):
            inside[row, at] = True
            step = torch.zeros(sum(p.numel() for p in own))
            for j in at.tolist():
                for side, example in enumerate(found.pairs[j]):
                    gradient = flat_gradient(own_response(moved, example).log_probs.sum(), own)
                    step += float(w[side, j]) / len(at) * gradient
            with torch.no_grad():
                for p, part in zip(own, step.split([p.numel() for p in own]), strict=True):
                    p.add_(part.view(p.shape).to(p), alpha=rate)
                for i, (chosen, _) in enumerate(found.pairs):
                    after = own_response(moved, chosen).log_probs.double().sum()
                    measured[row, i] = float(after) - found.log_probs[0, i]
                for new, old in parts:
                    new.copy_(old)
    out: dict[str, Any] = {"steps": len(batches), "batch": batch, "lr": rate}
    means = {}
    for name, where in (("own", inside), ("others", ~inside)):
        told, seen = rate * foretold[where], measured[where]
        error = (told - seen).norm() / seen.norm().clamp(min=1e-300)
        out[name] = {"error": float(error), **spearman(told, seen)}
        known = where.any(0)
        means[name] = known, (measured * where).sum(0)[known] / where.sum(0)[known]
    out["scores"] = [
        {"score": score, **{k: spearman(values[at], x) for k, (at, x) in means.items()}}
        for score, values in found.scores.items()
        if bool(values.isfinite().all())
    ]
    return out
