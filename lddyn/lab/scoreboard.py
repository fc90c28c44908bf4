"""Experiment × claim: published, corrected, ours, and whether they agree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lddyn.files import replace_file
from lddyn.lab.record import Row, Rows, write_json


def write(results: Rows, folder: str | Path) -> Row:
    """Writes scoreboard.json and scoreboard.md.

    Args:
        results: What the experiments' `run` returned.
        folder: Where to; made if it is not there.

    Returns:
        {"claims": rows, "verdicts": counts, "seconds": per experiment}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"experiment": r["experiment"], **claim} for r in results for claim in r["claims"]]
    document = {
        "claims": rows,
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "seconds": {r["experiment"]: sum(r["seconds"]["steps"].values()) for r in results},
    }
    write_json(folder / "scoreboard.json", document)
    replace_file(folder / "scoreboard.md", _markdown(rows))
    return document


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(rows: Rows) -> str:
    lines = ["| claim | published | corrected | ours | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"] or (None, None)
        ours = row["ours"] + (f" (95 %: {low:.3g} to {high:.3g})" if low is not None else "")
        cells = (
            f"**{row['experiment']}: {row['name']}.** {row['text']} ({row['source']})",
            row["published"],
            row["corrected"],
            ours,
            f"**{row['verdict']}.** {row['reason']}",
        )
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"
