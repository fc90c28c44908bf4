"""Limits on the work of a chat template, which is code that somebody else wrote.

A template can print 2 GB (`{{ 'x' * 2000000000 }}`) or loop for years, and neither jinja nor
transformers stops it. `check_work` renders it once within limits, in the environment of
transformers whose loops, operators, filters and calls are counted; only then the tokenizer renders
it, so that what is encoded are the tokenizer's own bytes. The first rendering runs in the calling
thread and leaves nothing behind.
"""

from __future__ import annotations

import copy
import functools
import operator
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lddyn.errors import ExampleError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

__all__ = ["check_work"]

LARGEST = 1 << 26  # characters that a template may print, and that a value may have

_ITEMS = 1 << 20  # of nested lists and mappings

SECONDS = 5.0  # of processor time for one conversation

_BITS = 1 << 20  # of a whole number

_STEP = 16  # characters that one turn of a loop, or one call, counts as

# Filters whose numbers are widths or counts.
_WIDTHS = {"batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap"}

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
    "%": operator.mod,
}

# A width of 8 digits, or one that an argument holds, in `%` and in `str.format`.
_WIDE = {
    "%": re.compile(r"%[-+ #0]*(?:\d*\.)?(?:(\d{8})|\*)"),
    "{": re.compile(r"\{[^{}]*:[^{}]*(?:(\d{8})|\{)"),
}


class _WorkError(Exception):
    """A template does more than it may."""


# --------------------------------------------------------------------------- counting


class _Count(threading.local):
    """What the rendering of this thread has used."""

    work = 0
    end = 0.0

    def start(self) -> None:
        self.work, self.end = 0, time.thread_time() + SECONDS

    def add(self, work: int) -> None:
        self.work += work
        if self.work > LARGEST:
            raise _WorkError(f"prints or does more than {LARGEST:,} characters are")
        if time.thread_time() > self.end:
            raise _WorkError(f"runs for more than {SECONDS:.0f} seconds")


_count = _Count()


def _limit(size: int) -> None:
    if size > LARGEST:
        raise _WorkError(f"makes a value of more than {LARGEST:,} characters")


def _measured(value: Any) -> int:
    """Characters of a text, or of all texts in lists and mappings, which may be nested."""
    size, items, rest = 0, 0, [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, Mapping):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            rest += part
        items += 1
        if items + len(rest) > _ITEMS:
            raise _WorkError(f"makes a value of more than {_ITEMS:,} parts")
    _limit(size)
    return size


def _result(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple):
        _limit(len(value))
    return value


def _steps(iterable: Any, text: int) -> Any:
    """What a loop runs over; each turn of it prints this much text of the template's own."""
    if hasattr(iterable, "__len__"):
        _count.add(len(iterable) * (_STEP + text))
        return iterable
    return _counting(iterable, text)


def _counting(iterable: Any, text: int) -> Any:
    for item in iterable:
        _count.add(_STEP + text)
        yield item


def _printed(value: Any) -> Any:
    _count.add(_measured(value))
    return value


def _text(value: Any) -> Any:
    _measured(value)
    return value


def _lipsum(*_: Any, **__: Any) -> str:
    raise _WorkError("prints random text")


# --------------------------------------------------------------------------- operators and calls


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator in ("*", "+"):
        sizes = [len(v) if hasattr(v, "__len__") else 0 for v in (left, right)]
        times = [v if isinstance(v, int) else 1 for v in (left, right)]
        if operator == "+":
            _limit(sum(sizes))
        elif any(sizes):
            _limit(sizes[0] * times[1] + sizes[1] * times[0])
        elif isinstance(left, int) and isinstance(right, int):
            _limit_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _limit_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str):
        _check_format("%", left, right if isinstance(right, tuple) else (right,))


def _limit_bits(bits: int) -> None:
    if bits > _BITS:
        raise _WorkError(f"computes a number of more than {_BITS:,} bits")


def _check_format(kind: str, text: str, values: Iterable[Any]) -> None:
    for wide in _WIDE[kind].finditer(text):
        if wide[1]:
            raise _WorkError("formats a value with a width of more than 7 digits")
        _check_numbers(values)


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise _WorkError(f"asks for a width or a count of {value}")


def _check_replaced(text: Any, arguments: tuple[Any, ...]) -> None:
    if len(arguments) >= 2 and all(isinstance(a, str) for a in (text, *arguments[:2])):
        _limit(len(text) + text.count(arguments[0]) * len(arguments[1]))


