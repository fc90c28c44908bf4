"""A diagnosis as a page: why the chosen log-probs fall, which pairs and tokens do it, what to do.

All numbers but measured ones are first order, in nats of the unit step: the step that moves the
margins log π(y+) − log π(y−) by one nat on average. In it objectives and learning rates compare.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lddyn.files import JsonObject, replace_file
from lddyn.report.advice import warnings
from lddyn.report.data import Rows
from lddyn.report.dynamics import Labels, curves, explain_dynamics
from lddyn.report.explain import SOURCES, explain_diagnosis
from lddyn.report.glossary import OF_PAIRS
from lddyn.report.page import axis, installation, render, versions, word
from lddyn.report.step import token_tables
from lddyn.report.words import count, distinct, named, true_minus
from lddyn.text import readable, signed, visible

__all__ = ["write_diagnosis_page"]

Data = Mapping[str, Any]  # what `lddyn.sets.page.page_data` returns

_PROMPT, _RESPONSE = 600, 1200  # characters of a text in the table

# Score -> heading of the table's column, and what it says.
_COLUMNS = {
    "contribution": (
        "effect on all y+",
        "what this pair's part of the step does to log π(y+), mean over all pairs",
    ),
    "run_chosen": ("run Δ y+", "predicted change of log π(y+) by the planned run"),
    "set_chosen": ("Δ y+", "what the step on the whole set does to log π(y+) of this pair"),
    "set_rejected": ("Δ y−", "what the step on the whole set does to log π(y−) of this pair"),
    "own_chosen": ("own Δ y+", "what this pair's own part of the step does to its log π(y+)"),
    "cosine": ("cos(g+, g−)", "how alike the gradients of y+ and y− are: 1 is the same direction"),
    "valley": ("y− per token", "mean log π of a token of y−: the lower, the less likely y− is"),
}


def write_diagnosis_page(
    data: Data,
    path: str | Path,
    *,
    dynamics: Rows = (),
    labels: Labels | None = None,
    environment: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Writes a diagnosis as one self-contained HTML page.

    Args:
        data: Numbers and texts of the diagnosis.
        path: The file; its folder is made.
        dynamics: Rows of a watched run, `read_dynamics(FOLDER)`: curves by response type.
        labels: Response type of the watched run -> its name in words.
        environment: `lddyn.env()`, for the last table.
        extra: Rows of the table of facts at the end.

    Returns:
        The path written.
    """
    summary = data["summary"]
    falls = bool(dynamics) or summary["step"]["chosen_falls"] > 0
    correlations = _correlations(data)
    facts = {k: readable(v) for k, v in (extra or {}).items()}
    text = render(
        "diagnosis.html",
        title="Why do the chosen log-probs fall?" if falls else "Do the chosen log-probs fall?",
        subtitle=f"{count(summary['pairs'])}, {summary['objective']}"
        + "".join(f", {k} = {v:g}" for k, v in summary["parameters"].items()),
        sentences=explain_diagnosis(summary, dynamics, labels),
        warnings=warnings(summary),
        lr=f"{summary['unit_lr']:.3g}",
        noun=summary["noun"],
        step=_points(data, data["change"]),
        sources=_bars(data["sources"]),
        curves=curves(dynamics, labels),
        watched=explain_dynamics(dynamics, labels),
        table=_table(data),
        columns=_columns(data),
        ahead=None if data["run_change"] is None else _points(data, data["run_change"]),
        segments=(summary["run"] or {}).get("segments", 0),
        glossary=OF_PAIRS,
        observed=_observed(data),
        harm=summary["harm"]["pairs"] > 0,
        map=_map(data),
        pair_steps=[_pair_step(i, s, data) for i, s in enumerate(data["pair_steps"])],
        objectives=_objectives(summary),
        correlations=correlations,
        validation=data["validation"],
        meanings=data["meanings"],
        scores={**data["scores"], "meanings": data["meanings"]},
        exact=summary["exact"],
        facts=facts | {"made with": versions()},
        installation=installation(environment or {}),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def _observed(data: Data) -> list[JsonObject]:
    """Rows of the table of observed responses, as texts."""
    rows = []
    for row in data["observed"]:
        error = f" ± {row['stderr']:.2g}" if row["stderr"] else ""
        changes = [(signed(row["set_change"], 2) + error, word(row["set_change"]))]
        if "run_change" in row:
            changes.append((signed(row["run_change"], 2), word(row["run_change"])))
        rows.append(
            {
                "name": row["name"],
                "log_prob": signed(row["log_prob"], 2),
                "changes": changes,
                "lowered": ", ".join(map(str, row["lowered_by"])),
                "raised": ", ".join(map(str, row["raised_by"])),
            }
        )
    return rows


def _points(data: Data, change: Sequence[Sequence[float | None]]) -> JsonObject:
    """Each pair as a point, Δ log π(y−) across and Δ log π(y+) up; and the means."""
    both = zip(data["names"], *change, strict=True)
    shown = [
        (i, name, up, down)
        for i, (name, up, down) in enumerate(both)
        if up is not None and down is not None
    ]
    x, across = axis([down for *_, down in shown], 44, 392)
    y, upwards = axis([up for _, _, up, _ in shown], 262, 8)
    zero = [next(t["at"] for t in ticks if t["text"] == "0") for ticks in (across, upwards)]
    points = [
        {
            "x": a,
            "y": b,
            "sign": word(up),
            "pair": i,
            "row": name,
            "text": f"y+ {signed(up, 2)}, y− {signed(down, 2)} nats",
        }
        for (i, name, up, down), a, b in zip(shown, x, y, strict=True)
    ]
    return {
        "points": points,
        "x": across,
        "y": upwards,
        "zero": zero,
        "falls": sum(up < 0 for _, _, up, _ in shown),
        "means": [
            _mean(name, before, [p[k] for p in shown])
            for name, before, k in zip(("y+", "y−"), data["log_probs"], (2, 3), strict=True)
        ],
    }


def _mean(name: str, before: float, changes: Sequence[float]) -> JsonObject:
    mean = sum(changes) / max(len(changes), 1)
    return {
        "name": name,
        "before": signed(before, 4),
        "after": signed(before + mean, 4),
        "change": signed(mean, 2),
        "sign": word(mean),
    }


def _bars(sources: Mapping[str, Mapping[str, float]]) -> list[JsonObject]:
    """Mean Δ log π of y+ and of y−, by the responses that cause it."""
    shown = []
    for name, side in (("y+", "chosen"), ("y−", "rejected")):
        means = sources[side]
        largest = max([abs(v) for v in means.values()] + [1e-300])
        rows = [
            {
                "name": SOURCES[k].replace("their own", "its own"),
                "nats": signed(v, 2),
                "sign": word(v),
                "share": 100 * abs(v) / largest,
            }
            for k, v in means.items()
        ]
        shown.append({"name": name, "total": signed(sum(means.values()), 2), "rows": rows})
    return shown


def _columns(data: Data) -> dict[str, tuple[str, str]]:
    """Headings of the table; what the run does is among them where one was predicted."""
    run = data["run_change"] is not None
    return {k: v for k, v in _COLUMNS.items() if run or k != "run_chosen"}


def _table(data: Data) -> list[JsonObject]:
    """One row a pair, the most harmful first."""
    return [_row(rank, row, data) for rank, row in enumerate(data["table"])]


def _row(rank: int, row: Mapping[str, Any], data: Data) -> JsonObject:
    values = {k: row["values"][k] for k in _columns(data)}
    values = {k: math.nan if v is None else v for k, v in values.items()}
    changes = (values["set_chosen"], values["set_rejected"])
    prompt = row["prompt"]
    if len(prompt) > _PROMPT:
        prompt = "…" + prompt[-_PROMPT:]
    coloured = _coloured(row["tokens"])
    return {
        "rank": rank + 1,
        "pair": row["pair"],
        "row": data["names"][row["pair"]],
        "outcome": [word(v) for v in changes],
        "action": row["action"],
        "weight": f"{row['weight']:.2f}",
        "why": row["why"],
        "values": [
            {
                "name": k,
                "value": v if math.isfinite(v) else 0.0,
                "text": signed(v, 2),
                "sign": "" if k in ("cosine", "valley") else word(v),
            }
            for k, v in values.items()
        ],
        "prompt": readable(prompt),
        "responses": [
            {
                "name": f"{r['side']} {sign}",
                "text": readable(r["text"], _RESPONSE),
                "tokens": coloured.get(r["side"], []),
                "moves": f"log π {signed(r['log_prob'], 4)} → "
                f"{signed(r['log_prob'] + change, 4)} nats, {count(r['tokens'], 'token')}",
            }
            for r, sign, change in zip(row["responses"], ("y+", "y−"), changes, strict=True)
        ],
        "links": [
            {
                "name": name,
                "to": [
                    {"pair": j["pair"], "row": j["name"], "nats": signed(j["nats"], 2)}
                    for j in row[key]
                ],
            }
            for key, name in (
                ("lowered_by", "its y+ is lowered most by"),
                ("lowers", "it lowers most the y+ of"),
            )
        ],
    }


def _coloured(tokens: Sequence[Mapping[str, Any]]) -> dict[str, list[JsonObject]]:
    """Response -> its tokens, coloured by their contribution to the chosen responses of all."""
    largest = max([abs(t["nats"]) for t in tokens] + [1e-300])
    shown: dict[str, list[JsonObject]] = {}
    for token in tokens:
        nats = token["nats"]
        shown.setdefault(token["response"], []).append(
            {
                "text": visible(token["text"]),
                "sign": word(nats),
                "shade": f"{0.6 * (abs(nats) / largest) ** 0.5:.2f}",
                "nats": signed(nats, 2),
            }
        )
    return shown


def _map(data: Data) -> JsonObject:
    """The pair × pair tables as bytes, and their largest entries."""
    table, names = data["map"], data["names"]

    def packed(values: Sequence[Sequence[float]], largest: float) -> JsonObject:
        cells = np.clip(np.round(np.asarray(values) / largest * 127), -127, 127).astype(np.int8)
        return {"cells": base64.b64encode(cells.tobytes()).decode(), "largest": largest}

    def listed(rows: Sequence[Mapping[str, Any]]) -> list[JsonObject]:
        return [
            {
                "row": names[r["row"]],
                "pair": r["row"],
                "other": names[r["column"]],
                "text": signed(r["value"], 2),
            }
            for r in rows
        ]

    largest = float(f"{float(np.abs(table['effect']).max()) or 1.0:.3g}")
    return {
        "pairs": table["pairs"],
        "rows": [names[i] for i in table["pairs"]],
        "cut": table["cut"],
        "alike": listed(table["most_alike"]),
        "decreases": listed(table["largest_decreases"]),
        "views": [
            {"name": "alike", **packed(table["alike"], 1.0)},
            {"name": "effect", **packed(table["effect"], largest)},
        ],
    }


def _pair_step(number: int, pair_step: Mapping[str, Any], data: Data) -> JsonObject:
    """A pair's own step: its token tables, and bars of where the probability goes."""
    names = {"chosen": "its own y+", "rejected": "its own y−"}
    if pair_step["victim"] is not None:
        victim = named([pair_step["victim"]], data["summary"]["noun"])
        names["victim"] = f"y+ of {victim}, which it lowers most"
    tokens = token_tables(pair_step["step"])
    for observed, response in zip(pair_step["step"]["observed"], tokens["responses"], strict=True):
        response["name"] = names[observed["name"]]
    return {
        "number": number,
        "row": data["names"][pair_step["pair"]],
        "tokens": tokens,
        "names": [response["name"] for response in tokens["responses"]],
        "total": _flow_bars(pair_step["total"]),
        "flow": [
            {
                "token": visible(position["token"], 18),
                "star": visible(position["star"], 18),
                "before": f"{position['before']:.2g}",
                "bars": _flow_bars(position["moved"]),
            }
            for position in pair_step["flow"]
        ],
        "positions": pair_step["positions"],
    }


def _flow_bars(moved: Mapping[str, float]) -> list[JsonObject]:
    names = {"label": "the token", "argmax": "likeliest other", "top": "next nine", "rest": "rest"}
    largest = max([abs(v) for v in moved.values()] + [1e-300])
    return [
        {"name": names[k], "nats": signed(v, 2), "sign": word(v), "share": 100 * abs(v) / largest}
        for k, v in moved.items()
    ]


def _objectives(summary: Mapping[str, Any]) -> list[JsonObject]:
    """Losses, those that lower the fewest chosen responses first; equal steps are one row."""
    rows = summary["losses"]
    largest = {k: max([abs(r[k]) for r in rows] + [1e-300]) for k in ("chosen", "rejected")}
    return [
        {
            **row,
            "name": " = ".join([row["objective"], *row["alike"]]),
            "mine": summary["objective"] in (row["objective"], *row["alike"]),
            "bars": [
                {"sign": word(row[k]), "text": signed(row[k], 2), "share": 100 * abs(row[k]) / most}
                for k, most in largest.items()
            ],
        }
        for row in sorted(distinct(rows), key=lambda r: (r["chosen_falls"], -r["chosen"]))
    ]


def _correlations(data: Data) -> list[JsonObject]:
    """Rank correlations with their intervals; scores that do not vary are left out."""

    def shown(value: float) -> str:
        return true_minus(f"{value:+.2f}")

    return [
        {
            **row,
            "what": data["meanings"][row["score"]],
            "value": shown(row["rho"]),
            "sign": word(row["rho"]),
            "ends": f"{shown(row['low'])} to {shown(row['high'])}",
        }
        for row in data["correlations"]
        if row["low"] < row["high"]
    ]
