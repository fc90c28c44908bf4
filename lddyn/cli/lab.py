"""`lddyn lab NAME`: one command per experiment. Its options are the fields of its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lddyn.cli.command import OUTPUT, Answer, commands, group
from lddyn.cli.options import Out, Seed
from lddyn.files import JsonObject
from lddyn.lab import EXPERIMENTS
from lddyn.lab.settings import Settings

app = group(
    "The paper's experiments, with K measured: pictures, tables, and a page that compares what the "
    "paper says with what was measured."
)


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Where an experiment writes, and how it begins. The default folder is lab/NAME."""

    out: Out = None
    seed: Seed = 0
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Begin anew: delete what the experiment left in the folder. Default: continue.",
            rich_help_panel=OUTPUT,
        ),
    ] = False


def _command(name: str, kind: type[Settings]) -> Callable[..., Answer]:
    """The function that becomes `lddyn lab NAME`."""

    def run(lab: LabOptions, **values: Any) -> Answer:
        settings = kind(**{field: _parsed(field, kind, values[field]) for field in values})
        folder = lab.out or Path("lab") / name
        return _answer(_results(name, settings, folder, lab), folder)

    first = inspect.Parameter("lab", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=LabOptions)
    run.__signature__ = inspect.Signature([first, *_parameters(kind)])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = name, _title(kind)
    return run


def _parameters(kind: type[Settings]) -> Iterator[inspect.Parameter]:
    """One parameter of typer per field. Several numbers are one text on the command line."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], field.default
        if isinstance(default, tuple):
            hint, default = str, ",".join(map(str, default))
        option = typer.Option(
            help=field.metadata["help"],
            show_default=default not in (None, ""),
            rich_help_panel=field.metadata["panel"],
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[hint, option],
        )


def _parsed(name: str, kind: type[Settings], value: Any) -> Any:
    """The value of a field from that of its option."""
    (default,) = (field.default for field in dataclasses.fields(kind) if field.name == name)
    if not isinstance(default, tuple):
        return value
    try:
        return tuple(int(text) for text in value.split(","))
    except ValueError:
        raise ValueError(
            f"--{name} must be whole numbers separated by commas, got {value!r}"
        ) from None


def _title(kind: type[Settings]) -> str:
    """What an experiment is, in one sentence."""
    return (kind.__doc__ or "").splitlines()[0]


def _results(name: str, settings: Settings, folder: Path, lab: LabOptions) -> JsonObject:
    """Runs an experiment."""
    from lddyn.lab.record import anew

    experiment = importlib.import_module(f"lddyn.lab.{name}")
    with anew() if lab.fresh else contextlib.nullcontext():
        results: JsonObject = experiment.run(folder, settings, seed=lab.seed, progress=True)
    return results


def _answer(results: Mapping[str, Any], folder: Path) -> Answer:
    def lines() -> Iterator[str]:
        yield from results["seen"]
        for claim in results["claims"]:
            yield f"  {claim['name']}: {claim['verdict']}. {claim['ours']}"
        yield f"page: {folder / 'index.html'}"

    return Answer(results, lines())


def everything(lab: LabOptions) -> Answer:
    """Every experiment with its defaults, and one scoreboard of all claims."""
    from lddyn.lab import scoreboard

    folder = lab.out or Path("lab")
    results = []
    for name, kind in EXPERIMENTS.items():
        typer.echo(f"\n{name}: {_title(kind)}", err=True)
        results.append(_results(name, kind(), folder / name, lab))
    document = scoreboard.write(results, folder)
    return Answer(document, [f"scoreboard: {folder / 'scoreboard.md'}"])


commands(app, *(_command(name, kind) for name, kind in EXPERIMENTS.items()))
commands(app, everything, name="all")
