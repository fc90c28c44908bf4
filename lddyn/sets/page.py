"""The numbers and texts of a diagnosis' page, from results to plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lddyn.environment import env
from lddyn.files import json_safe, replace_file
from lddyn.probes.probe_set import LABELS
from lddyn.report.data import Rows
from lddyn.report.diagnosis import write_diagnosis_page
from lddyn.sets.diagnosis import Diagnosis
from lddyn.sets.pair_steps import PairStep
from lddyn.sets.saved import write
from lddyn.sets.scores import SCORES
from lddyn.sets.summary import summarise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["page_data", "write_page"]

_MAPPED = 256  # pairs in the map
_LISTED = 500  # pairs in the table
_TOKENS = 800  # coloured tokens of a pair


def write_page(
    diagnosis: Diagnosis,
    path: str | Path,
    *,
    pair_steps: Sequence[PairStep] = (),
    dynamics: Rows = (),
    measured: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a diagnosis as one self-contained HTML page, and its tables as JSON beside it.

    Args:
        diagnosis: The diagnosis.
        path: The file; its folder is made. diagnosis.json and its tensors
            (`Diagnosis.save`) and, with pair steps, tokens.json (`MassFlow.to_dict` and
            `Decomposition.summary` of each) go beside it.
        pair_steps: Steps of some pairs, token by token.
        dynamics: Rows of a watched run, `read_dynamics(FOLDER)`: curves by response type.
        measured: Δ log π(y+) of the training that followed, (N,) nats, for the correlations.
        tokenizer: Makes running text of token ids. Default: token texts are joined.
        extra: Rows of the table at the end (model, data, seconds, …).

    Returns:
        The path written.

    Cost: well under a second for 64 pairs. About 3 kB a pair of two short responses, 500 pairs at
    most, and up to 1 MB for the token tables of three pairs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = page_data(diagnosis, pair_steps, measured, tokenizer)
    write_diagnosis_page(
        data,
        path,
        dynamics=dynamics,
        labels=LABELS,
        environment=env(),
        extra={str(k): str(v) for k, v in (extra or {}).items()},
    )
    later: dict[str, Any] = {}
    if measured is not None:
        later = {"measured": measured.tolist(), "correlations": data["correlations"]}
    write(diagnosis, path.parent / "diagnosis", later)
    if pair_steps:
        rows = [
            {"pair": s.pair, "step": s.decomposition.summary(), "mass": s.flow.to_dict()}
            for s in pair_steps
        ]
        text = json.dumps(json_safe(rows), indent=1, allow_nan=False)
        replace_file(path.parent / "tokens.json", text + "\n")
    return path


def page_data(
    diagnosis: Diagnosis,
    pair_steps: Sequence[PairStep] = (),
    measured: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, as numbers and texts; nats are those of the unit step."""
    step, pairs = diagnosis.step, diagnosis.pairs
    change = step.change * step.unit_lr
    forecast = diagnosis.forecast
    listed = diagnosis.worst(_LISTED)
    return {
        "summary": summarise(diagnosis, pair_steps, measured),
        "names": [pairs.name(i) for i in range(len(pairs))],
        "log_probs": diagnosis.log_probs.mean(1).tolist(),
        "change": json_safe(change.tolist()),
        "run_change": None if forecast is None else json_safe(forecast.change.tolist()),
        "sources": _sources(diagnosis),
        "table": _table(diagnosis, tokenizer),
        "observed": _observed(diagnosis),
        "scores": {
            "pairs": listed,
            "names": list(diagnosis.scores),
            "values": [[_short(float(v[i])) for v in diagnosis.scores.values()] for i in listed],
        },
        "meanings": dict(SCORES),
        "map": _map(diagnosis),
        "pair_steps": [_pair_step(s, diagnosis) for s in pair_steps],
        "correlations": _correlations(diagnosis, measured),
        "validation": diagnosis.validation if measured is None else None,
    }


