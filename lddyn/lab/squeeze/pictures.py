"""Pictures of the squeeze: six steps, the trends, and where the guarantees end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.lab.record import Row, Rows
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from lddyn.lab.squeeze.measure import BODIES, OVERLAPS, POSITIONS


def draw_regimes(regimes: list[Row]) -> Figure:
    """Every label before and after, on a logarithmic scale."""
    figure = blank_figure(11.0, 6.3, "regimes")
    small = [p for case in regimes[:-1] for p in case["before"] + case["after"]]
    for place, case in enumerate(regimes):
        line, column = divmod(place, 3)
        axes = figure.add_axes((0.065 + 0.32 * column, 0.545 - 0.465 * line, 0.275, 0.31))
        before, after = (
            torch.tensor(case[k], dtype=torch.float64).exp() for k in ("before", "after")
        )
        if case is regimes[-1]:
            _by_rank(axes, case, before, after)
        else:
            _by_label(axes, case, before, after)
            axes.set_ylim(math.exp(min(small)) / 3, 9.0)
        axes.set_yscale("log")
        tidy(axes)
        others, star = case["gainers"] + case["losers"], case["argmax"]
        axes.set_title(case["regime"], loc="left", fontsize=9.5, weight="bold", pad=18, color=INK)
        axes.text(
            0,
            1.03,
            f"{case['gainers']} of {others} others rise; y* {before[star]:.3g} → {after[star]:.3g}",
            transform=axes.transAxes,
            fontsize=8,
            color="#555555",
        )
        if column == 0:
            axes.set_ylabel("probability", fontsize=8, color=INK)
    title = "Where the probability goes in one step"
    figure.text(0.012, 0.955, title, fontsize=13, weight="bold", color=INK)
    for x, text, colour in (
        (0.52, "● before", FAINT),
        (0.6, "● rose", RAISED),
        (0.665, "● fell", LOWERED),
    ):
        figure.text(x, 0.957, text, color=colour, fontsize=9.5)
    return figure


def _by_label(axes: Axes, case: Row, before: Tensor, after: Tensor) -> None:
    x = range(len(before))
    colours = [RAISED if rose else LOWERED for rose in (after > before).tolist()]
    axes.vlines(x, before, after, colors=colours, linewidth=1.4, zorder=1)
    axes.scatter(x, before, s=8, color="#b5b5b5", zorder=2)
    axes.scatter(x, after, s=12, c=colours, zorder=3)
    marks = {int(k): v for k, v in case["pushes"].items()}
    if case["argmax"] not in marks:
        marks[case["argmax"]] = 0.0
    crowded = [k for k, way in marks.items() if way >= 0 and abs(k - case["argmax"]) <= 3]
    for label, way in marks.items():
        text = "y*" if way == 0 else "↓ pushed" if way < 0 else "↑ pulled"
        below = way < 0
        axes.annotate(
            text,
            (
                label,
                float(
                    torch.minimum(before, after)[label]
                    if below
                    else torch.maximum(before, after)[label]
                ),
            ),
            xytext=(0, -12 if below else 5),
            textcoords="offset points",
            # Two marks side by side look away from each other.
            ha="center"
            if len(crowded) < 2 or below
            else "right"
            if label == min(crowded)
            else "left",
            fontsize=8.5,
            weight="bold",
            color=colours[label],
        )
    axes.set_xlabel("label", fontsize=8, color=INK)


def _by_rank(axes: Axes, case: Row, before: Tensor, after: Tensor) -> None:
    order = before.argsort(descending=True)
    rank = torch.arange(1, len(before) + 1)
    pushed = next(int(k) for k in case["pushes"])
    rose = (after > before)[order]
    axes.plot(rank, before[order], color="#b5b5b5", linewidth=2)
    kept = after[order].clamp(min=1e-30)
    axes.plot(rank, kept, color=LOWERED, linewidth=1.2)
    axes.scatter(rank[rose], kept[rose], s=16, color=RAISED, zorder=3)
    axes.annotate(
        "y*",
        (1, float(kept[0])),
        xytext=(6, -3),
        textcoords="offset points",
        fontsize=8.5,
        weight="bold",
        color=RAISED if bool(rose[0]) else LOWERED,
    )
    place = int((order == pushed).nonzero()) + 1
    axes.annotate(
        f"↓ pushed: {before[pushed]:.0e} → {after[pushed]:.0e}",
        (place, max(float(after[pushed]), 1e-28)),
        xytext=(-6, -2),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        weight="bold",
        color=LOWERED,
    )
    axes.set_xscale("log")
    axes.set_ylim(1e-30, 30)
    axes.set_xlabel("rank of the label before the step", fontsize=8, color=INK)


def draw_trends(counted: Mapping[str, Rows], accuracy: Rows, entropy: Rows) -> Figure:
    """Who gains by peakedness; where τ holds; entropy by the pushed label's probability."""
    figure = blank_figure(11.0, 3.4, "trends")
    left, middle, right = (figure.add_axes((0.065 + 0.33 * i, 0.15, 0.25, 0.73)) for i in range(3))
    _draw_gainers(left, counted["gainers"])
    _draw_accuracy(middle, accuracy)
    _draw_entropy(right, entropy)
    for axes in (left, middle, right):
        tidy(axes)
    return figure


