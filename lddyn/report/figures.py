"""Pictures of one step: every response token by token, and through which block the change went."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lddyn.files import JsonObject
from lddyn.report.canvas import (
    DPI,
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
    save_picture,
    sequence_colours,
    stacked,
    step_line,
    tidy,
    token_ticks,
)
from lddyn.report.data import ResponseData, StepData
from lddyn.report.heatmap import plot_influence
from lddyn.text import printable, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_blocks", "plot_influence", "plot_overview", "plot_step"]

_TEXTS = 12  # with more responses the tokens' texts are left out


def plot_overview(step: StepData) -> Figure:
    """One line per observed response, token by token, and its total split by source.

    Args:
        step: The step.

    Returns:
        A figure: on the left Δ log π of each token, on the right what y+, y−, … add up to.
    """
    observed = step["observed"]
    count, longest = len(observed), max(len(o["tokens"]) for o in observed)
    wide = float(np.clip(0.105 * longest, 4.2, 9.5))
    cell = min(wide / longest, 0.125)  # of the lettering
    texts = count <= _TEXTS
    under = 0.1 + max(lettering(o["tokens"], cell)[2] for o in observed) if texts else 0.12
    high = 0.95 if count <= 8 else 0.6
    left, right, gap, title, foot = 0.95, 3.0, 1.55, 0.95, 0.6
    width = left + wide + gap + right + 0.3
    panel = high + under + 0.16
    height = title + count * panel + foot
    figure = blank_figure(width, height, "overview")

    def place(x: float, y: float, w: float, h: float, **share: Any) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, h / height), **share)

    first: Axes | None = None
    middles = []
    for i, response in enumerate(observed):
        bottom = height - title - i * panel - high
        middles.append(bottom + high / 2)
        axes = place(left, bottom, wide, high, sharey=first)
        first = first or axes
        _draw_line(axes, response, longest, cell if texts else None)
    bars = place(left + wide + gap, foot, right, height - title - foot + 0.16)
    bars.set_ylim(foot, height - title + 0.16)
    _draw_totals(bars, observed, np.array(middles), panel)
    _heading(figure, "What the step did to every response")
    plain_text(
        figure.text(
            0.18 / width, 1 - 0.4 / height, step_line(step), va="top", fontsize=8, color="#555555"
        )
    )
    return figure


def _heading(figure: Figure, text: str) -> None:
    width, height = figure.get_size_inches()
    style: JsonObject = {"va": "top", "fontsize": 12.5, "weight": "bold", "color": INK}
    figure.text(0.18 / width, 1 - 0.12 / height, text, **style)


def _draw_line(axes: Axes, response: ResponseData, longest: int, cell: float | None) -> None:
    """Δ log π token by token; `cell` inches a token's text, None for no texts."""
    values = np.asarray(response["delta_logp"], dtype=float)
    x = np.arange(len(values)) + 0.5
    for side, colour in ((values >= 0, RAISED), (values <= 0, LOWERED)):
        axes.fill_between(
            x, values, 0, where=side, color=colour, alpha=0.22, linewidth=0, interpolate=True
        )
    axes.plot(x, values, color=INK, linewidth=0.9)
    axes.plot(x, values, ".", color=INK, markersize=2.4)
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.set_xlim(0, longest)
    tidy(axes, keep=("left",))
    axes.locator_params(axis="y", nbins=4)
    if cell is None:
        axes.set_xticks([])
    else:
        token_ticks(axes, "x", x, response["tokens"], cell)
    title = drawable(printable(response["name"]))
    plain_text(axes.set_title(title, loc="left", fontsize=8.5, weight="bold", color=INK, pad=2))
    axes.set_ylabel("Δ log π, nats", fontsize=7.5, color=INK)


