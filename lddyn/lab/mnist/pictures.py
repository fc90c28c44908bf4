"""Pictures of `lddyn lab mnist`: drawn from its tables, row by row as they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lddyn.lab.record import Rows
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DIGITS = range(10)
_SOFT = "#555555"
_NORM = r"\Vert K_{uo}\Vert_F"
_RUNS = {"momentum": "#1b9e77", "plain": "#a6761d"}  # of ColorBrewer's Dark2, apart for all eyes
_RUN_NAMES = {"momentum": "momentum, cosine", "plain": "no momentum, constant rate"}


def _title(axes: Axes, text: str, under: str = "") -> None:
    """A bold line, and a soft one beneath it, flush left above the axes."""
    lift = 15 if under else 5
    axes.annotate(
        text,
        (0, 1),
        xytext=(0, lift),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        weight="bold",
        color=INK,
        annotation_clip=False,
    )
    if under:
        axes.annotate(
            under,
            (0, 1),
            xytext=(0, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=7.5,
            color=_SOFT,
            annotation_clip=False,
        )


def _image(axes: Axes, pixels: torch.Tensor, at: tuple[float, float, float, float]) -> None:
    inset = axes.inset_axes(at)
    inset.imshow(pixels.numpy(), cmap="Greys", interpolation="nearest")
    inset.set_xticks([])
    inset.set_yticks([])
    for spine in inset.spines.values():
        spine.set_color("#cccccc")
        spine.set_linewidth(0.5)


def _bars(axes: Axes, values: Any) -> None:
    values = np.asarray(values)
    axes.bar(
        _DIGITS, values, width=0.7, color=[RAISED if v > 0 else LOWERED for v in values], alpha=0.55
    )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xticks(_DIGITS, [str(d) for d in _DIGITS])
    tidy(axes, keep=("left",))
    axes.tick_params(axis="x", length=0)


def draw_step(
    rows: Rows,
    residuals: Rows,
    classes: Rows,
    observed: Mapping[str, torch.Tensor],
    updated: torch.Tensor,
    rate: float,
    slope: float,
    correlation: float,
    epoch: int,
) -> Figure:
    """Above: −G of a 4, and the three cases. Below: the residual, and pull against ‖K‖_F."""
    figure = blank_figure(10.2, 5.7, "one_step")
    grid = figure.add_gridspec(
        2, 4, left=0.06, right=0.985, bottom=0.085, top=0.855, hspace=0.55, wspace=0.32
    )
    by_case = {case: [r for r in rows if r["case"] == case] for case in observed}
    _draw_asked(figure.add_subplot(grid[0, 0]), next(iter(by_case.values())), updated)
    shared: Axes | None = None
    for column, (case, cells) in enumerate(by_case.items(), 1):
        axes = figure.add_subplot(grid[0, column], sharey=shared)
        shared = shared or axes
        _draw_case(axes, case, cells, observed[case])
    _explain_case(axes)
    _draw_residuals(figure.add_subplot(grid[1, :2]), residuals, rate, slope)
    _draw_pulls(figure.add_subplot(grid[1, 2:]), classes, correlation)
    figure.text(
        0.012,
        0.975,
        f"One step on a single 4, after {epoch} epochs, η = {rate:g}",
        va="top",
        fontsize=12,
        weight="bold",
        color=INK,
    )
    return figure


def _draw_asked(axes: Axes, cells: Rows, updated: torch.Tensor) -> None:
    """−G of the update image by label, and the image."""
    _bars(axes, [r["asked_of_update"] for r in cells])
    _title(axes, "What this 4 asks for", r"$-G = e_4 - \pi(x_u)$, by label")
    _image(axes, updated, (0.62, 0.6, 0.38, 0.38))


def _draw_case(axes: Axes, case: str, cells: Rows, observed: torch.Tensor) -> None:
    """Δ log π of one observed image by label: bars measured, rings predicted."""
    _bars(axes, [1000 * r["measured"] for r in cells])
    axes.plot(
        _DIGITS,
        [1000 * r["predicted"] for r in cells],
        "o",
        markersize=4.5,
        color=INK,
        markerfacecolor="none",
        markeredgewidth=0.9,
    )
    _title(
        axes,
        f"{case.capitalize()}: a {cells[0]['class_observed']}",
        rf"$\Delta\log\pi(\cdot|x_o)$, millinats; ${_NORM}$ = {cells[0]['norm']:.3g}",
    )
    _image(axes, observed, (0.7, 0.66, 0.3, 0.34))


def _explain_case(axes: Axes) -> None:
    """What rings and bars are, in the upper left corner, with room above them."""
    axes.annotate(
        "○ predicted\n▮ measured",
        (0.04, 0.97),
        xycoords="axes fraction",
        va="top",
        fontsize=7.5,
        color=_SOFT,
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))


def _draw_residuals(axes: Axes, residuals: Rows, rate: float, slope: float) -> None:
    """‖measured − predicted‖ against the learning rate, log-log: a line per update image."""
    rates = sorted({r["learning_rate"] for r in residuals})
    count = len({r["update"] for r in residuals})
    table = np.array([r["residual"] for r in residuals]).reshape(len(rates), count)
    axes.loglog(rates, table, color="#b9c6d4", linewidth=0.5)
    middle = np.median(table, 1)
    axes.loglog(rates, middle, color=RAISED, linewidth=1.6, marker="o", markersize=3)
    guide = middle[0] * 0.12 * (np.array(rates) / rates[0]) ** 2
    axes.loglog(rates, guide, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    _note(axes, "slope 2", (rates[4], guide[4]), (6, -9))
    _note(
        axes,
        f"measured: slope {slope:.3f}\nup to η = 10⁻³",
        (rates[3], middle[3]),
        (-6, 10),
        ha="right",
        color=RAISED,
    )
    axes.axvline(rate, color=INK, linewidth=0.5, linestyle=":")
    _note(axes, "training's η", (rate, table.min()), (4, 0), fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("learning rate η of the step", fontsize=8)
    tidy(axes)
    _title(
        axes,
        "What the first order leaves out",
        "norm of measured − predicted; one line an update image",
    )


def _note(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], **style: Any
) -> None:
    """A soft small text beside a point, shifted by so many points of type."""
    style = {"fontsize": 7.5, "color": _SOFT, **style}
    axes.annotate(text, at, xytext=shift, textcoords="offset points", **style)


def _draw_pulls(axes: Axes, classes: Rows, correlation: float) -> None:
    """Mean pull on label 4 against mean ‖K‖_F, a dot per class of x_o."""
    axes.axhline(0, color=FAINT, linewidth=0.6)
    for place, r in enumerate(sorted(classes, key=lambda row: row["norm"])):
        colour = RAISED if r["class_observed"] == 4 else INK
        axes.plot([r["norm"]] * 2, [1000 * r["low"], 1000 * r["high"]], color=colour, linewidth=0.8)
        axes.plot(r["norm"], 1000 * r["pull"], "o", markersize=3, color=colour)
        shift = (4, -11 if place % 2 else 2)  # neighbours' names apart
        at = (r["norm"], 1000 * r["pull"])
        _note(axes, str(r["class_observed"]), at, shift, fontsize=10, color=colour)
    axes.set_xlabel(rf"mean ${_NORM}$ of the class of $x_o$", fontsize=8)
    tidy(axes)
    _title(
        axes,
        "Does the size of K order the pulls?",
        r"mean $\Delta\log\pi(4|x_o)$, millinats, with 95 % intervals; "
        f"rank correlation over images {correlation:.2f}",
    )


def draw_maps(rows: Rows) -> Figure:
    """Three tables of classes: accumulated influence, integral of ‖K‖_F, mean prediction."""
    figure = blank_figure(10.2, 3.85, "maps")
    panels = (
        (
            "pull",
            "Accumulated influence",
            r"$\Sigma_t$ of predicted $\Delta\pi(y_u|x_o)$, hundredths",
            100.0,
        ),
        ("mean_prediction", "Mean prediction", r"$\pi(y|x_o)$ at the end, hundredths", 100.0),
        (
            "norm_integral",
            rf"Time integral of ${_NORM}$",
            "sum over epochs, % of the largest",
            None,
        ),
    )
    for column, (key, title, under, factor) in enumerate(panels):
        axes = figure.add_axes((0.045 + 0.325 * column, 0.1, 0.295, 0.775))
        table = np.array([r[key] for r in rows], dtype=float).reshape(10, 10)
        off = np.where(np.eye(10, dtype=bool), np.nan, table)
        shown = table * factor if factor else 100 * table / np.nanmax(off)
        off = np.where(np.eye(10, dtype=bool), np.nan, shown)
        # A kernel's norm has no zero to speak of: its colours begin at the smallest.
        low = 0.0 if factor else float(np.nanmin(off))
        high = float(np.nanmax(np.abs(off)))
        signed = bool(factor) and np.nanmin(off) < -0.02 * high
        axes.imshow(
            off, cmap="RdBu" if signed else "Blues", vmin=-high if signed else low, vmax=high * 1.1
        )
        for u in _DIGITS:
            for o in _DIGITS:
                strong = u != o and abs(shown[u, o]) - low > 0.6 * (high - low)
                text = f"{shown[u, o]:.0f}".replace("-0", "0").replace("-", "−")
                axes.text(
                    o,
                    u,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6.3,
                    color="white" if strong else (FAINT if u == o else INK),
                )
        axes.set_xticks(_DIGITS)
        axes.set_yticks(_DIGITS)
        tidy(axes, keep=())
        axes.tick_params(length=0)
        axes.set_xlabel("class of the observed $x_o$", fontsize=8)
        if column == 0:
            axes.set_ylabel("class that was learned; label $y$", fontsize=8)
        _title(axes, title, under)
    return figure


def draw_kernel(
    table: Rows, rows: Rows, early: int, most: tuple[int, int], least: tuple[int, int]
) -> Figure:
    """‖K‖_F by pair over training, its ranking, its drift."""
    figure = blank_figure(10.2, 3.7, "kernel")
    _draw_pairs(figure.add_axes((0.05, 0.14, 0.29, 0.68)), table, most, least)
    ranking = figure.add_axes((0.425, 0.14, 0.24, 0.68))
    drift = figure.add_axes((0.74, 0.14, 0.24, 0.68))
    for name, colour in _RUNS.items():
        of_run = [r for r in rows if r["descent"] == name]
        _draw_ranking(ranking, of_run, colour)
        at = [r["epoch"] for r in of_run]
        moved = [r["drift"] / r["norm"] for r in of_run[1:]]
        drift.semilogy(at[1:], [100 * m for m in moved], color=colour, linewidth=1.5)
    ranking.axvline(early, color=FAINT, linewidth=0.5, linestyle=":")
    ranking.annotate(
        "solid: with the last epoch\ndashed: with the one before",
        (0.98, 0.04),
        xycoords="axes fraction",
        ha="right",
        fontsize=7.5,
        color=_SOFT,
    )
    ranking.set_ylim(min(0.0, ranking.get_ylim()[0]), 1.02)
    for axes in (ranking, drift):
        axes.set_xlabel("epoch", fontsize=8)
        tidy(axes)
    drift.minorticks_off()
    _name_runs(drift)
    _title(
        ranking,
        "Does the ranking over $x_o$ hold?",
        rf"rank correlation of ${_NORM}$, mean over $x_u$",
    )
    _title(
        drift,
        "How much K moves",
        r"mean $\Vert K^t - K^{t-1}\Vert_F$, % of the mean $\Vert K^t\Vert_F$",
    )
    return figure


def _draw_pairs(axes: Axes, table: Rows, most: tuple[int, int], least: tuple[int, int]) -> None:
    """‖K‖_F over training: a line per pair of classes, with names for the paper's and two more."""
    epochs = [r["epoch"] for r in table]
    named = {"4-9": RAISED, "5-8": RAISED, "6-7": LOWERED, "2-5": LOWERED}
    named.setdefault(f"{most[0]}-{most[1]}", INK)
    named.setdefault(f"{least[0]}-{least[1]}", INK)
    for key in table[0]:
        if key != "epoch" and key[0] != key[-1] and key not in named:
            axes.plot(epochs, [r[key] for r in table], color="#d0d0d0", linewidth=0.5)
    ends = []
    for key, colour in named.items():
        values = [r[key] for r in table]
        axes.plot(epochs, values, color=colour, linewidth=1.4)
        ends.append((values[-1], key.replace("-", "–"), colour))
    _end_labels(axes, epochs[-1], ends)
    axes.set_ylim(0, None)
    axes.set_xlabel("epoch", fontsize=8)
    tidy(axes)
    _title(
        axes,
        rf"${_NORM}$ by pair of classes",
        "blue: similar in the paper, red: dissimilar; black: here",
    )


