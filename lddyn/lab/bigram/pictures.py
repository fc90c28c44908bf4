"""Pictures of a negative step in three bigram models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy
from lddyn.steps.flow import leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from lddyn.lab.bigram.models import KINDS, vocabulary

COLOURS = {"table": "#d55e00", "factorised": "#009e73", "network": "#0072b2"}


def draw_leak(found: dict[str, Any]) -> Figure:
    """Kernel norms between contexts, and Δ log π of every word at every context."""
    from matplotlib.colors import AsinhNorm, LogNorm

    words, kinds = vocabulary()
    size = len(words)
    figure = blank_figure(11.0, 7.6, "leak")
    norms = torch.tensor([found["shown"][k]["kernel"] for k in KINDS], dtype=torch.float64)
    deltas = torch.tensor([found["shown"][k]["delta"] for k in KINDS], dtype=torch.float64)
    context, label = found["context"], found["label"]
    star = [
        int(
            leading(
                torch.tensor(found["shown"][k]["before"], dtype=torch.float64)[context][None],
                torch.tensor([label]),
                1,
            )
        )
        for k in KINDS
    ]
    starts = [i for i in range(size) if i == 0 or kinds[i] != kinds[i - 1]]
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], size], strict=True)]
    names = [kinds[i] + ("s" if kinds[i] != "end" else "") for i in starts]
    norm = AsinhNorm(0.02, -1.0, 1.0)
    for i, kind in enumerate(KINDS):
        left = 0.09 + 0.285 * i
        top = figure.add_axes((left, 0.7, 0.15, 0.217))
        relative = norms[i] / norms[i].diagonal().mean()
        top.imshow(
            relative.clamp(min=1e-9).numpy(),
            cmap="Greys",
            norm=LogNorm(1e-3, 1.0),
            interpolation="nearest",
        )
        top.set_facecolor("white")
        axes = figure.add_axes((left, 0.09, 0.26, 0.49))
        mesh = axes.imshow(
            deltas[i].numpy(), cmap="RdBu", norm=norm, interpolation="nearest", aspect="auto"
        )
        for place in (top, axes):
            tidy(place, keep=())
            place.set_xticks([])
            place.set_yticks([])
            for at in starts[1:]:
                place.axhline(at - 0.5, color=FAINT, linewidth=0.3)
                place.axvline(at - 0.5, color=FAINT, linewidth=0.3)
        axes.set_xticks([m - 0.5 for m in middles], names, rotation=35, ha="right", fontsize=7.5)
        axes.tick_params(length=0)
        if i == 0:
            axes.set_yticks([m - 0.5 for m in middles], [f"after {n}" for n in names], fontsize=7.5)
        if i == len(KINDS) - 1:
            axes.annotate(
                f"after\n“{words[context]}”",
                (size - 0.5, context),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                color=INK,
                weight="bold",
                annotation_clip=False,
            )
        for column, text, colour in (
            (label, f"↓ {words[label]}", LOWERED),
            (star[i], f"y* {words[star[i]]}", RAISED),
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
        row = next(r for r in found["kernels"] if r["model"] == kind)
        figure.text(left, 0.928, kind, fontsize=11, weight="bold", color=COLOURS[kind])
        share = row["nonzero"] / row["entries between contexts"]
        note = "exactly 0" if row["nonzero"] == 0 else f"{100 * share:.0f} % not 0"
        figure.text(
            left + 0.16, 0.855, f"between\ncontexts\n{note}", fontsize=8.5, color=INK, va="top"
        )
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
    bar = figure.add_axes((0.66, 0.633, 0.2, 0.012))
    scale = figure.colorbar(mesh, cax=bar, orientation="horizontal")
    scale.set_ticks([-1, -0.1, 0, 0.1, 1], labels=["−1", "−0.1", "0", "+0.1", "+1 nat"])
    scale.ax.minorticks_off()
    scale.outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2)
    return figure


def draw_longer(found: dict[str, Any]) -> Figure:
    """The squeeze by steps of training before the push, and by pushes."""
    figure = blank_figure(11.0, 6.0, "longer")
    panels = (
        (
            "longer",
            "steps",
            "others fall",
            "share of other words that fall",
            "Train longer: more others fall",
        ),
        ("longer", "steps", "others lose", "probability the others lose", "… and lose more"),
        ("longer", "steps", "moved elsewhere", "moved in other contexts together", "… and leak"),
        ("repeated", "pushes", "argmax", "probability of y*", "Push again: y* takes all"),
        ("repeated", "pushes", "entropy", "entropy in the context, nats", "… entropy goes"),
        (
            "repeated",
            "pushes",
            "moved elsewhere",
            "moved in other contexts together",
            "… and leaks on",
        ),
    )
    for place, (table, across, key, text, title) in enumerate(panels):
        line, column = divmod(place, 3)
        axes = figure.add_axes((0.06 + 0.305 * column, 0.585 - 0.485 * line, 0.235, 0.33))
        for kind in KINDS:
            rows = [r for r in found[table] if r["model"] == kind]
            x = [r[across] for r in rows]
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
            if place in (2, 5):
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
        if table == "longer":
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(0, max(r["steps"] for r in found["longer"]))
        axes.set_xlabel(
            "steps of training before the push" if table == "longer" else "pushes of the same word",
            fontsize=8.5,
        )
        axes.set_ylabel(text, fontsize=8.5)
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
        axes.set_ylim(0, 1.02 if key in ("argmax", "others fall") else None)
        tidy(axes)
    return figure
