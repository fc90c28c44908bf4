"""A watched run in words and curves: log π by response type over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lddyn.files import JsonObject, read_regular, replace_file, unsealed
from lddyn.report.data import Rows
from lddyn.report.page import axis, render, versions
from lddyn.text import printable, signed

__all__ = ["explain_dynamics", "read_dynamics", "write_dynamics"]

Labels = Mapping[str, str]

_CHARTS = {
    "change": ("Change of log π since the start", "nats, mean over prompts"),
    "greedy": ("Confidence: log π of the likeliest tokens", "nats, summed along the response"),
    "entropy": ("Entropy of the predictions", "nats a token"),
}
_LINES = 8  # response types in a chart


def read_dynamics(folder: str | Path) -> list[JsonObject]:
    """Reads the rows that `lddyn.integrations` wrote while it watched a run.

    Args:
        folder: OUTPUT_DIR of the trainer, its lddyn folder, or the file itself.

    Returns:
        One dict per pass over the probes, in the order of "step", without the log-probs of single
        examples.

    Raises:
        FileNotFoundError: If there is no dynamics.jsonl.
        ValueError: If it holds no whole row.
    """
    folder = Path(folder)
    tried = [folder / "dynamics.jsonl", folder / "lddyn" / "dynamics.jsonl"]
    path = folder if folder.is_file() else next((p for p in tried if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder}: no dynamics.jsonl there, nor in its folder lddyn; a watched run writes it "
            "(docs/watch.md)"
        )
    rows = {
        int(row["step"]): {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        for row in read_lines(path)
    }
    if not rows:
        raise ValueError(f"{path}: no row of a watched run in it (a line is a JSON object)")
    return [rows[step] for step in sorted(rows)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a dynamics.jsonl, in their order; a last one that a crash cut is left out.

    Raises:
        ValueError: If another line has changed since it was written.
    """
    *lines, _ = read_regular(path, limit=1 << 32).split(b"\n")
    rows = [unsealed(line, f"{path}: line {i}") for i, line in enumerate(lines, 1)]
    for number, row in enumerate(rows, 1):
        step = row.get("step")
        if not isinstance(step, int | float) or isinstance(step, bool) or abs(step) > 1 << 53:
            raise ValueError(f"{path}: line {number} has no step, got {step!r:.40}")
        if any(isinstance(value, int) and abs(value) > 1 << 53 for value in row.values()):
            raise ValueError(f"{path}: line {number} has a number that is too large")
    return rows


def _series(rows: Rows, what: str) -> dict[str, list[tuple[float, float]]]:
    """Response type -> (step, value), finite ones."""
    kinds = dict.fromkeys(
        k.partition("/")[2] for row in rows for k in row if k.startswith(what + "/")
    )
    series = {}
    for kind in kinds:
        values = [(row["step"], _number(row, f"{what}/{kind}")) for row in rows]
        series[kind] = [(s, v) for s, v in values if math.isfinite(v)]
    return {kind: values for kind, values in series.items() if values}


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)


def _label(kind: str, labels: Labels | None) -> str:
    """A response type in words."""
    return printable((labels or {}).get(kind, kind))


def explain_dynamics(rows: Rows, labels: Labels | None = None) -> list[str]:
    """What a watched run did, in sentences; an empty list for no rows.

    Args:
        rows: `read_dynamics(FOLDER)`.
        labels: Response type -> its name in words. Default: the type itself.
    """
    changes = _series(rows, "change")
    if not changes:
        return []
    names = [k for k in ("chosen", "rejected") if k in changes] or list(changes)[:2]
    lines = [_explain_changes(rows, changes, names)]
    others = [k for k in changes if k not in names and changes[k][-1][1] < 0]
    if others and any(changes[k][-1][1] < 0 for k in names):
        named = ", ".join(f"‘{_label(k, labels)}’ {signed(changes[k][-1][1])}" for k in others[:4])
        lines.append(f"Responses of other kinds fell as well: {named} nats.")
    greedy = _series(rows, "greedy")
    for name in [k for k in names if k in greedy]:
        gained = greedy[name][-1][1] - greedy[name][0][1]
        if changes[name][-1][1] < 0 < gained:
            lines.append(
                f"Along {printable(name)} responses the likeliest tokens gained "
                f"{signed(gained)[1:]} nats while the responses fell: their probability went to "
                "tokens that were likely already (the squeezing effect)."
            )
    return [*lines, *_explain_first_order(rows)]


def _explain_changes(
    rows: Rows, changes: Mapping[str, list[tuple[float, float]]], names: Sequence[str]
) -> str:
    """How far log π of these response types rose or fell, as one sentence."""
    levels, parts = _series(rows, "log_prob"), []
    if all(len(changes[name]) == 1 for name in names):
        first = changes[names[0]][0][0]
        known = [
            f"log π({printable(k)}) = {signed(levels[k][0][1], 4)}" for k in names if k in levels
        ]
        text = f"There is one pass over the probes, at step {first:.0f}: no change is known yet"
        return f"{text}; {' and '.join(known)} nats." if known else f"{text}."
    for number, name in enumerate(names):
        last, change = changes[name][-1]
        highest, top = max(changes[name], key=lambda point: point[1])
        moved = "did not move"
        if abs(change) >= 5e-7:
            moved = f"{'rose' if change > 0 else 'fell'} by {signed(abs(change))[1:]} nats"
        text = f"log π({printable(name)}) {moved}"
        if name in levels:
            ends = [signed(levels[name][k][1], 4) for k in (0, -1)]
            text += f" ({ends[0]} → {ends[1]})"
        if change < 0 and top > 0.05 * -change:
            text += f", after a rise of {signed(top)[1:]} until step {highest:.0f}"
        parts.append(text if number else f"Over {last:.0f} steps of the watched run, {text}")
    return ", and ".join(parts) + "."