def _draw_ranking(axes: Axes, of_run: Rows, colour: str) -> None:
    """Rank correlation with the last epoch, with its interval, and with the epoch before."""
    at = [r["epoch"] for r in of_run]
    axes.fill_between(
        at,
        [r["rank_to_last_low"] for r in of_run],
        [r["rank_to_last_high"] for r in of_run],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(at, [r["rank_to_last"] for r in of_run], color=colour, linewidth=1.5)
    axes.plot(
        at[1:],
        [r["rank_to_previous"] for r in of_run[1:]],
        color=colour,
        linewidth=0.8,
        linestyle=(0, (3, 2)),
    )


def _name_runs(axes: Axes) -> None:
    """The runs in their colours, in the lower left corner."""
    for line, (name, colour) in enumerate(reversed(_RUNS.items())):
        axes.annotate(
            _RUN_NAMES[name],
            (0.04, 0.04),
            xytext=(0, 11 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=7.5,
            color=colour,
        )


def _end_labels(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    space, at = 0.055 * (high - min(low, 0)), -np.inf
    for value, text, colour in sorted(ends):
        at = max(value, at + space)
        axes.annotate(
            text,
            (x, at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
        )


def draw_accumulated(rows: Rows, epochs: Mapping[str, Rows]) -> Figure:
    """Sums of predictions against totals, and the share explained of single steps."""
    figure = blank_figure(10.2, 3.7, "accumulated")
    for column, (name, colour) in enumerate(_RUNS.items()):
        axes = figure.add_axes((0.055 + 0.32 * column, 0.15, 0.25, 0.66))
        of_run = [r for r in rows if r["descent"] == name]
        x, y = (np.array([r[key] for r in of_run]) for key in ("predicted", "measured"))
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=FAINT, linewidth=0.7)
        axes.plot(x, y, ".", markersize=2.6, color=colour, alpha=0.6, markeredgewidth=0)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(r"$\Sigma_t$ of the steps' predictions, nats", fontsize=8)
        tidy(axes)
        _title(
            axes,
            f"{_RUN_NAMES[name].capitalize()}",
            r"total $\Delta\log\pi(y|x_o)$, nats, measured",
        )
        share = 1 - ((y - x) ** 2).sum() / (y**2).sum()
        axes.annotate(
            f"{100 * share:.3f} % of the\nsquared total explained",
            (0.97, 0.05),
            xycoords="axes fraction",
            ha="right",
            fontsize=7.5,
            color=_SOFT,
        )
    axes = figure.add_axes((0.715, 0.15, 0.265, 0.66))
    for name, colour in _RUNS.items():
        at = [r["epoch"] for r in epochs[name]]
        missed = [100 * (1 - r["explained"]) for r in epochs[name]]
        axes.semilogy(at, missed, color=colour, linewidth=1.4)
    _name_runs(axes)
    axes.set_xlabel("epoch", fontsize=8)
    axes.minorticks_off()
    tidy(axes)
    _title(axes, "What single steps leave out", r"% of the squared $\Delta\log\pi$ of a step")
    return figure