def _check_method(called: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Refuses a method of a text, bytes or number whose result would be too large."""
    own = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
    owner, name = getattr(own, "__self__", None), getattr(own, "__name__", "")
    if isinstance(owner, str) and name in ("format", "format_map"):
        _check_format("{", owner, (*arguments, *keywords.values()))
    elif isinstance(owner, str | bytes | int):
        _check_numbers((*arguments, *keywords.values()))
        if name == "replace":
            _check_replaced(owner, arguments)
        elif name == "join" and isinstance(owner, str) and arguments:
            parts = list(arguments[0])
            _limit(_measured(parts) + len(owner) * len(parts))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja's whose argument and result are measured."""

    @functools.wraps(function)  # with jinja's marks of what it passes first
    def run(*arguments: Any, **keywords: Any) -> Any:
        extra = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, rest = arguments[extra], arguments[extra + 1 :]
        _count.add(_STEP)
        if isinstance(value, list | tuple | Mapping):
            _text(value)
        if name in _WIDTHS:
            _check_numbers((*rest, *keywords.values()))
        if name == "format":
            _check_format("%", str(value), (*rest, *keywords.values()))
        if name == "replace":
            _check_replaced(value, rest)
        return _result(function(*arguments, **keywords))

    return run


# --------------------------------------------------------------------------- the environment


@functools.cache
def _environment() -> Environment | None:
    """The environment of transformers with limits; None where it has another one."""
    try:
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.visitor import NodeTransformer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        own = copy.copy(_compile_jinja_template("").environment)
    except (ImportError, AttributeError):
        return None
    if type(own) is not ImmutableSandboxedEnvironment:
        return None

    class Counted(NodeTransformer):
        """Counts the turns of loops, and measures what `~` joins."""

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.iter = _filter(node.iter, "lddyn_steps", nodes.Const(text))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
            self.generic_visit(node)
            node.nodes = [_filter(part, "lddyn_text") for part in node.nodes]
            return _filter(node, "lddyn_text")

    def _filter(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
        made = nodes.Filter(node, name, [*arguments], [], None, None)
        return made.set_lineno(node.lineno).set_environment(node.environment)  # type: ignore[return-value]

    class Limited(ImmutableSandboxedEnvironment):
        """A sandbox in which each step is counted."""

        intercepted_binops = frozenset({"*", "+", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return _result(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            _count.add(_STEP)
            _check_method(__obj, args, kwargs)
            return _result(super().call(__context, __obj, *args, **kwargs))

        def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
            _check_constants(source)
            Counted().visit(source)
            return super()._generate(source, *args, **kwargs)

    own.__class__ = Limited
    own.filters = {name: _limited_filter(name, f) for name, f in own.filters.items()}
    own.filters |= {"lddyn_steps": _steps, "lddyn_text": _text}
    own.globals = own.globals | {"lipsum": _lipsum}
    own.finalize = _printed
    return own


def _check_constants(tree: Any) -> None:
    """Refuses constant expressions of too large a value: jinja computes them when it compiles."""
    from jinja2 import nodes

    def value(node: Any) -> Any:
        if isinstance(node, nodes.BinExpr):
            left, right = value(node.left), value(node.right)
            _check_operator(node.operator, left, right)
            return _OPERATORS[node.operator](left, right)
        return node.as_const()

    for node in tree.find_all(nodes.BinExpr):
        try:
            value(node)
        except _WorkError:
            raise
        except Exception:
            continue  # no constant


_TRIES = 3

_PROBLEMS: dict[str, list[str]] = {}  # template → why it was refused, at most `_TRIES` times


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Template | None:
    environment = _environment()
    return None if environment is None else environment.from_string(source)


def check_work(source: str, variables: Mapping[str, Any]) -> None:
    """Renders a template once and discards the text.

    Args:
        source: The template, in jinja's language.
        variables: Its variables.

    Raises:
        ExampleError: If it prints or does too much; after three such rows it is not run again. Any
            other error is left to the tokenizer, which meets it, too.

    Cost: that of one rendering; 5 s of processor time at most, and some 10 times 64 MB.
    """
    problems = _PROBLEMS.get(source, [])
    if len(problems) < _TRIES:
        _count.start()
        try:
            template = _compiled(source)
            if template is not None:
                for _ in template.generate(variables):
                    pass
            return
        except _WorkError as error:
            problems = [*problems, str(error)]
            _PROBLEMS[source] = problems
        except Exception:
            return
    raise ExampleError(
        f"the chat template {problems[-1]}: it is no template of a conversation; use another one",
        problem="template_error",
    )
