"""How a function becomes a command: groups of options, --json, errors in one line.

A command is a function that returns an `Answer` and prints nothing. Its parameters are typer's, or
dataclasses of typer's parameters (`lddyn.cli.options`), whose fields become options of the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from lddyn.cli.console import one_line_errors, print_json, print_parts

if TYPE_CHECKING:
    from rich.table import Table

OUTPUT = "Output"

_AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document and nothing else.", rich_help_panel=OUTPUT
    ),
]


@dataclass(frozen=True)
class Answer:
    """What a command returns.

    Attributes:
        document: What --json prints. None: nothing is printed either way.
        parts: Lines and tables for people; not evaluated under --json.
        passed: False makes the exit status 1: something that was checked is wrong.
    """

    document: Mapping[str, Any] | None
    parts: Iterable[str | Table] = ()
    passed: bool = True


class OneLineGroup(TyperGroup):
    """A group of commands that tells wrong options in one line, as it tells all other errors."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """As typer does it; an empty word, as an unset variable leaves it, is an error."""
        with one_line_errors():
            _check_words(args[1] if len(args) > 1 else kwargs["args"])
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """As typer does it."""
        with one_line_errors():
            return super().invoke(ctx)


def _check_words(words: list[str]) -> None:
    """Raises a ValueError for an empty word: a path of that name would be the current folder."""
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals and not value:
            raise ValueError(f"{option} must not be empty")
        if not word:
            what = before if before.startswith("-") else "an argument"
            raise ValueError(f"{what} must not be empty")


def group(help: str) -> typer.Typer:
    """An app for the commands of one group."""
    return typer.Typer(help=help, no_args_is_help=True, cls=OneLineGroup)


def commands(app: typer.Typer, *functions: Callable[..., Answer], name: str | None = None) -> None:
    """Makes functions commands of an app.

    Args:
        app: The app.
        *functions: Each becomes a command of its own name; its docstring is the help.
        name: Of a single function's command, instead.
    """
    for function in functions:
        app.command(name)(_callback(function))


def _callback(function: Callable[..., Answer]) -> Callable[..., None]:
    """The function with options in place of groups, that prints its answer."""
    groups: dict[str, type] = {}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += _options(kind)
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    as_json = Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=_AsJson)
    parameters.append(as_json)

    def callback(**given: Any) -> None:
        wants_json = given.pop("as_json")
        for name, kind in groups.items():
            own = [field.name for field in dataclasses.fields(kind)]
            given[name] = kind(**{field: given.pop(field) for field in own})
        # Whatever a library prints meanwhile must not get between the lines of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            answer = function(**given)
        if answer.document is not None:
            with _named_output():
                print_json(answer.document) if wants_json else print_parts(answer.parts)
        if not answer.passed:
            raise typer.Exit(1)

    callback.__name__, callback.__doc__ = function.__name__, function.__doc__
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    return callback


@contextlib.contextmanager
def _named_output() -> Iterator[None]:
    """Names standard output in an error of writing to it, such as a full disk."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has seen enough
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _options(kind: type) -> list[Parameter]:
    """The fields of a dataclass as keyword parameters."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(kind)
    ]
