"""The picture of the probing set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lddyn.lab.drawing import GROUP_COLOURS, axes_grid, tidy
from lddyn.lab.record import Rows
from lddyn.probes.probe_set import TYPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_types(by_type: Rows) -> Figure:
    """Log π and entropy per token of every response type."""
    shown = [row for row in by_type if "log_prob" in row]
    figure, grid = axes_grid("types", 1, 2, 9.6, 0.9 + 0.28 * len(shown))
    for axes, key, title in (
        (grid[0], "log_prob", "log π per token, nats"),
        (grid[1], "entropy", "entropy per token, nats"),
    ):
        for at, row in enumerate(shown):
            axes.barh(at, row[key], color=GROUP_COLOURS[row["group"]], height=0.72)
            axes.annotate(
                f"{row[key]:.2f}".replace("-", "−"),
                (row[key], at),
                fontsize=7.5,
                va="center",
                xytext=(-3 if row[key] < 0 else 3, 0),
                textcoords="offset points",
                ha="right" if row[key] < 0 else "left",
            )
        axes.set_yticks(range(len(shown)), [TYPES[row["type"]].label for row in shown])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_title(title, fontsize=9.5, loc="left")
        tidy(axes)
    grid[1].set_yticklabels([])
    return figure
