"""The look that all pictures share: colours, fonts, axes, and text drawn as it is.

Blue is raised, red is lowered, everywhere; sequences of the update have colours of their own, the
same in every picture. Figures are drawn off screen, without pyplot: no window, no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from lddyn.files import replace_file
from lddyn.report.data import StepData
from lddyn.text import printable, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

__all__ = [
    "FAINT",
    "INK",
    "LOWERED",
    "RAISED",
    "blank_figure",
    "save_picture",
    "sequence_colours",
    "tidy",
]

RAISED, LOWERED = "#2166ac", "#b2182b"  # the ends of ColorBrewer's RdBu, safe for colour-blind eyes

DIVERGING = "RdBu"

INK, FAINT = "#222222", "#888888"

_SEQUENCES = ("#1b9e77", "#c05ca0", "#e6ab02", "#4f8fcb", "#a6761d", "#666633")

_OTHERS = {"history": "#7f7f7f", "weight decay": "#b8a070"}

DPI = 150

_LONGEST = 14  # characters of a token's text on an axis


def sequence_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per source of change: update sequences, history, weight decay."""
    colours: dict[str, str] = {}
    for name in names:
        number = len([n for n in colours if n not in _OTHERS])
        colours[name] = _OTHERS.get(name) or _SEQUENCES[number % len(_SEQUENCES)]
    return colours


def pretty(name: str) -> str:
    """y- with a real minus."""
    return "y−" if name == "y-" else printable(name)


@cache
def _glyphs() -> frozenset[int]:
    """Characters that the default font can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def drawable(text: str) -> str:
    """The text, with □ for characters that the font does not have."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in text)


def _label(text: str) -> str:
    """A token's text as an axis shows it."""
    return drawable(visible(text, _LONGEST))


def blank_figure(width: float, height: float, name: str) -> Figure:
    """An off-screen figure; its label is its file name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_label(name)
    return figure


def save_picture(
    figure: Figure, target: str | Path | BinaryIO, kind: Literal["png", "pdf"], dpi: float
) -> None:
    """Writes a figure as PNG or PDF; the same figure has the same bytes, without a date.

    `Figure.savefig` draws every picture once more, for the sake of layouts that depend on it. Here
    a layout is computed once and kept. A file is written as a whole, and never through a link.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    before, canvas = figure.dpi, figure.canvas
    buffer = io.BytesIO()
    try:
        figure.set_dpi(dpi)
        if kind == "png":
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "lddyn"})
        else:
            FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
    finally:
        figure.set_dpi(before)
        figure.set_canvas(canvas)
    data = buffer.getvalue()
    if isinstance(target, str | Path):
        replace_file(Path(target), data)
    else:
        target.write(data)


def plain_text(artist: Any) -> Any:
    """Text that is shown as it is: "$" starts no formula."""
    artist.set_parse_math(False)
    return artist


def tidy(axes: Axes, *, keep: Sequence[str] = ("left", "bottom")) -> None:
    """Only the spines that carry a scale, thin ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)
        spine.set_linewidth(0.6)
    axes.tick_params(width=0.6, length=2.5, color=FAINT, labelcolor=INK, labelsize=8)


def lettering(texts: Sequence[str], cell: float) -> tuple[int, float, float]:
    """For labels `cell` inches apart: label every n-th, font size, inches of the longest label."""
    every = max(1, int(np.ceil(0.07 / cell)))
    size = float(np.clip(cell * every * 72 * 0.8, 4.8, 9.0 if every == 1 else 6.0))
    letters = max((len(_label(t)) for t in texts[::every]), default=1)
    return every, size, 0.06 + letters * size * 0.62 / 72


def token_ticks(
    axes: Axes, axis: Literal["x", "y"], positions: Any, texts: Sequence[str], cell: float
) -> None:
    """Token texts on an axis, `cell` inches apart, thinned out where there is no room for all."""
    every, size, _ = lettering(texts, cell)
    at = np.asarray(positions)[::every]
    labels = [_label(t) for t in texts][::every]
    if axis == "x":
        axes.set_xticks(at, labels, rotation=90, fontsize=size)
        shown = axes.get_xticklabels()
    else:
        axes.set_yticks(at, labels, fontsize=size)
        shown = axes.get_yticklabels()
    for label in shown:
        plain_text(label)
    axes.tick_params(axis=axis, length=1.5, pad=1.5)


def rectangle(x: float, y: float, w: float, h: float, **style: Any) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), w, h, clip_on=False, **style)


def stacked(
    axes: Axes,
    at: np.ndarray,
    parts: Mapping[str, np.ndarray],
    colours: Mapping[str, str],
    thickness: float,
) -> None:
    """Horizontal bars of every source, positive ones to the right of 0, negative to the left."""
    right, left = np.zeros(len(at)), np.zeros(len(at))
    for name, values in parts.items():
        start = np.where(values > 0, right, left)
        axes.barh(at, values, left=start, height=thickness, color=colours[name], linewidth=0)
        right, left = right + values.clip(min=0), left + values.clip(max=0)


def step_line(step: StepData) -> str:
    """The step in one line: objective, optimizer, learning rate, loss, rule."""
    named = step["settings"]
    beta = f", β {named['beta']:g}" if "beta" in named else ""
    clip = named.get("clip_factor", 1.0)
    clipped = f", clipped ×{clip:.2g}" if clip != 1.0 else ""
    return drawable(
        f"one {named.get('objective', 'custom')} step, {named.get('optimizer', '')} lr "
        f"{step['lr']:g}{beta}{clipped}, loss {step['loss']:.3g}, rule {step['rule']}"
    )


def slug(name: str) -> str:
    """A response's name as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40] or "response"
