"""What a notebook shows of a result: its sentences and small tables, as HTML without a script.

A cell is a fragment of a page: it takes the notebook's own colours of text, light or dark, and
loads nothing. All its texts are data of the user's: they are escaped, characters that hide or
reorder text are shown as escapes, and right-to-left text moves nothing beside it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lddyn.text import readable, signed

__all__ = ["Grid", "cell"]

_ROWS, _COLUMNS = 24, 32  # of a table, at most
_WIDE = 12  # columns beyond which coloured cells show no numbers; these are in their titles
_UP, _DOWN = "0,114,178", "213,94,0"  # blue and vermilion, told apart by colour-blind people, too

_STYLE = """
.lddyn{line-height:1.4;overflow-x:auto}
.lddyn p{margin:.2em 0;max-width:60em}
.lddyn table{border-collapse:collapse;margin:.6em 0;font-size:90%;font-variant-numeric:tabular-nums}
.lddyn caption{text-align:left;font-weight:600;padding:.2em 0;white-space:nowrap}
.lddyn th,.lddyn td{border:1px solid rgba(128,128,128,.35);padding:.15em .45em;text-align:right}
.lddyn th:first-child,.lddyn td.text{text-align:left}
.lddyn td.text{max-width:30em}
.lddyn .heat td{padding:.15em;min-width:1.1em}
.lddyn th{font-weight:500;white-space:pre}
"""


@dataclass(frozen=True)
class Grid:
    """A table of a cell.

    Attributes:
        title: What its numbers are, with their unit.
        columns: Names of the columns.
        rows: (name, values) of each row; a value is a number, a text, or None.
        heat: Whether the size of a number colours its cell: blue raises, orange lowers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Any]]]
    heat: bool = False

    def html(self) -> str:
        """The table; its first rows and columns, and a line that says so, where it is large."""
        rows = [(name, values[:_COLUMNS]) for name, values in self.rows[:_ROWS]]
        columns = self.columns[:_COLUMNS]
        sizes = [abs(v) for _, vs in rows for v in vs if _is_number(v)]
        largest = max(sizes, default=0.0) if self.heat else 0.0
        bare = self.heat and len(columns) > _WIDE
        head = "".join(f"<th>{_shown(name)}</th>" for name in ("", *columns))
        body = "".join(
            f"<tr><th>{_shown(name)}</th>{''.join(_value(v, largest, bare) for v in values)}</tr>"
            for name, values in rows
        )
        left_out = []
        if len(self.rows) > len(rows):
            left_out.append(f"{len(rows)} of {len(self.rows)} rows")
        if len(self.columns) > len(columns):
            left_out.append(f"{len(columns)} of {len(self.columns)} columns")
        note = f" (the first {' and '.join(left_out)})" if left_out else ""
        kind = ' class="heat"' if self.heat else ""
        return (
            f"<table{kind}><caption>{_shown(self.title + note)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def cell(name: str, text: str, grids: Sequence[Grid] = ()) -> str:
    """A result in HTML: its name, a paragraph for each line of its text, and its tables.

    Example:
        >>> from lddyn.cells import Grid, cell
        >>> shown = cell("Thing", "<it> moved", [Grid("nats", ["a"], [("b", [-0.25])], heat=True)])
        >>> "&lt;it&gt; moved" in shown, "−0.25" in shown, "<script" in shown
        (True, True, False)
    """
    paragraphs = "".join(f"<p>{_shown(line)}</p>" for line in text.splitlines() if line.strip())
    tables = "".join(grid.html() for grid in grids)
    return (
        f'<div class="lddyn"><style>{_STYLE}</style><p><strong>{_shown(name)}</strong></p>'
        f"{paragraphs}{tables}</div>"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _shown(text: str) -> str:
    """A text without markup, and apart from what is beside it."""
    shown = html.escape(readable(text))
    return shown if shown.isascii() else f"<bdi>{shown}</bdi>"


def _value(value: Any, largest: float, bare: bool) -> str:
    """A cell of a table."""
    if isinstance(value, str):
        return f'<td class="text">{_shown(value)}</td>'
    if value is None or math.isnan(value):
        return "<td>–</td>"
    text = f"{value:,}" if isinstance(value, int) else signed(value)
    if not largest:
        return f"<td>{text}</td>"
    strength = min(1.0, abs(value) / largest) ** 0.5  # small effects are seen, too
    colour = f"rgba({_UP if value > 0 else _DOWN},{0.75 * strength:.2f})"
    content = "" if bare else text
    return f'<td title="{text}" style="background:{colour}">{content}</td>'
