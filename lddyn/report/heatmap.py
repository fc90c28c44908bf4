"""The token × token table of one response as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lddyn.files import JsonObject
from lddyn.report.canvas import (
    DIVERGING,
    FAINT,
    INK,
    LOWERED,
    RAISED,
    blank_figure,
    drawable,
    lettering,
    plain_text,
    pretty,
    rectangle,
    sequence_colours,
    slug,
    stacked,
    step_line,
    tidy,
    token_ticks,
)
from lddyn.report.data import ResponseData, StepData
from lddyn.text import printable, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

__all__ = ["plot_influence"]

_ABOVE, _BESIDE, _TITLE, _LEGEND = 0.75, 1.25, 0.95, 0.62  # inches around the table


@dataclass(frozen=True)
class _Layout:
    """Where things are, in inches from the lower left corner, and the columns' left edges.

    Attributes:
        edges: Update sequence -> left edge of each of its columns, in columns.
        span: Width of all columns and the gaps between sequences, in columns.
        cell_x, cell_y: Size of a cell.
        left, base: Lower left corner of the table.
        wide, high: Size of the table.
        width, height: Size of the figure.
    """

    edges: dict[str, np.ndarray]
    span: float
    cell_x: float
    cell_y: float
    left: float
    base: float
    wide: float
    high: float
    width: float
    height: float

    def axes(self, figure: Figure, x: float, y: float, w: float, h: float) -> Axes:
        """Axes at a place given in inches."""
        return figure.add_axes((x / self.width, y / self.height, w / self.width, h / self.height))

    @property
    def centres(self) -> np.ndarray:
        """Middle of every column."""
        return np.concatenate([edges + 0.5 for edges in self.edges.values()])


def plot_influence(step: StepData, index: int = 0) -> Figure:
    """The token × token table of one response: what update token l did to observed token m.

    Args:
        step: The step.
        index: Which of its observed responses; the number is part of the file name.

    Returns:
        A figure with the heat map, the column sums above it and the row sums beside it.
    """
    response = step["observed"][index]
    table = np.asarray(response["influence"], dtype=float)
    parts = {k: np.asarray(v, dtype=float) for k, v in response["by_sequence"].items()}
    texts = [token["text"] for token in step["update_tokens"]]
    at = _layout(step, response, texts)
    name = f"influence-{index}-{slug(response['name'])}"
    figure = blank_figure(at.width, at.height, name)
    heat = at.axes(figure, at.left, at.base, at.wide, at.high)
    top = at.axes(figure, at.left, at.base + at.high + 0.1, at.wide, _ABOVE)
    side = at.axes(figure, at.left + at.wide + 0.12, at.base, _BESIDE, at.high)
    colours = sequence_colours(list(parts))
    mesh, largest = _draw_table(heat, step, response, table, texts, at)
    _draw_column_sums(top, table.sum(0), parts, colours, at)
    _draw_row_sums(side, parts, colours, at)
    _draw_scale(figure, mesh, largest, at)
    _draw_title(figure, step, response, at)
    return figure


def _layout(step: StepData, response: ResponseData, texts: list[str]) -> _Layout:
    m, n = len(response["tokens"]), len(texts)
    sequences = step["sequences"]
    gap = max(0.6, 0.02 * n) if len(sequences) > 1 else 0.0
    edges, offset = {}, 0.0
    for name, (start, stop) in sequences.items():
        edges[name] = offset + np.arange(stop - start, dtype=float)
        offset += stop - start + gap
    span = n + gap * (len(sequences) - 1)
    cell_x = float(np.clip(12.5 / span, 0.05, 0.34))
    cell_y = float(np.clip(9.0 / m, 0.05, 0.34))
    cell_x, cell_y = min(cell_x, 2.2 * cell_y), min(cell_y, 2.2 * cell_x)
    wide, high = max(2.4, span * cell_x), max(1.2, m * cell_y)
    cell_x, cell_y = wide / span, high / m
    below = 0.08 + lettering(texts, cell_x)[2]
    left = 0.42 + lettering(response["tokens"], cell_y)[2]
    width = max(left + wide + 0.12 + _BESIDE + 0.25, 6.4)
    height = _LEGEND + below + high + 0.1 + _ABOVE + _TITLE
    return _Layout(edges, span, cell_x, cell_y, left, _LEGEND + below, wide, high, width, height)


def _draw_table(
    heat: Axes,
    step: StepData,
    response: ResponseData,
    table: np.ndarray,
    texts: list[str],
    at: _Layout,
) -> tuple[QuadMesh, float]:
    """The table itself; returns what its colours mean and the largest magnitude."""
    from matplotlib.colors import AsinhNorm

    m = len(table)
    largest = float(np.abs(table).max()) or 1.0
    # A few entries are far larger than the rest: the colours grow slower beyond 5 % of the largest.
    norm = AsinhNorm(0.05 * largest, -largest, largest)
    for name, (start, stop) in step["sequences"].items():
        x = np.append(at.edges[name], at.edges[name][-1] + 1)
        part = table[:, start:stop]
        mesh = heat.pcolormesh(
            x, np.arange(m + 1), part, cmap=DIVERGING, norm=norm, rasterized=True
        )
        heat.add_patch(
            rectangle(x[0], 0, x[-1] - x[0], m, fill=False, edgecolor=FAINT, linewidth=0.5)
        )
    heat.set_xlim(0, at.span)
    heat.set_ylim(m, 0)
    for spine in heat.spines.values():
        spine.set_visible(False)
    token_ticks(heat, "x", at.centres, texts, at.cell_x)
    token_ticks(heat, "y", np.arange(m) + 0.5, response["tokens"], at.cell_y)
    label = drawable(f"tokens of {printable(response['name'])}")
    plain_text(heat.set_ylabel(label, fontsize=9, color=INK))
    return mesh, largest


def _draw_column_sums(
    top: Axes,
    sums: np.ndarray,
    parts: dict[str, np.ndarray],
    colours: dict[str, str],
    at: _Layout,
) -> None:
    """What each token of the update did to the whole response, with the sequences' totals."""
    top.bar(at.centres, sums, width=0.8, color=[RAISED if s > 0 else LOWERED for s in sums])
    top.axhline(0, color=INK, linewidth=0.6)
    top.set_xlim(0, at.span)
    top.set_xticks([])
    top.margins(y=0.12)
    tidy(top, keep=("left",))
    top.locator_params(axis="y", nbins=4)
    top.set_ylabel("column\nsum, nats", fontsize=7.5, color=INK)
    across = top.get_xaxis_transform()
    for name, edges in at.edges.items():
        x0, x1 = edges[0], edges[-1] + 1
        top.plot(
            [x0, x1],
            [1.04, 1.04],
            transform=across,
            clip_on=False,
            color=colours[name],
            linewidth=2.2,
            solid_capstyle="butt",
        )
        text = drawable(f"{pretty(name)}: {signed(parts[name].sum())}")
        style: JsonObject = {"ha": "center", "va": "bottom", "fontsize": 8.5, "color": INK}
        plain_text(top.text((x0 + x1) / 2, 1.1, text, transform=across, **style))


