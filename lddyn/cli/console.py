"""What commands print: answers on standard output, warnings and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

_LOG = logging.getLogger("lddyn")

# Exceptions whose text was written for users; others show their class, too.
_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    RuntimeError,
    KeyError,
    IndexError,
    MemoryError,
)


def safe(text: str) -> str:
    """The text with escapes for every character that could move the terminal's cursor."""
    from lddyn.text import printable

    return printable(text)


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON document; NaN and infinities become null."""
    from lddyn.files import json_safe
    from lddyn.text import json_printable

    text = json.dumps(json_safe(document), ensure_ascii=False, indent=1, allow_nan=False)
    typer.echo(json_printable(text))


def print_parts(parts: Iterable[str | Table]) -> None:
    """Prints lines of text and tables, in order."""
    for part in parts:
        if isinstance(part, str):
            for line in part.split("\n"):
                typer.echo(safe(line))
        else:
            from rich.console import Console

            width = None if sys.stdout.isatty() else 160
            Console(highlight=False, markup=False, width=width).print(part)


def warn(message: str) -> None:
    """Prints a warning on standard error."""
    typer.echo(f"warning: {safe(message)}", err=True)


def say_progress(message: str) -> None:
    """Prints on standard error what is being done, if standard error is a terminal."""
    if sys.stderr.isatty():
        typer.echo(message, err=True)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an exception into one line on standard error and an exit status.

    The status is 2 for what the user can put right, 130 for an interrupt, 1 for all else.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer's own: it prints the help
            raise
        _LOG.debug("traceback", exc_info=True)
        with contextlib.suppress(OSError):  # standard error is on a full disk
            typer.echo(f"error: {safe(_message(error))}", err=True)
        raise typer.Exit(2 if isinstance(error, (*_EXPECTED, _USAGE_ERROR)) else 1) from None


# What typer raises for a wrong option or value; not exported by itself.
_USAGE_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


def _message(error: Exception) -> str:
    """What an exception says, in one line, with its class where that is news."""
    if isinstance(error, _USAGE_ERROR):
        path = getattr(getattr(error, "ctx", None), "command_path", "lddyn")
        text = str(error.format_message()).strip()  # type: ignore[attr-defined]
        text = text.replace("Value error, ", "").rstrip(".")
        return f"{text} ({path} --help lists the options)"
    from lddyn.text import first_sentences

    if "torch" in sys.modules:
        from lddyn.memory import is_out_of_memory, name_memory

        if is_out_of_memory(error):
            name_memory(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name, reason = str(error.filename), error.strerror
        if isinstance(error, FileExistsError):
            reason = "is there already, and is no folder"
        return f"{name if len(name) < 300 else name[:60] + '…'}: {reason}"
    # Sentences of lddyn's own are in one line; other libraries begin with "see below:".
    message = first_sentences(str(error), longest=0) or type(error).__name__
    if isinstance(error, KeyError):
        return f"KeyError: {message}"
    if not isinstance(error, _EXPECTED):
        return f"{type(error).__name__}: {message} (LDDYN_LOG=DEBUG shows the traceback)"
    return message
