"""Colours, frames and labelled curves for the pictures of all language-model experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lddyn.probes.probe_set import TYPES
from lddyn.report.canvas import FAINT, INK, blank_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "COLOURS",
    "GROUP_COLOURS",
    "Ends",
    "axes_grid",
    "curves",
    "heat_map",
    "label_ends",
    "tidy",
]

# Okabe and Ito's palette, safe for colour-blind eyes; every group has a hue, every type a line.
GROUP_COLOURS = {"answers": "#0072b2", "other": "#009e73", "noise": "#999999"}
COLOURS = {
    "chosen": "#0072b2",
    "chosen_initial": "#56b4e9",
    "chosen_selfr": "#56b4e9",
    "chosen_gptsemantic": "#56b4e9",
    "chosen_gptformat": "#7fb8d8",
    "rejected": "#d55e00",
    "reject_gptsemantic": "#e69f00",
    "reject_gptformat": "#e8b96a",
    "irr_train": "#009e73",
    "irr_test": "#5cbf9f",
    "irr_hum": "#a3cfc0",
    "random_permute": "#555555",
    "random_nonhum": "#aaaaaa",
    "greedy": "#cc79a7",
}
_STYLES = {
    "chosen_initial": ":",
    "chosen_gptformat": "--",
    "reject_gptformat": "--",
    "irr_hum": ":",
    "greedy": "-.",
}


def axes_grid(
    name: str, rows: int, columns: int, width: float, height: float, **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """An off-screen figure and its axes, flat."""
    figure = blank_figure(width, height, name)
    figure.set_layout_engine("constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, **kwargs)).ravel()


def label(name: str) -> str:
    """A response type in words."""
    return TYPES[name].label if name in TYPES else name


def curves(
    axes: Axes, x: Sequence[float], lines: Mapping[str, np.ndarray], title: str, unit: str
) -> Ends:
    """One line per response type; returns where the lines end, for `label_ends`."""
    for name, y in lines.items():
        strong = name in ("chosen", "rejected", "greedy")
        axes.plot(
            x,
            y,
            _STYLES.get(name, "-"),
            color=COLOURS.get(name, INK),
            linewidth=2.0 if strong else 1.2,
            solid_capstyle="round",
        )
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    axes.set_ylabel(unit, fontsize=8, color=INK)
    axes.set_xlabel("updates", fontsize=8, color=INK)
    axes.axhline(0, color=FAINT, linewidth=0.5, zorder=0)
    tidy(axes)
    return Ends(axes, x[-1], {name: float(y[-1]) for name, y in lines.items()})


class Ends(NamedTuple):
    """Where the lines of some axes end: x, and name of the line → y."""

    axes: Axes
    x: float
    y: Mapping[str, float]


def label_ends(figure: Figure, ends: Sequence[Ends]) -> None:
    """Names beside the ends of lines, once all axes are drawn: their layout is computed once."""
    figure.draw_without_rendering()  # so that the layout is known
    for axes, x, y in ends:
        _label_ends(figure, axes, x, y)


def _label_ends(figure: Figure, axes: Axes, x: float, ends: Mapping[str, float]) -> None:
    """Names of the lines of some axes, moved apart until none covers another."""
    inches = figure.get_size_inches()[1] * max(axes.get_position().height, 1e-3)
    gap = 0.13 / inches
    names = sorted(ends, key=lambda name: ends[name])
    to_axes = axes.transData + axes.transAxes.inverted()
    at = [float(to_axes.transform((x, ends[name]))[1]) for name in names]
    for _ in range(500):
        moved = False
        for i in range(len(at) - 1):
            short = gap - (at[i + 1] - at[i])
            if short > 1e-6:
                at[i] -= short / 2
                at[i + 1] += short / 2
                moved = True
        if not moved:
            break
    over = max(0.0, at[-1] - 1.0) if at else 0.0  # keep clear of the title
    at = [y - over for y in at]
    for name, y in zip(names, at, strict=True):
        axes.annotate(
            label(name),
            (x, ends[name]),
            (1.03, y),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=COLOURS.get(name, INK),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 0.4,
                "color": COLOURS.get(name, INK),
                "shrinkA": 0,
                "shrinkB": 1,
            },
        )


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    largest: float | None = None,
) -> AxesImage:
    """Numbers in cells: blue raised, red lowered."""
    largest = largest or float(np.nanmax(np.abs(values)))
    image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            value = values[i, j]
            dark = abs(value) > 0.6 * largest
            axes.text(
                j,
                i,
                f"{value:.2f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark else INK,
            )
    axes.set_xticks(range(len(columns)), [label(c) for c in columns], rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [label(r) for r in rows])
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    axes.tick_params(labelsize=7.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image
