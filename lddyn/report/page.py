"""The frame of all pages: template, style, and a policy that forbids the network.

A page is one file that opens from file://. All its data is untrusted: jinja escapes it, `readable`
shows characters that would hide or reorder text, and the page's own policy forbids the network and
every script but its own, which it names by hash.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lddyn.files import JsonObject
from lddyn.text import hides, signed

__all__ = ["axis", "installation", "render", "versions", "word"]

_TEMPLATES = Path(__file__).parent / "templates"


def word(value: float) -> str:
    """Class of a number in the page, which sets its colour: "up", "down" or "zero"."""
    return "up" if value > 0 else "down" if value < 0 else "zero"


def axis(
    values: Sequence[float], low: float, high: float, *, zero: bool = True
) -> tuple[list[float], list[JsonObject]]:
    """Positions of values on an axis of a drawing, and its round ticks ("at", "text").

    Args:
        values: Finite numbers.
        low: Position of the least value, or near it.
        high: Position of the largest value.
        zero: Whether 0 must be on the axis.
    """
    ends = [0.0, *values] if zero or not values else list(values)
    least, most = min(ends), max(ends)
    room = 0.06 * (most - least) or 0.5
    least, most = least - room, most + room

    def place(v: float) -> float:
        return round(low + (high - low) * (v - least) / (most - least), 1)

    step = 10.0 ** math.floor(math.log10((most - least) / 3))
    step *= max(k for k in (1, 2, 5) if k == 1 or k * step <= (most - least) / 3)
    ticks = range(math.ceil(least / step), math.floor(most / step) + 1)
    return [place(v) for v in values], [
        {"at": place(i * step), "text": signed(float(f"{i * step:.9g}"), 3)} for i in ticks
    ]


def versions() -> str:
    """Versions of the packages that make a page's numbers."""
    parts = []
    for name in ("lddyn", "torch", "transformers"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def installation(environment: Mapping[str, Any]) -> dict[str, str]:
    """The facts of `lddyn.env()` that a page shows, a line each."""

    def line(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{k} {line(v)}" for k, v in value.items())
        return "; ".join(map(line, value)) if isinstance(value, list) else str(value)

    kept = ("versions", "system", "devices", "precision", "variables")
    return {name: line(environment[name]) for name in kept if environment.get(name)}


def _without_hidden(value: Any) -> Any:
    """A text with escapes for characters that have no width or reorder others; markup stays."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if value.isascii() and value.isprintable():
        return value
    return "".join(f"\\u{ord(c):04x}" if c not in "\n\t" and hides(c) else c for c in value)


# Letters of right-to-left scripts, with spaces and marks between them; and what is left as it is.
_RTL = r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
_PLAIN = r"<(script|style|svg|title|option)\b.*?</\1>|<[^>]*>"
_PARTS = re.compile(rf"(?s:{_PLAIN})|(?P<rtl>{_RTL}(?:[^\w<>&]*{_RTL})*)")


def _isolated(page: str) -> str:
    """A page whose right-to-left text moves nothing beside it, such as the number that follows."""
    return _PARTS.sub(lambda m: f"<bdi>{m[0]}</bdi>" if m["rtl"] else m[0], page)


def _json(value: Any, **options: Any) -> str:
    """JSON for a page's script, whose texts hide nothing either."""

    def shown(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {_without_hidden(str(name)): shown(inner) for name, inner in part.items()}
        return [shown(x) for x in part] if isinstance(part, list | tuple) else _without_hidden(part)

    return json.dumps(shown(value), **options)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_hidden,
        loader=FileSystemLoader(_TEMPLATES),
    )
    environment.policies["json.dumps_function"] = _json
    return environment


def render(name: str, **values: Any) -> str:
    """Renders a template of this package in the common frame, with its style and script.

    Values are escaped, hidden characters too, and right-to-left text is isolated. A name of the
    template that has no value is an error.
    """
    from markupsafe import Markup

    style, script = ((_TEMPLATES / n).read_text("utf-8") for n in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text: str = (
        _environment()
        .get_template(name)
        .render(style=Markup(style), script=Markup(script), digest=digest, **values)
    )
    return _isolated(text)