def _explain_first_order(rows: Rows) -> list[str]:
    """How well J Δθ predicted what single steps did."""
    first, steps = _series(rows, "first_order"), _series(rows, "step")
    pairs = [(dict(first[k]).get(at), value) for k in steps if k in first for at, value in steps[k]]
    known = [(p, m) for p, m in pairs if p is not None]
    size = sum(abs(m) for _, m in known)
    if not size > 0:
        return []
    error = sum(abs(p - m) for p, m in known) / size
    return [
        "J Δθ, with the optimizer's own step Δθ, predicted the changes that single steps made "
        f"with a relative error of {100 * error:.0f}% ({len(known)} comparisons)."
    ]


def curves(rows: Rows, labels: Labels | None = None) -> list[JsonObject]:
    """The charts, as the template draws them."""
    shown = []
    for what, (title, measure) in _CHARTS.items():
        series = dict(list(_series(rows, what).items())[:_LINES])
        shown.append((what, title, measure, series))
        reach = {kind: max(abs(v) for _, v in values) for kind, values in series.items()}
        far = max(reach, key=lambda kind: reach[kind], default="")
        rest = {kind: values for kind, values in series.items() if kind != far}
        if what == "change" and rest and reach[far] > 4 * max(reach[k] for k in rest):
            shown.append((what, f"The same without {_label(far, labels)}", measure, rest))
    return [_chart(*chart, labels) for chart in shown if any(len(v) > 1 for v in chart[3].values())]


def _chart(
    what: str,
    title: str,
    measure: str,
    series: Mapping[str, list[tuple[float, float]]],
    labels: Labels | None,
) -> JsonObject:
    flat = [point for values in series.values() for point in values]
    x, across = axis([s for s, _ in flat], 44, 286)
    y, upwards = axis([v for _, v in flat], 232, 8, zero=what == "change")
    places, start = list(zip(x, y, strict=True)), 0
    lines: list[JsonObject] = []
    for kind, values in series.items():
        own = places[start : start + len(values)]
        start += len(values)
        lines.append(
            {
                "name": _label(kind, labels),
                "points": " ".join(f"{a},{b}" for a, b in own),
                "end": own[-1],
                "label": own[-1][1],
                "last": signed(values[-1][1]),
                "kind": kind
                if kind in ("chosen", "rejected")
                else f"other-{sum(map(ord, kind)) % 4}",
            }
        )
    least = 8.0  # labels one below the other, each beside its line's end
    for line in sorted(lines, key=lambda line: line["end"][1]):
        line["label"] = least = max(line["end"][1], least)
        least += 13
    return {
        "title": title,
        "measure": measure,
        "x": _unsigned(across),
        "y": upwards if what == "change" else _unsigned(upwards),
        "zero": next((t["at"] for t in upwards if t["text"] == "0"), None),
        "lines": lines,
        "height": max(262, int(least)),
    }


def _unsigned(ticks: list[JsonObject]) -> list[JsonObject]:
    return [t | {"text": t["text"].lstrip("+")} for t in ticks]


def write_dynamics(
    rows: Rows,
    path: str | Path,
    *,
    labels: Labels | None = None,
    title: str = "What training did to its responses",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a watched run as one self-contained HTML page.

    Args:
        rows: `read_dynamics(FOLDER)`, or `LearningDynamicsCallback.rows`.
        path: The file; its folder is made.
        labels: Response type -> its name in words. Default: the type itself.
        title: Heading.
        extra: Facts for the table at the end.

    Returns:
        The path written.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("rows must hold at least one pass over the probes, got none")
    path = Path(path)
    text = render(
        "dynamics.html",
        title=title,
        run=explain_dynamics(rows, labels),
        curves=curves(rows, labels),
        table=_table(rows, labels),
        facts={**(extra or {}), **_cost(rows), "made with": versions()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def _cost(rows: Rows) -> dict[str, str]:
    spent = [v for row in rows if math.isfinite(v := _number(row, "overhead"))]
    return {"watching took": f"{100 * spent[-1]:.1f} % of the time of training"} if spent else {}


def _table(rows: Rows, labels: Labels | None) -> JsonObject:
    """Sums of log-probs by response type; of many passes some, evenly spread."""
    kinds = list(_series(rows, "log_prob"))
    count = min(len(rows), 40)
    kept = [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]
    return {
        "kinds": [_label(k, labels) for k in kinds],
        "rows": [
            {
                "step": int(row["step"]),
                "values": [signed(_number(row, f"log_prob/{k}"), 4) for k in kinds],
            }
            for row in kept
        ],
    }