def _draw_totals(
    bars: Axes, observed: Sequence[ResponseData], at: np.ndarray, panel: float
) -> None:
    """Each response's total as stacked bars, a colour a source, with the net as a diamond."""
    names = list(dict.fromkeys(k for o in observed for k in o["by_sequence"]))
    colours = sequence_colours(names)
    totals = {k: np.array([sum(o["by_sequence"].get(k, [])) for o in observed]) for k in names}
    stacked(bars, at, totals, colours, thickness=min(0.5, 0.4 * panel))
    net = np.array([sum(o["delta_logp"]) for o in observed])
    bars.plot(net, at, "D", color=INK, markersize=5, zorder=5)
    above = float(sum(np.clip(v, 0, None) for v in totals.values()).max())
    below = float(sum(np.clip(v, None, 0) for v in totals.values()).min())
    reach = max(above, -below, 1e-30)
    bars.set_xlim(min(0.0, below) - 0.12 * reach, max(0.0, above) + 0.12 * reach)
    for y, value in zip(at, net, strict=True):
        bars.annotate(
            f"net {signed(value)}",
            (value, y),
            xytext=(0, 22 if panel > 1.3 else 15),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
    bars.axvline(0, color=INK, linewidth=0.6)
    bars.set_yticks(at, [drawable(printable(o["name"])) for o in observed], fontsize=8)
    for label in bars.get_yticklabels():
        plain_text(label)
    tidy(bars, keep=("bottom",))
    bars.tick_params(axis="y", length=0)
    bars.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    bars.set_axisbelow(True)
    bars.set_xlabel("Δ log π of the whole response, nats", fontsize=8, color=INK)
    _draw_legend(bars, colours)


def _draw_legend(bars: Axes, colours: dict[str, str]) -> None:
    legend = bars.legend(
        handles=[
            rectangle(0, 0, 1, 1, facecolor=colour, label=drawable(f"from {pretty(name)}"))
            for name, colour in colours.items()
        ],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(colours),
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    for label in legend.get_texts():
        plain_text(label)


def plot_blocks(step: StepData) -> Figure:
    """Where in the network the change passed: nats per block, one panel per response.

    Args:
        step: The step.

    Returns:
        The figure; its bars add up to each response's Δ log π.
    """
    observed = step["observed"]
    names = sorted({k for o in observed for k in o["by_block"]}, key=_depth)
    lines = -(-len(observed) // 6)
    columns = -(-len(observed) // lines)
    wide, high = 1.75, max(1.1, 0.22 * len(names))
    left, title, foot, gap = 1.6, 0.85, 0.5, 0.85
    width = left + columns * (wide + 0.25) + 0.2
    height = title + lines * (high + gap) - gap + foot
    figure = blank_figure(width, height, "blocks")
    first: Axes | None = None
    for i, response in enumerate(observed):
        line, column = divmod(i, columns)
        x, y = left + column * (wide + 0.25), height - title - line * (high + gap) - high
        corner = (x / width, y / height, wide / width, high / height)
        axes = figure.add_axes(corner, sharex=first)
        first = first or axes
        _draw_blocks(axes, response, names, labelled=column == 0)
    _heading(figure, "Through which block the change passed")
    return figure


def _draw_blocks(axes: Axes, response: ResponseData, names: Sequence[str], labelled: bool) -> None:
    """A bar a block."""
    values = np.array([response["by_block"].get(k, 0.0) for k in names])
    y = np.arange(len(names))
    axes.barh(y, values, height=0.72, color=[RAISED if v > 0 else LOWERED for v in values])
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    tidy(axes, keep=("bottom",))
    axes.set_yticks(y, names if labelled else [])
    for label in axes.get_yticklabels():
        plain_text(label)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=3)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("nats", fontsize=7.5, color=INK)
    change = signed(sum(response["delta_logp"]))
    total = f"{drawable(printable(response['name']))}\n{change} nats"
    plain_text(axes.set_title(total, fontsize=8.5, color=INK, pad=3))


def _depth(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, blocks by number, then head and the rest."""
    if name == "embedding":
        return 0, 0, name
    number = re.fullmatch(r"block (\d+)", name)
    return (1, int(number[1]), name) if number else (2, 0, name)


def plot_step(step: StepData, directory: str | Path | None = None) -> list[Figure]:
    """All pictures of a step: overview, blocks, and one heat map per response.

    Args:
        step: The step, `Decomposition.to_dict()`.
        directory: Also write `overview`, `blocks` and `influence-<i>-<name>` there, each as .png
            and .pdf. Created if it is not there.

    Returns:
        The figures, in this order; `figure.get_label()` is the file name without its ending.

    Example:
        >>> # figures = lddyn.decompose(...).plot("runs/mine")
    """
    figures = [plot_overview(step), plot_blocks(step)]
    figures += [plot_influence(step, i) for i in range(len(step["observed"]))]
    if directory is not None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            name = figure.get_label()
            save_picture(figure, directory / f"{name}.png", "png", DPI)
            save_picture(figure, directory / f"{name}.pdf", "pdf", DPI)
    return figures
