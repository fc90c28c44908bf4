"""`lddyn env | demo | report`: the installation, a tour, and pages written again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lddyn.cli.command import OUTPUT, Answer
from lddyn.cli.environment import env_parts, selftest_parts
from lddyn.cli.options import Seed
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from rich.table import Table


def env(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Also run every op and compare it with float64.")
    ] = False,
) -> Answer:
    """Versions, devices, compiled parts and backends: what a bug report needs."""
    from lddyn import environment

    document = environment.env()
    rows = environment.selftest() if selftest else []
    document |= {"selftest": rows} if selftest else {}

    def tell() -> Iterator[str | Table]:
        yield from env_parts(document)
        if selftest:
            yield from selftest_parts(rows)

    return Answer(document, tell(), passed=all(row["ok"] for row in rows))


def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for everything that the command writes.",
            file_okay=False,
            rich_help_panel=OUTPUT,
        ),
    ] = Path("runs/demo"),
    seed: Seed = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Train little and compute coarsely: seconds, to see that it works."
        ),
    ] = False,
) -> Answer:
    """Train a tiny model here, take one SFT and one DPO step, and explain both.

    Nothing is downloaded. FOLDER gets the page index.html, both decompositions and pictures.
    """
    from lddyn.demo.run import run

    summary = run(out, quick=quick, progress=True, seed=seed)
    return Answer(summary, [*summary["explanation"], "", f"page: {summary['page']}"])


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="What `decompose --out` or `demo` wrote, or the folder of a watched run.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ],
) -> Answer:
    """Write the page of a saved decomposition, or of a watched run, again.

    The page index.html goes into the same folder. The model is not needed.
    """
    if not any(folder.glob("**/decomposition.json")):
        with contextlib.suppress(FileNotFoundError):
            return _report_watched_run(folder)
    return _report_decompositions(folder)


def _report_watched_run(folder: Path) -> Answer:
    from lddyn.probes.probe_set import LABELS
    from lddyn.report import explain_dynamics, read_dynamics, write_dynamics

    rows = read_dynamics(folder)
    inner = folder if (folder / "dynamics.jsonl").is_file() else folder / "lddyn"
    page = write_dynamics(rows, inner / "index.html", labels=LABELS)
    return _page(page, {"": explain_dynamics(rows, LABELS)})


def _report_decompositions(folder: Path) -> Answer:
    from lddyn.steps.folder import read_steps, write_steps

    decs, verifications, summary = read_steps(folder)
    known = {"title", "opening", "extra", *decs}
    page = write_steps(
        folder,
        decs,
        verifications,
        title=str(summary.get("title", "What one finetuning step did")),
        opening=[str(s) for s in summary.get("opening", [])],
        extra=summary.get("extra"),
        facts={k: v for k, v in summary.items() if k not in known},
    )
    explained = {
        name: dec.explain(verifications.get(name)).splitlines() for name, dec in decs.items()
    }
    return _page(page, explained)


def _page(page: Path, explanation: Mapping[str, Sequence[str]]) -> Answer:
    document: JsonObject = {"page": str(page), "explanation": explanation}
    lines: list[str] = []
    for name, said in explanation.items():
        lines += [f"{name}:"] if name else []
        lines += said
    return Answer(document, [*lines, f"page: {page}"])
