"""How commands speak of trouble: one line on standard error, and an exit status."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import typer

_LOG = logging.getLogger("lddyn")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on standard error and an exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if _LOG.isEnabledFor(logging.DEBUG):
            _LOG.debug("traceback", exc_info=True)
        expected = (ValueError, TypeError, OSError, ImportError, RuntimeError, KeyError, IndexError)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[0] if lines else type(error).__name__
        if isinstance(error, KeyError):
            message = f"KeyError: {message}"
        if not isinstance(error, expected):
            message = f"{type(error).__name__}: {message} (LDDYN_LOG=DEBUG shows the traceback)"
        typer.echo(f"error: {safe(message)}", err=True)
        raise typer.Exit(2 if isinstance(error, expected) else 1) from None


def safe(text: str) -> str:
    """Text that cannot move the terminal's cursor."""
    from lddyn.text import printable

    return printable(text)
