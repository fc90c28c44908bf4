"""Decomposed steps as a folder: decompositions, checks, pictures, summary.json, and the page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lddyn.files import (
    digest_of,
    json_safe,
    read_regular,
    read_sealed,
    replace_file,
    sealed,
    subfolder,
)
from lddyn.report.figures import plot_step
from lddyn.report.step import measured_totals, write_step_page
from lddyn.steps.decomposition import Decomposition
from lddyn.steps.verification import Verification

__all__ = ["read_steps", "summarise", "write_steps"]


def summarise(dec: Decomposition, verification: Verification | None = None) -> dict[str, Any]:
    """`dec.summary()` with its explanation and, in short, the verification; ready for JSON."""
    lines = dec.explain(verification).split("\n")
    summary: dict[str, Any] = {**dec.summary(), "explanation": lines}
    if verification is not None:
        check = verification.to_dict()
        totals = {key: [sum(row) for row in check[key]] for key in ("measured", "predicted")}
        summary["verification"] = {**check, **totals}
        measured = measured_totals(dec.to_dict(), check)
        for entry in summary["observed"]:
            entry["measured"] = measured[entry["name"]]
    return dict(json_safe(summary))


def write_steps(
    folder: str | Path,
    decs: Mapping[str, Decomposition],
    verifications: Mapping[str, Verification | None],
    *,
    title: str,
    opening: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes decomposed steps: decompositions, verifications, summary, pictures, and the page.

    Args:
        folder: Created. A decomposition named "" goes there, others into a folder of their name.
        decs: The decompositions by name.
        verifications: Their verifications by the same names; None where there is none.
        title: Heading of the page.
        opening: Sentences at the top of the page.
        extra: Rows of the page's last table.
        facts: Further entries for summary.json.

    Returns:
        Path of the page, `index.html`.

    Raises:
        ValueError: If a name is none of a folder inside this one, or such a folder is a link.

    Cost: the drawing, about a second per picture for the page and as much again for the pictures
        in print resolution.
    """
    folder = Path(folder)
    for name in decs:
        _check_name(name)
    summary: dict[str, Any] = {
        "title": title,
        "opening": list(opening),
        "extra": dict(extra or {}),
        **(facts or {}),
    }
    pictures, checks = {}, {}
    steps = {name: dec.to_dict() for name, dec in decs.items()}
    for name, dec in decs.items():
        place = subfolder(folder, name) if name else folder
        dec.save(place / "decomposition")
        pictures[name] = plot_step(steps[name], place)
        verification = verifications.get(name)
        if verification is not None:
            checks[name] = verification.to_dict()
            verification.save(place / "verification.json")
        else:
            (place / "verification.json").unlink(missing_ok=True)
        if name:
            summary[name] = summarise(dec, verification)
        else:
            summary |= summarise(dec, verification)
    summary["records"] = _digests(folder, decs)
    replace_file(folder / "summary.json", sealed(summary), durable=True)
    return write_step_page(
        steps,
        folder / "index.html",
        title=title,
        checks=checks,
        opening=opening,
        facts=extra,
        figures=pictures,
    )


def _check_name(name: str) -> None:
    if name in (".", "..") or name != os.path.basename(name) or "\\" in name or "\0" in name:
        raise ValueError(f"the name of a step must be that of a folder, got {name!r}")


def read_steps(
    folder: str | Path,
) -> tuple[dict[str, Decomposition], dict[str, Verification | None], dict[str, Any]]:
    """Reads what `write_steps` wrote: decompositions, verifications, and summary.json.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If there is no decomposition in it.
        ValueError: If a file is damaged.
    """
    folder = Path(folder)
    files = [
        folder / "decomposition.json",
        *sorted(folder.glob("*/decomposition.json"), key=lambda p: p.stat().st_mtime_ns),
    ]
    places = {
        "" if path.parent == folder else path.parent.name: path.parent
        for path in files
        if path.is_file()
    }
    if not places:
        raise FileNotFoundError(
            f"{folder}: no decomposition.json there, nor one folder below; `lddyn decompose "
            "--out` writes it"
        )
    decs = {name: Decomposition.load(place / "decomposition") for name, place in places.items()}
    verifications: dict[str, Verification | None] = {}
    for name, place in places.items():
        path = place / "verification.json"
        verifications[name] = Verification.load(path) if path.is_file() else None
    path = folder / "summary.json"
    try:
        summary = read_sealed(path)
    except FileNotFoundError:
        return decs, verifications, {}
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot be read as the summary of these steps: {error}"
        ) from error
    if not isinstance(summary.get("records"), dict):
        raise ValueError(
            f"{path}: cannot be read as the summary of these steps: it is another file"
        )
    digests = _digests(folder, places)
    for name, digest in summary.pop("records").items():
        if digests.get(name) != digest:
            raise ValueError(f"{folder}: {name} and summary.json are not of one save")
    return decs, verifications, summary


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File → digest of each decomposition and verification in the folder."""
    files = [
        folder / name / file
        for name in names
        for file in ("decomposition.json", "verification.json")
    ]
    return {
        str(path.relative_to(folder)): digest_of(read_regular(path))
        for path in files
        if path.is_file()
    }
