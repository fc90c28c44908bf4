"""A diagnosis of single sequences, in sentences and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lddyn.files import JsonObject, replace_file
from lddyn.report.explain import Sentence
from lddyn.report.glossary import OF_SEQUENCES
from lddyn.report.page import installation, render, versions, word
from lddyn.text import readable, signed

__all__ = ["SOURCES", "explain_sequences", "write_sequences_page"]

Summary = Mapping[str, Any]  # `SequenceDiagnosis.summary()`

_TEXT, _LISTED = 900, 500  # characters of a text, and rows of the table

# Source of change -> what it is.
SOURCES = {
    "own": "the response itself",
    "raised, same prompt": "other responses to its prompt that the loss raises",
    "lowered, same prompt": "other responses to its prompt that the loss lowers",
    "other prompts": "responses to other prompts",
}


def explain_sequences(summary: Summary) -> list[Sentence]:
    """What training does to the sequences of a set, and which of them do it.

    Args:
        summary: `SequenceDiagnosis.summary()`.
    """
    kind = "exact" if summary["exact"] else "estimate"
    sure = "exact, first order" if summary["exact"] else "estimated from sketched gradients"
    if not summary["unit_lr"]:
        text = (
            "No step of this objective moves any sequence: all its weights or gradients are zero."
        )
        return [Sentence(about="the answer", text=text, sure=sure, kind=kind), *_remarks(summary)]
    said = [Sentence(about="the answer", text=_answer(summary), sure=sure, kind=kind)]
    if summary["run"] is not None:
        sure, kind = "predicted; trust the order of sequences more than the level", "estimate"
        said.append(Sentence(about="the run", text=_run(summary), sure=sure, kind=kind))
    said.append(Sentence(about="what moves them", text=_sources(summary), sure=sure, kind=kind))
    said.append(Sentence(about="who does it", text=_harm(summary), sure=sure, kind=kind))
    return said + _remarks(summary)


def _answer(summary: Summary) -> str:
    """How many sequences move against the loss in a small step."""
    parts = []
    if summary["raised"]:
        parts.append(
            f"lowers log π of {summary['raised_falls']} of the {summary['raised']} sequences that "
            f"{summary['objective']} raises"
        )
    if summary["lowered"]:
        parts.append(
            f"raises log π of {summary['lowered_rises']} of the {summary['lowered']} that it lowers"
        )
    text = f"A small step on {summary['sequences']} sequences {' and '.join(parts)}."
    if summary["idle"]:
        text += f" {summary['idle']} sequences have weight 0: they move nothing."
    if summary["uncertain"]:
        text += (
            f" For {summary['uncertain']} of all sequences the sign is uncertain, within two "
            "standard errors."
        )
    return text


def _sources(summary: Summary) -> str:
    """What moves the sequences that the loss raises, by source."""
    of = "the sequences that the loss raises" if summary["raised"] else "the sequences"
    parts = ", ".join(
        f"{signed(value, 3)} by {SOURCES[name]}"
        for name, value in summary["sources"].items()
        if value or name == "own"
    )
    return f"Mean Δ log π of {of}, {summary['sources_unit']}: {parts}."


def _harm(summary: Summary) -> str:
    """Which sequences lower the target."""
    unit = summary["sources_unit"]
    text = (
        f"Mean Δ log π of {summary['target']} is {signed(summary['target_change'], 3)} {unit}; "
        f"{summary['harmful']} of {summary['sequences']} sequences lower it"
    )
    if summary["worst"]:
        text += f", most of all {', '.join(map(str, summary['worst'][:5]))}"
    text += "."
    if summary["against"]:
        text += f" Farthest against the loss: {', '.join(map(str, summary['against'][:5]))}."
    return text


def _run(summary: Summary) -> str:
    run = summary["run"]
    text = (
        f"Mean Δ log π of the sequences is {signed(run['change'], 3)} nats; "
        f"{run['raised_falls']} of {summary['raised']} that the loss raises fall"
    )
    if summary["lowered"]:
        text += f", {run['lowered_rises']} of {summary['lowered']} that it lowers rise"
    if run["observed"] is not None:
        text += f"; mean Δ log π of the observed ones is {signed(run['observed'], 3)} nats"
    return text + "."


def _remarks(summary: Summary) -> list[Sentence]:
    return [
        Sentence(about="the settings", text=text, sure="read from model and data", kind="exact")
        for text in summary["remarks"]
    ]


def write_sequences_page(
    document: Mapping[str, Any],
    path: Path,
    *,
    texts: Sequence[tuple[str, str]],
    environment: Mapping[str, Any],
    extra: Mapping[str, str],
) -> Path:
    """Writes a diagnosis of single sequences as one self-contained HTML page.

    Args:
        document: `SequenceDiagnosis.to_dict()`.
        path: The file.
        texts: Prompt and response of each sequence.
        environment: `lddyn.env()`, for the last table.
        extra: Rows of the table of facts at the end.

    Returns:
        The path written.
    """
    summary, rows = document["summary"], document["sequences"]
    unit, run = summary["unit_lr"], summary["run"] is not None
    scale = 1.0 if run else unit
    name = {row["sequence"]: row.get("row", row["sequence"]) for row in rows}
    largest = max([abs(v) for v in summary["sources"].values()], default=0.0) or 1.0
    text = render(
        "sequences.html",
        title="What does training on these sequences do?",
        subtitle=f"{summary['sequences']} sequences of {summary['prompts']} prompts, "
        f"{summary['objective']}",
        sentences=explain_sequences(summary),
        unit=f"{unit:.3g}",
        glossary=OF_SEQUENCES,
        run=run,
        target=summary["target"],
        sources_unit=summary["sources_unit"],
        sources=[
            {
                "name": SOURCES[source],
                "sign": word(value),
                "share": 100 * abs(value) / largest,
                "nats": signed(value, 3),
            }
            for source, value in summary["sources"].items()
        ],
        table=[
            _row(rows[i], texts[i], unit, scale, name, run) for i in document["worst"][:_LISTED]
        ],
        observed=[_observed_row(row, unit, name) for row in document["observed"]],
        facts={k: readable(v) for k, v in extra.items()} | {"made with": versions()},
        installation=installation(environment),
    )
    replace_file(path, text)
    return path


def _row(
    row: JsonObject,
    texts: tuple[str, str],
    unit: float,
    scale: float,
    name: Mapping[int, int],
    run: bool,
) -> JsonObject:
    """A row of the table of sequences, as texts."""
    changes = [row["contribution"] * scale, row["set_change"] * unit, row["own_change"] * unit]
    if run:
        changes.insert(1, row["run_change"])
    return {
        "sequence": row["sequence"],
        "row": name[row["sequence"]],
        "label": readable(row["label"]),
        "wants": {1: "raise", -1: "lower", 0: "–"}[row["wanted"]],
        "log_prob": f"{row['log_prob']:+.4g}",
        "tokens": row["tokens"],
        "changes": [{"text": signed(v, 3), "sign": word(v)} for v in changes],
        "prompt": readable(texts[0][-_TEXT:]),
        "response": readable(texts[1][:_TEXT]),
        "lowered_by": [
            {"sequence": j, "row": name[j], "nats": signed(v * scale, 3)}
            for j, v in row["lowered_by"]
        ],
    }


def _observed_row(row: JsonObject, unit: float, name: Mapping[int, int]) -> JsonObject:
    """A row of the table of observed sequences, as texts."""
    error = f" ± {row['stderr'] * unit:.2g}" if row["stderr"] else ""
    step = row["set_change"] * unit
    changes = [{"text": signed(step, 3) + error, "sign": word(step)}]
    if "run_change" in row:
        changes.append({"text": signed(row["run_change"], 3), "sign": word(row["run_change"])})
    return {
        "name": readable(row["name"]),
        "log_prob": f"{row['log_prob']:+.4g}",
        "changes": changes,
        "lowered": ", ".join(str(name[j]) for j, _ in row["lowered_by"][:3]),
        "raised": ", ".join(str(name[j]) for j, _ in row["raised_by"][:3]),
    }
