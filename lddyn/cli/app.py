"""The command line: all commands, and how the program starts.

Answers go to standard output, progress and warnings to standard error; with --json, standard output
is one JSON document. A problem with the input is one line and exit status 2; LDDYN_LOG=DEBUG shows
the traceback as well. torch and transformers are imported by the commands that need them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Annotated

import typer

from lddyn.cli import data, features, kernel, sets, step, system
from lddyn.cli.command import OneLineGroup, commands, group
from lddyn.cli.lab import app as lab_app

__all__ = ["app", "main"]

app = typer.Typer(
    name="lddyn",
    help="Learning dynamics of LLM finetuning: what one training step does to every token, and "
    "which training token does it.",
    cls=OneLineGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

features_app = group("Compute the gradients of a data set, sketched, into a store, and ask it.")

store_app = group("Check, list and merge stores.")

commands(
    app,
    system.demo,
    step.decompose,
    step.massflow,
    kernel.ntk,
    sets.diagnose,
    sets.filter,
    data.audit,
    features.plan,
    system.report,
    system.env,
)
commands(features_app, features.build, features.query)
commands(store_app, features.verify, features.ls, features.merge)

app.add_typer(features_app, name="features")
app.add_typer(store_app, name="store")
app.add_typer(lab_app, name="lab")


def main() -> None:
    """Runs the command line; the entry point of the `lddyn` script."""
    # OpenMP's threads spin between many small operations: tenfold the time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    level = os.environ.get("LDDYN_LOG", "WARNING").upper()
    logging.basicConfig(
        format="%(name)s: %(message)s",
        level=level if level in logging.getLevelNamesMapping() else "WARNING",
    )
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show π shows \u03c0
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app()


def _show_version(value: bool) -> None:
    if value:
        from lddyn import __version__

        typer.echo(f"lddyn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
