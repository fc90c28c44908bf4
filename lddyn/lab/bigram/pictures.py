"""Pictures of a negative step in three bigram models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lddyn.lab.bigram.models import KINDS, vocabulary
from lddyn.lab.record import Row, Rows
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy
from lddyn.steps.flow import leading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = {"table": "#d55e00", "factorised": "#009e73", "network": "#0072b2"}


def draw_leak(measured: Row) -> Figure:
    """Kernel norms between contexts, and Δ log π of every word at every context."""
    from matplotlib.colors import AsinhNorm

    figure, groups = blank_figure(11.0, 7.6, "leak"), _word_groups()
    norm = AsinhNorm(0.02, -1.0, 1.0)
    for place, kind in enumerate(KINDS):
        left, shown = 0.09 + 0.285 * place, measured["shown"][kind]
        top = figure.add_axes((left, 0.7, 0.15, 0.217))
        _draw_kernel(top, shown["kernel"])
        axes = figure.add_axes((left, 0.09, 0.26, 0.49))
        deltas = torch.tensor(shown["delta"], dtype=torch.float64)
        mesh = axes.imshow(
            deltas.numpy(), cmap="RdBu", norm=norm, interpolation="nearest", aspect="auto"
        )
        for part in (top, axes):
            _draw_borders(part, groups)
        _name_words(axes, groups, rows=place == 0)
        if place == len(KINDS) - 1:
            _name_context(axes, measured["context"])
        _name_columns(axes, shown["before"], measured["context"], measured["label"])
        row = next(r for r in measured["kernels"] if r["model"] == kind)
        _head(figure, left, kind, row["nonzero"] / row["entries between contexts"])
    _leak_titles(figure)
    _colour_scale(figure, mesh)
    return figure


@dataclass(frozen=True)
class _Groups:
    """The vocabulary by kind of word: each kind's name, its first column, and its middle."""

    names: list[str]
    starts: list[int]
    middles: list[float]


def _word_groups() -> _Groups:
    _, kinds = vocabulary()
    size = len(kinds)
    starts = [i for i in range(size) if i == 0 or kinds[i] != kinds[i - 1]]
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], size], strict=True)]
    names = [kinds[i] + ("s" if kinds[i] != "end" else "") for i in starts]
    return _Groups(names, starts, middles)


def _draw_kernel(axes: Axes, norms: Sequence[Sequence[float]]) -> None:
    """‖K‖_F between contexts, relative to its mean diagonal, in greys."""
    from matplotlib.colors import LogNorm

    table = torch.tensor(norms, dtype=torch.float64)
    relative = table / table.diagonal().mean()
    axes.imshow(
        relative.clamp(min=1e-9).numpy(),
        cmap="Greys",
        norm=LogNorm(1e-3, 1.0),
        interpolation="nearest",
    )
    axes.set_facecolor("white")


def _draw_borders(axes: Axes, groups: _Groups) -> None:
    """Thin lines between groups of words, and no ticks."""
    tidy(axes, keep=())
    axes.set_xticks([])
    axes.set_yticks([])
    for at in groups.starts[1:]:
        axes.axhline(at - 0.5, color=FAINT, linewidth=0.3)
        axes.axvline(at - 0.5, color=FAINT, linewidth=0.3)


def _name_words(axes: Axes, groups: _Groups, *, rows: bool) -> None:
    """The groups' names below the columns and, with `rows`, beside the rows."""
    places = [m - 0.5 for m in groups.middles]
    axes.set_xticks(places, groups.names, rotation=35, ha="right", fontsize=7.5)
    axes.tick_params(length=0)
    if rows:
        axes.set_yticks(places, [f"after {n}" for n in groups.names], fontsize=7.5)


def _name_context(axes: Axes, context: int) -> None:
    """The pushed context, to the right of its row."""
    words, _ = vocabulary()
    axes.annotate(
        f"after\n“{words[context]}”",
        (len(words) - 0.5, context),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        va="center",
        color=INK,
        weight="bold",
        annotation_clip=False,
    )


