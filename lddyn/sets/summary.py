"""The few numbers that a diagnosis' sentences and advice are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.files import JsonObject, json_safe
from lddyn.text import visible

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis
    from lddyn.sets.forecast import Forecast
    from lddyn.sets.pair_steps import PairStep

__all__ = ["summarise"]

_ALIKE = 0.1  # edit distance below which two responses are nearly the same
_DEEP = 2.0  # nats a token that y− is less likely than y+
_NAMED = 6  # pairs whose numbers are kept; sentences name five
_EXPLAINED = 0.5  # most that the parts of pairs may leave over of a forecast, by norms
_IDLE = 0.05  # part of the largest weight below which a pair moves nothing


def summarise(
    diagnosis: Diagnosis,
    pair_steps: Sequence[PairStep] = (),
    measured: Tensor | None = None,
) -> dict[str, Any]:
    """The numbers of a diagnosis, JSON-safe; `lddyn.report.explain_diagnosis` puts them in words.

    Args:
        diagnosis: The diagnosis.
        pair_steps: Steps of some pairs, for where the probability goes.
        measured: Δ log π(y+) of the training that followed, (N,) nats.
    """
    step = diagnosis.step
    summary = {
        "objective": step.loss.name,
        "parameters": step.loss.parameters,
        "pairs": len(step),
        "noun": step.pairs.noun,
        "unit_lr": step.unit_lr,
        "exact": step.gram.stderr is None,
        "uncertain": _uncertain(diagnosis),
        "step": _step(diagnosis),
        "own_step": _own_step(diagnosis),
        "run": None if diagnosis.forecast is None else diagnosis.forecast.summary(),
        "harm": _harm(diagnosis),
        "tokens": _tokens(diagnosis),
        "deepest": _deepest(diagnosis),
        "mass": _mass(diagnosis, pair_steps),
        "losses": diagnosis.objectives(),
        "audit": _audit(diagnosis),
        "validation": _validation(diagnosis),
        "measured": None if measured is None else _measured(diagnosis, measured),
        "unavailable": diagnosis.unavailable,
        "reference": _reference(diagnosis),
        "remarks": list(step.remarks),
    }
    return dict(json_safe(summary))


def _reference(diagnosis: Diagnosis) -> JsonObject | None:
    """What the reference is, and where policy and reference stand before the step, in nats."""
    step = diagnosis.step
    if not step.loss.needs_reference:
        return None
    gains = step.readings.log_probs - step.reference
    return {
        "name": step.reference_name,
        "margin": float((gains[0] - gains[1]).mean()),
        "distance": float(gains.abs().max()),
    }


def _uncertain(diagnosis: Diagnosis) -> int | None:
    """Pairs whose chosen response may rise or fall, within two standard errors."""
    error = diagnosis.set_stderr()
    if error is None:
        return None
    return int((diagnosis.step.change[0].abs() < 2 * error[0]).sum())


def _step(diagnosis: Diagnosis) -> dict[str, Any]:
    """Means over pairs, in nats of the unit step; what moves y+; how many fall."""
    step, n = diagnosis.step, len(diagnosis)
    up, down = step.change
    falls = up < 0
    parts = {name: v[:n] for name, v in step.sources().items()}
    strongest, times = step.strongest_source() if bool(falls.any()) else ("", 0)
    return {
        "chosen": float(up.mean()) * step.unit_lr,
        "rejected": float(down.mean()) * step.unit_lr,
        "chosen_falls": int(falls.sum()),
        "both_fall": int((falls & (down < 0)).sum()),
        "sources": {k: float(v.mean()) for k, v in parts.items()},
        "sources_where_falling": {k: float(v[falls].mean()) for k, v in parts.items()},
        "strongest": strongest,
        "strongest_in": times,
    }


def _own_step(diagnosis: Diagnosis) -> dict[str, Any]:
    """What pairs do to themselves."""
    step = diagnosis.step
    return {
        "chosen_falls": int((step.scores["own_chosen"] < 0).sum()),
        "entangled": len(step.entangled),
        "entangled_pairs": [step.pairs.name(i) for i in step.entangled[:_NAMED]],
        "past_target": int((step.weights[0] > 0).sum()),
    }


def _harm(diagnosis: Diagnosis) -> dict[str, Any]:
    """Pairs that lower the mean log π(y+) of all pairs, and what leaving the worst out does."""
    contribution, n = diagnosis.contribution, len(diagnosis)
    harmful = contribution[contribution < 0]
    if not len(harmful):
        return {
            "pairs": 0,
            "worst": 0,
            "worst_pairs": [],
            "part": 0.0,
            "heavy": False,
            "without": None,
        }
    top = diagnosis.worst(min(max(1, n // 10), len(harmful)))
    helpful = float(contribution[contribution > 0].sum())
    without = None
    if diagnosis.forecast is not None:
        without = _without(diagnosis, diagnosis.forecast, top)
    return {
        "pairs": len(harmful),
        "worst": len(top),
        "worst_pairs": [diagnosis.pairs.name(i) for i in top[:_NAMED]],
        "part": float(contribution[top].sum() / harmful.sum()),
        "heavy": float(-harmful.sum()) > 0.25 * helpful,
        "without": without,
    }


def _without(diagnosis: Diagnosis, forecast: Forecast, pairs: Sequence[int]) -> dict[str, Any]:
    """Mean predicted Δ log π(y+) of the run without these pairs, and with pair weights, nats.

    Both are sums of the pairs' parts of the forecast. "adds_up" says whether these parts explain
    it: else both are None.
    """
    left_over = 0.0
    if forecast.left_over is not None:
        left_over = float(forecast.left_over.norm() / forecast.change[0].norm().clamp(min=1e-300))
    if left_over > _EXPLAINED:
        return {"adds_up": False, "dropped": None, "reweighted": None}
    kept = torch.ones(len(diagnosis))
    kept[list(pairs)] = 0.0
    dropped, reweighted = map(forecast.weighted, (kept, diagnosis.pair_weights()))
    return {
        "adds_up": True,
        "dropped": float(dropped.mean()),
        "reweighted": float(reweighted.mean()),
    }


def _tokens(diagnosis: Diagnosis) -> dict[str, Any] | None:
    """Tokens of the most harmful pairs, by their part of the decrease in the first step."""
    seen = [i for i in diagnosis.worst() if i in diagnosis.close_ups]
    pairs = [i for i in seen if float(diagnosis.contribution[i]) < 0]
    rows = [row for i in pairs for row in diagnosis.tokens(i) if row["contribution"] < 0]
    total = sum(row["contribution"] for row in rows)
    if not total:
        return None
    parts: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["response"], visible(row["text"], 24))
        parts[key] = parts.get(key, 0.0) + row["contribution"] / total
    top = sorted(parts, key=lambda key: -parts[key])[:6]
    return {
        "pairs": [diagnosis.pairs.name(i) for i in pairs[:_NAMED]],
        "top": [{"response": s, "text": t, "part": parts[s, t]} for s, t in top],
    }


def _deepest(diagnosis: Diagnosis) -> dict[str, Any] | None:
    """The chosen response that falls most, and the tokens of other pairs that lower it most."""
    pair = diagnosis.falling(1)[0]
    if float(diagnosis.step.change[0, pair]) >= 0 or pair not in diagnosis.close_ups:
        return None
    tokens = [
        {
            "text": visible(row["text"], 24),
            "response": row["response"],
            "pair": diagnosis.pairs.name(row["pair"]),
        }
        for row in diagnosis.culprit_tokens(pair)[:3]
        if row["effect"] < 0
    ]
    return {"pair": diagnosis.pairs.name(pair), "tokens": tokens} if tokens else None


def _mass(diagnosis: Diagnosis, pair_steps: Sequence[PairStep]) -> dict[str, Any] | None:
    """Where the probability goes that rejected tokens lose: measured, or of each softmax alone."""
    flows = [s.flow.summary()["measured"] for s in pair_steps]
    lost = -sum(flow["label"] for flow in flows)
    if lost <= 0:
        part = float(diagnosis.scores["squeeze"].nanmean())
        return {"measured": False, "argmax": part} if math.isfinite(part) else None
    receivers = Counter(
        visible(s.flow.text_of(int(i)), 24)
        for s in pair_steps
        for i, gain in zip(s.flow.argmax, s.flow.measured.argmax, strict=True)
        if float(gain) > 0
    )
    parts = {k: sum(flow[k] for flow in flows) / lost for k in ("argmax", "top", "rest")}
    return {
        "measured": True,
        **parts,
        "receivers": [text for text, _ in receivers.most_common(3)],
        "positions": sum(len(s.flow.labels) for s in pair_steps),
        "responses": len(pair_steps),
    }


def _audit(diagnosis: Diagnosis) -> dict[str, Any]:
    """What to look at before training: pairs that are nearly equal, deep in a valley, or idle."""
    scores, pairs = diagnosis.scores, diagnosis.pairs
    alike = torch.nonzero(scores["edit_distance"] < _ALIKE).flatten().tolist()
    per_token = scores["log_prob_chosen"] / pairs.lengths[0]
    size = diagnosis.step.weights.abs().sum(0)
    return {
        "alike": len(alike),
        "alike_pairs": [pairs.name(i) for i in alike[:_NAMED]],
        "deep": int((scores["valley"] < per_token - _DEEP).sum()),
        "idle": int((size < _IDLE * size.max()).sum()),
    }


def _validation(diagnosis: Diagnosis) -> dict[str, Any] | None:
    if diagnosis.validation is None:
        return None
    own, others = (diagnosis.validation[k]["error"] for k in ("own", "others"))
    return {"steps": diagnosis.validation["steps"], "own": own, "others": others}


def _measured(diagnosis: Diagnosis, measured: Tensor) -> dict[str, Any]:
    rows = diagnosis.correlations(measured)
    row = next((r for r in rows if r["score"] == "set_chosen"), None)
    ranking = None if row is None else {k: row[k] for k in ("rho", "low", "high")}
    return {"chosen": float(measured.double().mean()), "ranking": ranking}
