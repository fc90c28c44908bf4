"""Pictures of the DPO experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lddyn.lab.dpo.tables import AGAIN, ON_POLICY, Runs, off_policy, terms
from lddyn.lab.drawing import COLOURS, axes_grid, curves, label, label_ends, tidy
from lddyn.lab.mass import (
    shares_of_mass,
    total_mass,
)
from lddyn.lab.record import Lab, Rows
from lddyn.report.canvas import INK, LOWERED, RAISED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_PLACES = {
    "response": ("y− itself", "#d55e00"),
    "likeliest other": ("likeliest other token", "#0072b2"),
    "top": ("rest of the ten likeliest", "#56b4e9"),
    "rest": ("all others", "#999999"),
}


def draw(lab: Lab, runs: Runs) -> None:
    """All pictures of the experiment."""
    lab.figure(
        "curves", _draw_curves(runs), "Change of log π of every response type, mean over prompts."
    )
    main = [row for row in terms(runs.curves) if row["run"] == runs.main]
    lab.figure("terms", _draw_terms(main), "The two terms of Eq. 7, and their sum.")
    lab.figure("mass", _draw_mass(runs.mass, runs.steps), "Where the probability of y− went.")
    lab.figure("longer", _draw_longer(runs), "How DPO changes after longer SFT.")


def _draw_curves(runs: Runs) -> Figure:
    panels = {
        f"DPO, off-policy, after {runs.lengths[-1]} updates of SFT": runs.curves[runs.main],
        "DPO, on-policy": runs.curves[ON_POLICY],
        AGAIN: runs.curves[AGAIN],
    }
    figure, grid = axes_grid("curves", 1, 3, 15, 4.6, sharey=True)
    ends = []
    for axes, (title, curve) in zip(grid, panels.items(), strict=True):
        lines = {n: curve.mean(n) - curve.mean(n)[0] for n in curve.fields}
        lines["greedy"] = curve.mean("chosen", "greedy") - curve.mean("chosen", "greedy")[0]
        unit = "Δ log π, nats" if axes is grid[0] else ""
        ends.append(curves(axes, curve.updates, lines, title, unit))
    label_ends(figure, ends)
    return figure


def _draw_terms(rows: Rows) -> Figure:
    figure, grid = axes_grid("terms", 1, 1, 8, 0.9 + 0.3 * len(rows))
    axes = grid[0]
    for at, row in enumerate(rows):
        axes.barh(at - 0.18, row["y+ term"], 0.34, color=RAISED)
        axes.barh(at + 0.18, row["y- term"], 0.34, color=LOWERED)
        axes.plot(row["y+ term"] + row["y- term"], at, "D", color=INK, markersize=4)
        axes.plot(row["measured"], at, "o", markerfacecolor="none", color=INK, markersize=8)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(range(len(rows)), [label(row["type"]) for row in rows])
    axes.invert_yaxis()
    axes.set_title(
        "effect of an update's y+ term (blue) and y− term (red); ◆ their sum, ○ measured",
        fontsize=9.5,
        loc="left",
    )
    axes.set_xlabel("Δ log π per update, nats", fontsize=8)
    tidy(axes)
    return figure


def _draw_mass(flows: Mapping[str, Sequence[Mapping[str, float]]], step: Rows) -> Figure:
    figure, grid = axes_grid("mass", 1, 2, 12.5, 4.4)
    bars: dict[str, dict[str, float]] = {
        f"whole run, {name.removeprefix('off-policy ')}": {
            k: v / abs(total_mass(flow)["response"]) for k, v in total_mass(flow).items()
        }
        for name, flow in flows.items()
    }
    for row in step:
        if row["position"] < 0:
            lost = abs(
                next(r for r in step if r["position"] < 0 and r["kind"] == "measured")["response"]
            )
            bars[f"one step, {row['kind']}"] = {k: row[k] / lost for k in NAMED_PLACES}
    axes = grid[0]
    for at, parts in enumerate(bars.values()):
        right = left = 0.0
        for place, value in parts.items():
            axes.barh(at, value, left=right if value > 0 else left, color=NAMED_PLACES[place][1])
            right, left = right + max(value, 0), left + min(value, 0)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_title("where the mass of y− went, per unit that it lost", fontsize=9.5, loc="left")
    tidy(axes)
    where = dict(zip(NAMED_PLACES, (0.0, 0.13, 0.46, 0.84), strict=True))
    for place, (text, colour) in NAMED_PLACES.items():
        axes.annotate(
            text,
            (where[place], -0.14),
            xycoords="axes fraction",
            color=colour,
            fontsize=7.5,
            weight="bold",
        )
    axes = grid[1]
    for kind, style in (("measured", "o"), ("predicted", "-")):
        steps = sorted(
            (r for r in step if r["kind"] == kind and r["position"] >= 0),
            key=lambda r: r["position"],
        )
        for place, (_, colour) in NAMED_PLACES.items():
            axes.plot(
                [r["position"] for r in steps],
                [r[place] for r in steps],
                style,
                color=colour,
                markersize=4,
                linewidth=1.2,
            )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_title(
        "one step, by position: points measured, lines predicted", fontsize=9.5, loc="left"
    )
    axes.set_xlabel("token of y−", fontsize=8)
    axes.set_ylabel("Δπ", fontsize=8)
    tidy(axes)
    return figure


def _draw_longer(runs: Runs) -> Figure:
    lengths = runs.lengths
    figure, grid = axes_grid("longer", 1, 3, 12.5, 3.6)
    tuned = [runs.curves[off_policy(n)] for n in lengths]
    panels: list[tuple[str, dict[str, list[float]]]] = [
        (
            "Δ log π by DPO, nats",
            {
                n: [float(np.nanmean(r.change(n))) for r in tuned]
                for n in ("chosen", "rejected", "irr_train", "irr_test")
            },
        ),
        (
            "Δ greedy confidence of y+'s prefix, nats",
            {"greedy": [float(np.nanmean(r.change("chosen", "greedy"))) for r in tuned]},
        ),
        (
            "share of y−'s lost mass",
            {
                place: [shares_of_mass(runs.mass[off_policy(n)])[place] for n in lengths]
                for place in ("likeliest other", "top", "rest")
            },
        ),
    ]
    for axes, (title, lines) in zip(grid, panels, strict=True):
        for name, values in lines.items():
            place = NAMED_PLACES.get(name)
            colour = place[1] if place else COLOURS[name]
            axes.plot(lengths, values, "o-", color=colour, markersize=4)
            axes.annotate(
                place[0] if place else label(name),
                (lengths[-1], values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
                va="center",
                annotation_clip=False,
            )
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_xlabel("updates of SFT before DPO", fontsize=8)
        tidy(axes)
    return figure