def _name_columns(axes: Axes, before: Sequence[Sequence[float]], context: int, label: int) -> None:
    """The pushed word and the likeliest other word of its context, above their columns."""
    words, _ = vocabulary()
    log_probs = torch.tensor(before, dtype=torch.float64)[context][None]
    star = int(leading(log_probs, torch.tensor([label]), 1))
    for column, text, colour in (
        (label, f"↓ {words[label]}", LOWERED),
        (star, f"y* {words[star]}", RAISED),
    ):
        axes.annotate(
            text,
            (column, -0.5),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="bottom",
            color=colour,
            weight="bold",
            annotation_clip=False,
        )


def _head(figure: Figure, left: float, kind: str, nonzero: float) -> None:
    """A model's name, and which share of K between contexts is not zero."""
    figure.text(left, 0.928, kind, fontsize=11, weight="bold", color=COLOURS[kind])
    note = "exactly 0" if nonzero == 0 else f"{100 * nonzero:.0f} % not 0"
    figure.text(left + 0.16, 0.855, f"between\ncontexts\n{note}", fontsize=8.5, color=INK, va="top")


def _leak_titles(figure: Figure) -> None:
    figure.text(
        0.012,
        0.975,
        "The same push: what the models share, and what it does to every context",
        fontsize=13,
        weight="bold",
        color=INK,
    )
    figure.text(
        0.085,
        0.632,
        "Δ log π of the next word (column) in every context (row)",
        fontsize=9.5,
        color=INK,
        weight="bold",
    )
    figure.text(0.012, 0.77, "‖K‖ of\ncontext ×\ncontext", fontsize=8.5, color=INK)


def _colour_scale(figure: Figure, mesh: AxesImage) -> None:
    """The scale of Δ log π, in nats."""
    bar = figure.add_axes((0.66, 0.633, 0.2, 0.012))
    scale = figure.colorbar(mesh, cax=bar, orientation="horizontal")
    scale.set_ticks([-1, -0.1, 0, 0.1, 1], labels=["−1", "−0.1", "0", "+0.1", "+1 nat"])
    scale.ax.minorticks_off()
    scale.outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2)


_LONGER = (  # table, key, its name on the axis, title of the panel
    ("longer", "others fall", "share of other words that fall", "Train longer: more others fall"),
    ("longer", "others lose", "probability the others lose", "… and lose more"),
    ("longer", "moved elsewhere", "moved in other contexts together", "… and leak"),
    ("repeated", "argmax", "probability of y*", "Push again: y* takes all"),
    ("repeated", "entropy", "entropy in the context, nats", "… entropy goes"),
    ("repeated", "moved elsewhere", "moved in other contexts together", "… and leaks on"),
)


def draw_longer(measured: Row) -> Figure:
    """The squeeze by steps of training before the push, and by pushes."""
    figure = blank_figure(11.0, 6.0, "longer")
    for place, (table, key, text, title) in enumerate(_LONGER):
        line, column = divmod(place, 3)
        axes = figure.add_axes((0.06 + 0.305 * column, 0.585 - 0.485 * line, 0.235, 0.33))
        across = "steps" if table == "longer" else "pushes"
        for kind in KINDS:
            rows = [r for r in measured[table] if r["model"] == kind]
            _draw_band(axes, kind, [r[across] for r in rows], rows, key, named=column == 2)
        if table == "longer":
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(0, max(r["steps"] for r in measured["longer"]))
        axes.set_xlabel(
            "steps of training before the push" if table == "longer" else "pushes of the same word",
            fontsize=8.5,
        )
        axes.set_ylabel(text, fontsize=8.5)
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
        axes.set_ylim(0, 1.02 if key in ("argmax", "others fall") else None)
        tidy(axes)
    return figure


def _draw_band(axes: Axes, kind: str, x: list[float], rows: Rows, key: str, named: bool) -> None:
    """A curve with its 95 % band in the model's colour, and the model's name at its end."""
    y = [r[key] for r in rows]
    spread = [r[f"{key} ±"] for r in rows]
    axes.plot(x, y, "-", color=COLOURS[kind], linewidth=1.8)
    axes.fill_between(
        x,
        [a - b for a, b in zip(y, spread, strict=True)],
        [a + b for a, b in zip(y, spread, strict=True)],
        color=COLOURS[kind],
        alpha=0.16,
        linewidth=0,
    )
    if named:
        axes.annotate(
            kind,
            (x[-1], y[-1]),
            xytext=(4, -3),
            textcoords="offset points",
            fontsize=8.5,
            color=COLOURS[kind],
            weight="bold",
            annotation_clip=False,
        )