def _short(value: float) -> float | None:
    """Four digits of a finite number, else None."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _observed(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """`Diagnosis.observed` with nats of the unit step, those that fall most first."""
    unit, name = diagnosis.step.unit_lr, diagnosis.pairs.name
    rows = []
    for row in diagnosis.observed(count=3):
        named = {s: [name(pair) for pair, _ in row[s]] for s in ("lowered_by", "raised_by")}
        scaled = {k: row[k] * unit for k in ("set_change", "stderr")}
        rows.append({**row, **scaled, **named})
    key = "set_change" if diagnosis.forecast is None else "run_change"
    return sorted(rows, key=lambda row: float(row[key]))[:_LISTED]


def _sources(diagnosis: Diagnosis) -> dict[str, dict[str, float]]:
    """Side (chosen, rejected) -> mean nats by the response that is learnt from."""
    n, parts = len(diagnosis), diagnosis.step.sources()
    return {
        side: {name: float(v[at].mean()) for name, v in parts.items()}
        for side, at in (("chosen", slice(0, n)), ("rejected", slice(n, None)))
    }


def _table(diagnosis: Diagnosis, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, Any]]:
    """One row a pair, the most harmful first, as `Diagnosis.actions` has them."""
    n, step, scores = len(diagnosis), diagnosis.step, dict(diagnosis.scores)
    scale = step.unit_lr
    sizes = (scores["norm_chosen"] * scores["norm_rejected"]).clamp(min=1e-300).sqrt()
    in_run = diagnosis.forecast is not None
    columns = {
        "contribution": diagnosis.contribution * (1.0 if in_run else scale),
        "set_chosen": scores["set_chosen"] * scale,
        "set_rejected": scores["set_rejected"] * scale,
        "own_chosen": scores["own_chosen"] * scale / n,
        "cosine": scores["inner"] / sizes,
        "valley": scores["valley"],
    }
    if in_run:
        columns["run_chosen"] = scores["run_chosen"]
    # Effects of other pairs on each pair's y+, and of each pair on theirs: three names each.
    among = (step.effects[:n] * scale / n).clone().fill_diagonal_(0.0)
    lowered_by, lowers = (x.topk(min(3, n), largest=False) for x in (among, among.T))

    def linked(top: Any, i: int) -> list[dict[str, Any]]:
        both = zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
        return [{"pair": j, "name": diagnosis.pairs.name(j), "nats": v} for j, v in both if v < 0]

    rows = []
    for action in diagnosis.actions()[:_LISTED]:
        i = action["pair"]
        rows.append(
            {
                **action,
                "values": json_safe({k: float(v[i]) for k, v in columns.items()}),
                **_texts(diagnosis, i, tokenizer),
                "tokens": _coloured(diagnosis, i),
                "lowered_by": linked(lowered_by, i),
                "lowers": linked(lowers, i),
            }
        )
    return rows


def _texts(
    diagnosis: Diagnosis, pair: int, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The prompt and both responses as running text, with log π and lengths."""

    def text(ids: Sequence[int], tokens: Sequence[str] | None) -> str:
        if tokenizer is not None:
            return str(tokenizer.decode(list(ids)))
        return "".join(tokens) if tokens is not None else " ".join(map(str, ids))

    chosen, rejected = diagnosis.pairs[pair]
    return {
        "prompt": text(chosen.prompt_ids, chosen.prompt_tokens).strip(),
        "responses": [
            {
                "side": side,
                "text": text(example.response_ids, example.tokens).strip(),
                "tokens": len(example),
                "log_prob": float(diagnosis.log_probs[k, pair]),
            }
            for k, (side, example) in enumerate((("chosen", chosen), ("rejected", rejected)))
        ],
    }


def _coloured(diagnosis: Diagnosis, pair: int) -> list[dict[str, Any]]:
    """Tokens of a pair with a close-up: response, text, and contribution in nats."""
    if pair not in diagnosis.close_ups:
        return []
    return [
        {
            "response": row["response"],
            "text": row["text"],
            "nats": row["contribution"] * diagnosis.step.unit_lr,
        }
        for row in diagnosis.tokens(pair)[:_TOKENS]
    ]


def _map(diagnosis: Diagnosis) -> dict[str, Any]:
    """Two pair × pair tables, in an order that puts similar pairs side by side.

    "alike" is the cosine of two pairs' steps, "effect" nats of the row's y+ by the column's pair.
    """
    n, step = len(diagnosis), diagnosis.step
    by_size = step.contribution.abs().argsort(descending=True)
    kept = sorted(by_size[:_MAPPED].tolist())
    up, down = -step.weights
    inner = step.effects[:n] * up[:, None] + step.effects[n:] * down[:, None]
    inner = inner[kept][:, kept]
    size = inner.diagonal().clamp(min=1e-300).sqrt()
    cosine = (inner / size[:, None] / size).nan_to_num().clamp(-1, 1).fill_diagonal_(1.0)
    effect = (step.effects[:n] * (step.unit_lr / n))[kept][:, kept].nan_to_num()
    order = _similar_side_by_side(cosine)

    def strongest(values: Tensor, least: bool) -> list[dict[str, Any]]:
        flat = values.clone().fill_diagonal_(0.0).flatten()
        top = flat.topk(min(6, len(flat)), largest=not least)
        both = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            {"row": kept[at // len(kept)], "column": kept[at % len(kept)], "value": value}
            for at, value in both
            if value * (-1 if least else 1) > 0
        ]

    return {
        "pairs": [kept[i] for i in order],
        "cut": n > len(kept),
        "most_alike": strongest(cosine.triu(), False),
        "largest_decreases": strongest(effect, True),
        "alike": cosine[order][:, order].tolist(),
        "effect": effect[order][:, order].tolist(),
    }


def _similar_side_by_side(cosine: Tensor) -> list[int]:
    """An order of rows by hierarchical clustering."""
    if len(cosine) < 3:
        return list(range(len(cosine)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = squareform((1 - (cosine + cosine.T) / 2).clamp(min=0).numpy(), checks=False)
    return [int(i) for i in leaves_list(linkage(distance, "average", optimal_ordering=True))]


def _pair_step(step: PairStep, diagnosis: Diagnosis) -> dict[str, Any]:
    """One pair's own step: `StepData`, and where the probability of its rejected tokens goes."""
    flow, real = step.flow, step.flow.measured
    moved = {k: getattr(real, k) for k in ("label", "argmax", "top", "rest")}
    order = moved["label"].argsort(stable=True)[:11].tolist()
    return {
        "pair": step.pair,
        "victim": None if step.victim is None else diagnosis.pairs.name(step.victim),
        "step": step.decomposition.to_dict(),
        "total": {k: float(v.sum()) for k, v in moved.items()},
        "positions": len(flow.tokens),
        "flow": [
            {
                "token": flow.tokens[m],
                "star": flow.text_of(int(flow.argmax[m])),
                "before": float(flow.log_probs[m, flow.labels[m]].exp()),
                "moved": {k: float(v[m]) for k, v in moved.items()},
            }
            for m in order
        ],
    }


def _correlations(diagnosis: Diagnosis, measured: Tensor | None) -> list[dict[str, Any]]:
    """Scores with what training did, or else with what other pairs' real steps did."""
    if measured is not None:
        return diagnosis.correlations(measured)
    if diagnosis.validation is None:
        return []
    rows = [{"score": r["score"], **r["others"]} for r in diagnosis.validation["scores"]]
    return sorted(rows, key=lambda row: -abs(row["rho"]))
