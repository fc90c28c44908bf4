"""The gradients of all sequences of a set, and their Gram.

Gradients are kept where they fit into memory. Elsewhere one is dropped as soon as its pair is read,
and inner products between pairs are estimated from sketches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.engine.gradient import flat_gradient
from lddyn.engine.gram import sequence_gram
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import own_response
from lddyn.sets.access import Access
from lddyn.sets.pairs import Pair, PairSet
from lddyn.sets.readings import Readings, ResponseReading, lbk_of_pair, read_pair
from lddyn.sketches.features import features
from lddyn.sketches.sketch import Sketch

__all__ = ["GradientRows", "Gram", "SetReading", "read_set", "sketched_gram"]


@dataclass(frozen=True)
class Gram:
    """Inner products ⟨g_i, g_j⟩ of all sequences' gradients g = ∇θ log π(y | x).

    Attributes:
        value: (2N, 2N) float64, all chosen first.
        stderr: Standard errors of `value` where gradients were sketched; None where it is exact.
    """

    value: Tensor
    stderr: Tensor | None = None


@dataclass(frozen=True)
class GradientRows:
    """All 2N gradients of a set, (2N, P) float32 on the host."""

    matrix: Tensor

    def gram(self) -> Tensor:
        """J Jᵀ, (2N, 2N) float64."""
        return sequence_gram(self.matrix)


@dataclass(frozen=True)
class SetReading:
    """Results of one pass over a set.

    Attributes:
        readings: Scores from the forward passes.
        mean_chosen: Mean gradient of the chosen responses, (P,).
        within: (2N, 2N) float64: inner products within each pair, 0 elsewhere. With `rows`: all.
        rows: The gradients themselves; None where they do not fit into memory.
    """

    readings: Readings
    mean_chosen: Tensor
    within: Tensor
    rows: GradientRows | None

    def gram(self, pairs: PairSet, estimate: Gram | None = None) -> Gram:
        """The Gram: exact, or `estimate` with the exact inner products within pairs."""
        same = pairs.representatives
        value, stderr = self.within, None
        if estimate is not None and estimate.stderr is not None:
            known = value != 0
            value = torch.where(known, value, estimate.value)
            stderr = estimate.stderr.masked_fill(known, 0.0)[same][:, same]
        return Gram(value[same][:, same], stderr)


def read_set(access: Access, pairs: PairSet, *, keep: bool, progress: bool) -> SetReading:
    """One forward and one backward pass per response.

    Args:
        access: The model.
        pairs: The set.
        keep: Keep all gradients, 2N · P · 4 bytes.
        progress: Show a bar over pairs.

    Cost: the passes, and one push per pair for LBK.
    """
    n = len(pairs)
    log_probs, mean = torch.zeros(2, n, dtype=torch.float64), torch.zeros(access.size)
    within = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
    rows = torch.empty(2 * n, access.size) if keep else None
    facts: dict[str, list[float]] = {}
    token_facts: dict[str, list[Tensor]] = {}
    bar = tqdm(pairs, desc="pairs", disable=not progress, leave=False)
    with evaluating(access.model), torch.enable_grad():
        for i, pair in enumerate(bar):
            gradients, of_pair, of_tokens, own = _read(access, pair)
            log_probs[:, i] = own
            mean += gradients[0] / n
            for name, value in of_pair.items():
                facts.setdefault(name, []).append(value)
            for name, values in of_tokens.items():
                token_facts.setdefault(name, []).append(values)
            if rows is not None:
                rows[i], rows[n + i] = gradients
            else:
                at = torch.tensor([i, n + i])
                within[at[:, None], at] = sequence_gram(gradients)
    kept = None if rows is None else GradientRows(rows)
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in facts.items()}
    readings = Readings(log_probs, tensors, token_facts)
    return SetReading(readings, mean, within if kept is None else kept.gram(), kept)


def _read(
    access: Access, pair: Pair
) -> tuple[list[Tensor], dict[str, float], dict[str, Tensor], Tensor]:
    """Gradients of both responses, scores of the pair and of its tokens, and log π (2,)."""
    gradients, seen = [], []
    for example in pair:
        response = own_response(access.model, example)
        gradients.append(flat_gradient(response.log_probs.sum(), access.parameters))
        seen.append(ResponseReading.of(response))
    facts, token_facts = read_pair(*pair, *seen)
    facts["lbk"] = float("nan")
    if not access.unavailable:
        trace, change = access.push(pair[0], [gradients[1]])
        facts["lbk"] = lbk_of_pair(change[0], trace.logits, seen[1])
    return gradients, facts, token_facts, torch.stack([x.log_probs.sum() for x in seen])


def sketched_gram(
    access: Access, pairs: PairSet, sketch: Sketch, *, memory: int | str, progress: bool
) -> Gram:
    """The Gram estimated from sketched gradients, with standard errors.

    Cost: a second backward pass per response.
    """
    estimate = features(
        access.model, pairs.examples, sketch, by="sequence", memory=memory, progress=progress
    ).gram()
    return Gram(estimate.value.double().cpu(), estimate.stderr.double().cpu())