def _draw_gainers(axes: Axes, rows: Rows) -> None:
    """Share of other labels that rise, by the largest probability."""
    x = [(r["low"] * r["high"]) ** 0.5 for r in rows]
    axes.fill_between(
        x,
        [r["tenth"] for r in rows],
        [r["ninetieth"] for r in rows],
        color=RAISED,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(x, [r["median"] for r in rows], color=RAISED, linewidth=2)
    axes.set_xscale("log")
    axes.set_xlabel("largest probability", fontsize=8.5)
    axes.set_title("Flat: most others rise. Peaky: one.", loc="left", fontsize=10, weight="bold")
    axes.set_ylabel("share of other labels that rise", fontsize=8.5)
    axes.text(
        0.98,
        0.9,
        "median and 80 % band",
        fontsize=8,
        color=RAISED,
        ha="right",
        transform=axes.transAxes,
    )


def _draw_accuracy(axes: Axes, rows: Rows) -> None:
    """Share of labels for which τ is right, by the length of the step."""
    shares = [r["share"] for r in rows]
    axes.plot([r["eta"] for r in rows], shares, "o-", color=INK, linewidth=1.6, markersize=4)
    axes.set_xscale("log")
    axes.set_ylim(min(shares) - 0.02, 1.004)
    axes.set_xlabel("length of the step, |η′|", fontsize=8.5)
    axes.set_ylabel("labels for which π > τ says rightly\nwhether they rise", fontsize=8.5)
    axes.set_title("τ holds while the step is short", loc="left", fontsize=10, weight="bold")


def _draw_entropy(axes: Axes, rows: Rows) -> None:
    """Change of entropy by the probability of the pushed label, a line per kind of prediction."""
    for name, colour in (("flat", "#e69f00"), ("between", "#009e73"), ("peaky", "#0072b2")):
        line = [r for r in rows if r["prediction"] == name]
        at = [r["probability"] for r in line]
        change = [r["entropy_change"] for r in line]
        axes.plot(at, change, ".-", color=colour, linewidth=1.4, markersize=4)
        end = (at[0], change[0]) if name != "flat" else (at[-1], change[-1])
        _name(axes, name, end, (4, -12 if name == "between" else 6), colour)
    axes.axhline(0, color=FAINT, linewidth=0.7)
    axes.set_xscale("log")
    axes.set_xlabel("probability of the label pushed down", fontsize=8.5)
    axes.set_ylabel("entropy change, nats", fontsize=8.5)
    axes.set_title("Valleys cost entropy, peaks give it", loc="left", fontsize=10, weight="bold")


def _name(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    shift: tuple[float, float],
    colour: str,
    size: float = 8.5,
) -> None:
    """The name of a line beside one of its points, shifted by so many points of type."""
    axes.annotate(
        text,
        at,
        xytext=shift,
        textcoords="offset points",
        fontsize=size,
        color=colour,
        weight="bold",
    )


def draw_limits(limits: Mapping[str, Rows]) -> Figure:
    """How often the guarantees hold with shared features, several positions, a hidden layer."""
    figure = blank_figure(11.0, 3.4, "limits")
    left, middle, right = (figure.add_axes((0.065 + 0.33 * i, 0.15, 0.25, 0.73)) for i in range(3))
    _draw_contexts(left, limits["contexts"])
    _draw_positions(middle, limits["positions"])
    _draw_hidden(right, limits["hidden"])
    for axes in (left, middle, right):
        axes.set_ylim(0, 1.06)
        axes.set_ylabel("share of cases", fontsize=8.5)
        tidy(axes)
    right.set_ylim(0.75, 1.015)
    return figure


def _draw_contexts(axes: Axes, contexts: Rows) -> None:
    """Another context: does its y* rise, or that of the pushed one?"""
    # Nothing moves at cosine 0: the lines end on both sides of it.
    for rows in (
        [r for r in contexts if r["cosine"] < 0],
        [r for r in contexts if r["cosine"] > 0],
    ):
        for key, colour in (
            ("argmax of the pushed context rises", LOWERED),
            ("its own argmax rises", RAISED),
        ):
            _line(axes, [r["cosine"] for r in rows], [r[key] for r in rows], colour)
    axes.text(
        0.17, 0.98, "y* of the pushed one", fontsize=8.5, color=LOWERED, weight="bold", ha="right"
    )
    axes.text(0.22, 0.3, "its own y*", fontsize=8.5, color=RAISED, weight="bold")
    axes.set_xlabel("cosine of its features with the pushed context's", fontsize=8.5)
    axes.set_title("At another context: who rises?", loc="left", fontsize=10, weight="bold")


def _draw_positions(axes: Axes, positions: Rows) -> None:
    """Several positions that are pushed together: at how many of them y* rises."""
    shades = ["#9ecae1", "#6baed6", "#3182bd", "#08519c"]
    for overlap, colour in zip(OVERLAPS, shades, strict=True):
        rows = [r for r in positions if r["overlap"] == overlap]
        x = [r["positions"] for r in rows]
        _line(axes, x, [r["argmax rises"] for r in rows], colour)
        end = (x[-1], rows[-1]["argmax rises"]["share"])
        _name(axes, f"overlap {overlap:g}", end, (5, {0.3: 3, 0.9: -9}.get(overlap, -3)), colour, 8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(POSITIONS, [str(n) for n in POSITIONS])
    axes.set_xlim(0.9, 110)
    axes.set_xlabel("positions pushed down together", fontsize=8.5)
    axes.set_title("Several positions: y* rises at", loc="left", fontsize=10, weight="bold")


def _draw_hidden(axes: Axes, rows: Rows) -> None:
    """A hidden layer that is trained as well: how often the guarantees and τ hold."""
    x = list(range(len(rows)))
    for key, colour, text, at, above in (
        ("label falls", LOWERED, "y falls", 4, -11),
        ("argmax rises", RAISED, "y* rises", 5, -12),
        ("threshold is right", INK, "τ is right", 2, -13),
    ):
        _line(axes, x, [r[key] for r in rows], colour)
        _name(axes, text, (x[at], rows[at][key]["share"]), (-44, above), colour)
    axes.set_xticks(x, [f"{b:g}" for b in BODIES])
    axes.set_xlabel("learning rate of the hidden layer / of the head", fontsize=8.5)
    axes.set_title("A hidden layer shares features", loc="left", fontsize=10, weight="bold")


def _line(axes: Axes, x: list[Any], rows: list[Row], colour: str) -> None:
    axes.plot(x, [r["share"] for r in rows], "o-", color=colour, linewidth=1.6, markersize=3.5)
    axes.fill_between(
        x,
        [r["low"] for r in rows],
        [r["high"] for r in rows],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
