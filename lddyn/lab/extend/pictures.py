"""Pictures of the experiment on SFT before DPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lddyn.lab.curves import Curves
from lddyn.lab.drawing import axes_grid, curves, label_ends, tidy
from lddyn.lab.record import Rows
from lddyn.report.canvas import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "y+ only": "#d55e00",
    "both": "#0072b2",
    "y+ only, gate": "#cc79a7",
    "y+ only, NLL": "#009e73",
}


def draw_sft(tuned: Mapping[str, Curves]) -> Figure:
    """Curves of the two SFT runs."""
    figure, grid = axes_grid("sft", 1, 2, 11, 4.4, sharey=True)
    ends = []
    for axes, (name, curve) in zip(grid, tuned.items(), strict=True):
        lines = {n: curve.mean(n) - curve.mean(n)[0] for n in curve.fields}
        ends.append(curves(axes, curve.updates, lines, f"SFT on {name}", "Δ log π, nats"))
    label_ends(figure, ends)
    return figure


def draw_dpo(runs: Mapping[str, Curves]) -> Figure:
    """Curves of the four DPO runs."""
    figure, grid = axes_grid("dpo", 1, 4, 14, 3.8)
    panels = {
        "y+": ("log_prob", ("chosen",)),
        "y−": ("log_prob", ("rejected",)),
        "answers to other prompts": ("log_prob", ("irr_train", "irr_test", "irr_hum")),
        "greedy confidence of y+": ("greedy", ("chosen",)),
    }
    for axes, (title, (kind, names)) in zip(grid, panels.items(), strict=True):
        ends = {}
        for name, curve in runs.items():
            y = np.mean([curve.mean(n, kind) for n in names if n in curve.fields], axis=0)
            y = y - y[0]
            axes.plot(curve.updates, y, color=_COLOURS[name], linewidth=1.8)
            ends[name] = float(y[-1])
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.set_title(f"Δ log π of DPO: {title}", fontsize=9, loc="left")
        axes.set_xlabel("updates", fontsize=8)
        axes.margins(y=0.1)
        tidy(axes)
    figure.legend(
        grid[0].lines[: len(runs)],
        [f"SFT on {name}" for name in runs],
        labelcolor="linecolor",
        loc="outside upper left",
        ncols=len(runs),
        frameon=False,
        fontsize=8,
    )
    return figure


def draw_summary(rows: Rows) -> Figure:
    """Bars of the runs after DPO; a black line is the value before it."""
    shown = ("unrelated", "greedy", "squeeze ratio", "held-out accuracy", "repeated", "distinct 2")
    titles = (
        "unrelated, nats",
        "greedy, nats",
        "y−'s mass to the likeliest",
        "held-out accuracy",
        "repeated runs",
        "distinct pairs",
    )
    figure, grid = axes_grid("summary", 1, len(shown), 15, 2.2)
    for axes, key, title in zip(grid, shown, titles, strict=True):
        for at, row in enumerate(rows):
            axes.barh(at, row[key], color=_COLOURS[row["run"]], height=0.7)
            if f"{key} before" in row:
                axes.plot([row[f"{key} before"]] * 2, [at - 0.35, at + 0.35], color=INK)
            axes.annotate(
                f"{row[key]:.2f}".replace("-", "−"),
                (row[key], at),
                fontsize=7,
                va="center",
                xytext=(3 if row[key] >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if row[key] >= 0 else "right",
            )
        names = [f"SFT on {row['run']}" for row in rows] if axes is grid[0] else [""] * len(rows)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.margins(x=0.28)
        axes.set_title(title, fontsize=9, loc="left")
        tidy(axes)
    return figure
