"""Pictures of the objectives: coefficients, gradient fields, descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.lab.objectives.residuals import OBJECTIVES
from lddyn.lab.record import Row
from lddyn.objectives.losses import LOSSES
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _panels(name: str, title: str, height: float = 7.4) -> tuple[Figure, dict[str, Axes]]:
    figure = blank_figure(11.0, height, name)
    axes = {}
    for place, objective in enumerate(OBJECTIVES):
        line, column = divmod(place, 4)
        axes[objective] = figure.add_axes((0.055 + 0.24 * column, 0.7 - 0.31 * line, 0.19, 0.2))
        axes[objective].set_title(
            LOSSES[objective].title, loc="left", fontsize=10, weight="bold", color=INK
        )
    figure.text(0.012, 0.962, title, fontsize=13, weight="bold", color=INK)
    return figure, axes


def draw_scan(rows: list[Row]) -> Figure:
    """c+ and c− by the margin, and the printed forms where they are wrong."""
    figure, panels = _panels("coefficients", "How hard each objective pulls y+ and pushes y−")
    for name, axes in panels.items():
        line = [r for r in rows if r["objective"] == name]
        h = [r["margin"] for r in line]
        axes.axhline(0, color=FAINT, linewidth=0.7)
        axes.axvline(0, color=FAINT, linewidth=0.4, linestyle=":")
        axes.plot(h, [r["c+"] for r in line], color=RAISED, linewidth=2.2)
        minus = [r["c-"] for r in line]
        axes.plot(h, minus, color=LOWERED, linewidth=2.2, dashes=(2.2, 1.1))
        axes.fill_between(
            h, minus, 0, where=[m < 0 for m in minus], color=LOWERED, alpha=0.15, linewidth=0
        )
        if "printed c-" in line[0]:
            axes.plot(
                h, [r["printed c-"] for r in line], color="#777777", linewidth=1, linestyle=":"
            )
            at = 8
            axes.annotate(
                "as printed",
                (h[at], line[at]["printed c-"]),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=7.5,
                color="#777777",
            )
        tidy(axes)
        axes.locator_params(axis="y", nbins=5)
        axes.set_xlim(-6, 6)
    for name in list(panels)[8:]:
        panels[name].set_xlabel("margin h, nats (r± = ±h/2)", fontsize=8)
    figure.text(0.56, 0.964, "━ c+, on y+", color=RAISED, fontsize=9.5, weight="bold")
    figure.text(0.665, 0.964, "╍ c−, on y−", color=LOWERED, fontsize=9.5, weight="bold")
    figure.text(0.77, 0.964, "below 0: y− is pulled up", color="#777777", fontsize=9)
    return figure


def _on_paper(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Simplex coordinates (y+, y−, other) → plane: y+ right, y− left, the other on top."""
    return probs[..., 0] + probs[..., 2] / 2, probs[..., 2] * 3**0.5 / 2


def draw_simplex(fields: Row, where: str) -> Figure:
    """Gradient fields; arrows are blue where the mass of the third label grows."""
    texts = {
        "valley": "One softmax, y− in a valley: who feeds a third label?",
        "peak": "One softmax, y− on a peak: who feeds a third label?",
    }
    figure, panels = _panels(f"simplex-{where}", texts[where], 8.0)
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).double()
    for name, axes in panels.items():
        x, y = _on_paper(corners)
        axes.plot(x, y, color=FAINT, linewidth=0.8)
        arrows = torch.tensor(fields[where][name]["arrows"], dtype=torch.float64)
        x, y = _on_paper(arrows[:, :3])
        u, v = _on_paper(arrows[:, 3:])
        size = (u * u + v * v).sqrt()
        # Lengths as the square root: the field spans decades.
        stretch = size.clamp(min=1e-12).sqrt() / size.clamp(min=1e-12) / float(size.max()) ** 0.5
        colours = [RAISED if up > 1e-12 else "#a0a0a0" for up in arrows[:, 5].tolist()]
        axes.quiver(
            x.numpy(),
            y.numpy(),
            (u * stretch).numpy(),
            (v * stretch).numpy(),
            color=colours,
            scale=13,
            width=0.0075,
            headwidth=4,
            headlength=4.5,
            pivot="mid",
            zorder=2,
        )
        path = torch.tensor(fields[where][name]["path"], dtype=torch.float64)
        x, y = _on_paper(path)
        axes.plot(x, y, color="#e66100", linewidth=2.6, zorder=3)
        axes.plot(x[:1], y[:1], "o", color="#e66100", markersize=5, zorder=4)
        axes.plot(
            x[-1:], y[-1:], "o", color="#e66100", markersize=7, mfc="white", mew=1.8, zorder=5
        )
        left, bottom, wide, _ = axes.get_position().bounds
        axes.set_position((left - 0.03, bottom - 0.055, wide + 0.05, 0.26))
        axes.set_aspect("equal")
        axes.set_xlim(-0.12, 1.12)
        axes.set_ylim(-0.11, 0.92)
        axes.axis("off")
        for text, at, align in (
            ("y+", (1.02, -0.1), "left"),
            ("y−", (-0.02, -0.1), "right"),
            ("another", (0.55, 0.85), "left"),
        ):
            axes.text(*at, text, fontsize=8, color=INK, ha=align)
    figure.text(
        0.58,
        0.964,
        "● → ○ descent from the reference",
        color="#e66100",
        fontsize=9.5,
        weight="bold",
    )
    figure.text(0.84, 0.964, "➤ the third label grows", color=RAISED, fontsize=9.5, weight="bold")
    return figure


def draw_flow(curves: list[Row]) -> Figure:
    """Curves of log π at χ−: y−, y* and all others together, in three situations."""
    figure, panels = _panels("flow", "Where y− is: what its push does to y* and to the others")
    for name, axes in panels.items():
        for where, style, width in (
            ("valley", "-", 2.2),
            ("likeliest", (0, (1, 1)), 1.8),
            ("valley, same context", (0, (4, 1.5)), 1.1),
        ):
            line = [r for r in curves if r["objective"] == name and r["situation"] == where]
            for key, colour in (("others", LOWERED), ("y*", RAISED)):
                change = [r[key] - line[0][key] for r in line]
                axes.plot(
                    [r["step"] for r in line],
                    change,
                    color=colour,
                    linewidth=width,
                    linestyle=style,
                )
        axes.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
        axes.set_ylim(-60, 1.5)
        axes.set_yticks([-10, -1, -0.1, 0, 0.1, 1], ["−10", "−1", "−0.1", "0", "+0.1", "+1"])
        axes.minorticks_off()
        tidy(axes)
        axes.tick_params(axis="y", labelsize=7)
    for name in list(panels)[8:]:
        panels[name].set_xlabel("step", fontsize=8)
    for name in list(panels)[::4]:
        panels[name].set_ylabel("Δ log π, nats", fontsize=8)
    for x, text, colour in (
        (0.56, "y*", RAISED),
        (0.585, "others", LOWERED),
        (0.66, "━ valley", INK),
        (0.735, "┅ the likeliest", INK),
        (0.845, "╌ valley, shared with y+", INK),
    ):
        figure.text(
            x, 0.964, text, color=colour, fontsize=9, weight="bold" if colour != INK else "normal"
        )
    return figure