def _draw_row_sums(
    side: Axes, parts: dict[str, np.ndarray], colours: dict[str, str], at: _Layout
) -> None:
    """What each source did to every token of the response."""
    net = np.sum(list(parts.values()), axis=0)
    m = len(net)
    rows = np.arange(m) + 0.5
    stacked(side, rows, parts, colours, thickness=0.8)
    side.plot(net, rows, "D", color=INK, markersize=float(np.clip(at.cell_y * 72 * 0.4, 1.4, 4)))
    side.axvline(0, color=INK, linewidth=0.6)
    side.set_ylim(m, 0)
    side.set_yticks([])
    side.margins(x=0.08)
    tidy(side, keep=("bottom",))
    side.locator_params(axis="x", nbins=3)
    side.set_xlabel("row sum, nats", fontsize=7.5, color=INK)
    side.set_title("by source, ◆ net", fontsize=7.5, color=INK, pad=3)


def _draw_scale(figure: Figure, mesh: QuadMesh, largest: float, at: _Layout) -> None:
    """The colour bar and what a cell means."""
    bar = at.axes(figure, at.left, 0.4, min(at.wide, 3.6), 0.1)
    scale = figure.colorbar(mesh, cax=bar, orientation="horizontal")
    ticks = [-largest, -0.1 * largest, 0, 0.1 * largest, largest]
    scale.set_ticks(ticks, labels=[signed(t, 2) for t in ticks])
    scale.ax.minorticks_off()
    scale.outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2, color=FAINT)
    note = "nats: change of log π of the row's token made by the column's token (arcsinh scale)"
    figure.text(at.left / at.width, 0.06 / at.height, note, fontsize=7, color=INK)


def _draw_title(figure: Figure, step: StepData, response: ResponseData, at: _Layout) -> None:
    change = sum(response["delta_logp"])
    verb = "rose" if change > 0 else "fell"
    title = f"{printable(response['name'])} {verb} by {signed(change).lstrip('+−')} nats"
    x, y = 0.18 / at.width, 1 - 0.12 / at.height
    style: JsonObject = {"va": "top", "fontsize": 12.5, "weight": "bold", "color": INK}
    plain_text(figure.text(x, y, drawable(title), **style))
    y = 1 - 0.4 / at.height
    plain_text(figure.text(x, y, step_line(step), va="top", fontsize=8, color="#555555"))
