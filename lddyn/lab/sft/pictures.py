"""Pictures of the SFT experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lddyn.lab.curves import Curves, explained_share
from lddyn.lab.drawing import (
    COLOURS,
    GROUP_COLOURS,
    Ends,
    axes_grid,
    curves,
    heat_map,
    label_ends,
    tidy,
)
from lddyn.lab.sft.tables import kernel_means
from lddyn.probes.probe_set import TYPES
from lddyn.report.canvas import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(run: Curves) -> Figure:
    """Four panels: answers, other responses, confidence of y+, energies."""
    figure, grid = axes_grid("curves", 2, 2, 11, 7.2)
    by_group = {
        "answers to the prompt": [n for n in run.fields if TYPES[n].group == "answers"],
        "other texts": ["chosen", *[n for n in run.fields if TYPES[n].group != "answers"]],
    }
    ends = []
    for axes, (title, names) in zip(grid, by_group.items(), strict=False):
        lines = {n: run.mean(n) - run.mean(n)[0] for n in names}
        ends.append(curves(axes, run.updates, lines, f"Δ log π, {title}", "nats, sum over tokens"))
    confidence = {"chosen": run.mean("chosen"), "greedy": run.mean("chosen", "greedy")}
    title = "log π(y+) and its greedy confidence"
    ends.append(curves(grid[2], run.updates, confidence, title, "nats"))
    energy = {n: run.means["energy"][:, run.column(n)] for n in run.fields}
    title = "‖G‖² = ‖π − e_y‖² if it were learned"
    ends.append(curves(grid[3], run.updates, energy, title, "per token"))
    label_ends(figure, ends)
    return figure


def draw_kernel(run: Curves) -> Figure:
    """‖K‖_F over training by response type, and √LBK / η beside it."""
    means = kernel_means(run)
    points = sorted({row["update"] for row in run.raw["kernel"]})
    figure, grid = axes_grid("kernel", 1, 2, 11, 4.6)
    panels = (("norm", "‖K‖_F, true"), ("lbk_norm", "√LBK / η, the paper's lower bound"))
    for axes, (key, title) in zip(grid, panels, strict=True):
        for name, values in means.items():
            axes.plot(points, values[key], marker="o", markersize=3, color=COLOURS[name])
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9.5, loc="left", color=INK)
        axes.set_xlabel("updates", fontsize=8)
        tidy(axes)
    last = [{n: v[key][-1] for n, v in means.items()} for key, _ in panels]
    label_ends(figure, [Ends(a, points[-1], y) for a, y in zip(grid, last, strict=True)])
    return figure


def draw_influence(maps: Mapping[str, np.ndarray], fields: Sequence[str]) -> Figure:
    """Influence between response types, at the start and at the end."""
    figure, grid = axes_grid("influence", 1, 2, 13, 5.6, sharey=True)
    for axes, (when, values) in zip(grid, maps.items(), strict=True):
        mean = np.nanmean(values.astype(float), axis=0)
        heat_map(axes, mean, fields, fields, f"influence at the {when}: update ↓, observed →", 1.0)
    return figure


def draw_first_order(run: Curves) -> Figure:
    """Predicted against measured changes: single updates, and their sum."""
    figure, grid = axes_grid("first_order", 1, 2, 9.6, 4.2)
    types = run.raw["explained types"]
    parts = run.raw["explained"]
    predicted = np.array([p["predicted"]["chosen"] for p in parts])
    measured = np.array([p["measured"] for p in parts])
    panels = (
        ("each update", predicted.ravel(), measured.ravel(), list(types) * len(parts)),
        (f"added up over {len(parts)} updates", predicted.sum(0), measured.sum(0), list(types)),
    )
    for axes, (title, x, y, names) in zip(grid, panels, strict=True):
        groups = np.array([TYPES[n].group for n in names])
        for group, colour in GROUP_COLOURS.items():
            at = groups == group
            axes.scatter(x[at], y[at], s=7, c=colour, linewidths=0, alpha=0.8, label=group)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=INK, linewidth=0.6, zorder=0)
        share = explained_share(x, y)
        axes.set_title(f"{title}: {100 * share:.0f} % explained", fontsize=9.5, loc="left")
        axes.set_xlabel("predicted Δ log π, nats", fontsize=8)
        axes.set_ylabel("measured Δ log π, nats", fontsize=8)
        tidy(axes)
    legend = {"answers": "answers to the prompt", "other": "other texts", "noise": "noise"}
    handles, groups_shown = grid[0].get_legend_handles_labels()
    grid[0].legend(handles, [legend[g] for g in groups_shown], fontsize=8, frameon=False)
    return figure
