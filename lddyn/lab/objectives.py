"""Twelve objectives: their residuals, and where they push (paper App. B, Fig. 2).

Every loss of a pair has ∂L/∂z+ = c+ (π − y+) and ∂L/∂z− = −c− (π − y−) at each token. Measured
here: c± by autograd against closed forms, and the paper's printed ones; how they change with the
margin; the gradient field on the simplex {y+, y−, another}; and what a softmax of 50 labels does
under each objective when y− lies in a valley, and on a peak.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.lab.record import Claim, Lab
from lddyn.lab.shares import Share, verdict
from lddyn.objectives import LOSSES, Objective, preference
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy
from lddyn.steps.flow import softmax_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "sft": "SFT",
    "unlikelihood": "unlikelihood",
    "dpo": "DPO",
    "cdpo": "cDPO",
    "ipo": "IPO",
    "slic": "SLiC",
    "sppo": "SPPO",
    "kto": "KTO",
    "simpo": "SimPO",
    "dpop": "DPOP",
    "dpo+nll": "DPO + NLL",
    "cal-dpo": "Cal-DPO",
}
# For pictures: of like scale, so that targets lie at h = 1 or r = ±1.
SETTINGS: dict[str, dict[str, float]] = {
    "sft": {},
    "unlikelihood": {},
    "dpo": {"beta": 0.5},
    "cdpo": {"beta": 0.5, "label_smoothing": 0.1},
    "ipo": {"beta": 0.5},
    "slic": {"delta": 1.0, "beta": 0.1},
    "sppo": {"eta": 2.0},
    "kto": {"beta": 0.5},
    "simpo": {"beta": 0.5, "gamma": 0.5},
    "dpop": {"beta": 0.5, "penalty": 5.0},
    "dpo+nll": {"beta": 0.5, "alpha": 0.2},
    "cal-dpo": {"beta": 0.5},
}


# ---------------------------------------------------------------------------------------------
# Residual coefficients


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def closed_form(
    name: str,
    chosen: float,
    rejected: float,
    gains: tuple[float, float],
    lengths: tuple[int, int],
    p: Mapping[str, float],
) -> tuple[float, float]:
    """(c+, c−) of the corrected closed forms.

    Args:
        name: Of the objective.
        chosen: log π(y+).
        rejected: log π(y−).
        gains: r±, nats.
        lengths: |y±|, tokens.
        p: Hyper-parameters, all of them.
    """
    good, bad = gains
    h = good - bad
    if name == "sft":
        return 1.0, 0.0
    if name == "unlikelihood":
        return 0.0, 1.0
    if name in ("dpo", "cdpo", "dpo+nll"):
        a, smooth = _sigmoid(p["beta"] * h), p.get("label_smoothing", 0.0)
        c = p["beta"] * ((1 - smooth) * (1 - a) - smooth * a)
        return c + p.get("alpha", 0.0) / lengths[0], c
    if name == "ipo":
        c = 2 * (1 / (2 * p["beta"]) - h)
        return c, c
    if name == "slic":
        active = 1.0 if p["delta"] - (chosen - rejected) > 0 else 0.0
        return active + p["beta"], active
    if name == "sppo":
        return 2 * (p["eta"] / 2 - good), 2 * (p["eta"] / 2 + bad)
    if name == "kto":
        s = _sigmoid(p["beta"] * (good - p["baseline"]))
        t = _sigmoid(p["beta"] * (p["baseline"] - bad))
        return p["desirable"] * p["beta"] * s * (1 - s), p["undesirable"] * p["beta"] * t * (1 - t)
    if name == "simpo":
        s = _sigmoid(p["beta"] * (chosen / lengths[0] - rejected / lengths[1]) - p["gamma"])
        return p["beta"] / lengths[0] * (1 - s), p["beta"] / lengths[1] * (1 - s)
    if name == "dpop":
        s = _sigmoid(p["beta"] * (h - p["penalty"] * max(0.0, -good)))
        boost = 1 + p["penalty"] if good < 0 else 1.0
        return p["beta"] * (1 - s) * boost, p["beta"] * (1 - s)
    if name == "cal-dpo":
        s, target = _sigmoid(h), 1 / (2 * p["beta"])
        return 1 - s + target - good, 1 - s + target + bad
    raise ValueError(f"no closed form for {name!r}")


def printed_form(
    name: str, chosen: float, rejected: float, gains: tuple[float, float], p: Mapping[str, float]
) -> tuple[float, float]:
    """(c+, c−) as App. B prints them, Eq. 16-22, for IPO, SLiC and SPPO."""
    good, bad = gains
    if name == "ipo":  # DPO's residual, its a replaced by h − 1/(2β)
        c = p["beta"] * (1 - (good - bad - 1 / (2 * p["beta"])))
        return c, c
    if name == "slic":  # an indicator times DPO's residual
        active = 1.0 if p["delta"] - (chosen - rejected) > 0 else 0.0
        c = active * p["beta"] * (1 - _sigmoid(p["beta"] * (good - bad)))
        return c + p["beta"], c
    if name == "sppo":  # both signs turned
        return 2 * (good - p["eta"] / 2), -2 * (bad + p["eta"] / 2)
    raise ValueError(f"{name!r} has no printed form that differs")


def strength_at_start(name: str, p: Mapping[str, float], length: int = 1) -> float:
    """c− where r± = 0 and both responses are as likely, as tabulated."""
    beta = p.get("beta", 0.0)
    return {
        "sft": 0.0,
        "unlikelihood": 1.0,
        "dpo": beta / 2,
        "cdpo": beta * (1 - 2 * p.get("label_smoothing", 0.0)) / 2,
        "ipo": 1 / beta if beta else 0.0,
        "slic": 1.0,
        "sppo": p.get("eta", 0.0),
        "kto": p.get("undesirable", 1.0) * beta / 4,
        "simpo": beta / length * (1 - _sigmoid(-p.get("gamma", 0.0))),
        "dpop": beta / 2,
        "dpo+nll": beta / 2,
        "cal-dpo": 0.5 + (1 / (2 * beta) if beta else 0.0),
    }[name]


def build(
    name: str,
    chosen: Example,
    rejected: Example,
    reference: tuple[float, float],
    parameters: Mapping[str, float],
) -> Objective:
    """The library's objective on one pair."""
    return preference(name, chosen, rejected, reference=reference, **parameters)


def coefficients(objective: Objective, log_probs: Sequence[Tensor]) -> tuple[float, float]:
    """(c+, c−) = (−∂L/∂log π(y+), ∂L/∂log π(y−)), by autograd; the same at every token."""
    _, (chosen, rejected) = objective.weights(list(log_probs))
    return -float(chosen[0]), float(rejected[0])


def _draw_parameters(name: str, generator: torch.Generator) -> dict[str, float]:
    def uniform(low: float, high: float) -> float:
        drawn = torch.rand((), generator=generator, dtype=torch.float64)
        return low + (high - low) * float(drawn)

    ranges = {
        "beta": (0.05, 2.0),
        "label_smoothing": (0.0, 0.45),
        "delta": (0.0, 5.0),
        "eta": (0.2, 5.0),
        "baseline": (-1.0, 1.0),
        "desirable": (0.5, 2.0),
        "undesirable": (0.5, 2.0),
        "gamma": (0.0, 2.0),
        "penalty": (0.0, 50.0),
        "alpha": (0.0, 2.0),
    }
    wanted = SETTINGS[name] if name != "kto" else ("beta", "baseline", "desirable", "undesirable")
    return {key: uniform(*ranges[key]) for key in wanted}


def check(lab: Lab, cases: int) -> list[dict[str, Any]]:
    """Coefficients and logit gradients by autograd against closed and printed forms."""
    size = 12
    rows = []
    for name in lab.bar(LOSSES, "residuals"):
        generator = lab.generator("residuals", name)
        worst = printed = scale = outside = 0.0
        negative = flipped = 0
        for _ in range(cases):
            lengths = [int(n) for n in torch.randint(1, 21, (2,), generator=generator)]
            targets = [torch.randint(size, (n,), generator=generator) for n in lengths]
            logits = [
                (2 * torch.randn(n, size, generator=generator, dtype=torch.float64))
                for n in lengths
            ]
            leaves = [z.requires_grad_(True) for z in logits]
            log_probs = [
                z.log_softmax(-1).gather(1, y[:, None])[:, 0]
                for z, y in zip(leaves, targets, strict=True)
            ]
            sums = [float(lp.detach().sum()) for lp in log_probs]
            drift = 3 * torch.randn(2, generator=generator, dtype=torch.float64)
            reference = (sums[0] - float(drift[0]), sums[1] - float(drift[1]))
            gains = (sums[0] - reference[0], sums[1] - reference[1])
            parameters = _draw_parameters(name, generator)
            examples = [Example((0,), tuple(y.tolist())) for y in targets]
            objective = build(name, examples[0], examples[1], reference, parameters)
            ours = coefficients(objective, log_probs)
            exact = closed_form(name, sums[0], sums[1], gains, (lengths[0], lengths[1]), parameters)
            worst = max(worst, *(abs(a - b) for a, b in zip(ours, exact, strict=True)))
            # The whole gradient on the logits must be c+ R+ and −c− R−, nothing beside.
            gradients = torch.autograd.grad(objective.loss(log_probs), leaves, allow_unused=True)
            for z, y, g, c in zip(leaves, targets, gradients, (exact[0], -exact[1]), strict=True):
                residual = z.detach().softmax(-1) - torch.nn.functional.one_hot(y, size)
                found = torch.zeros_like(residual) if g is None else g
                outside = max(outside, float((found - c * residual).abs().max()))
            scale = max(scale, abs(exact[0]), abs(exact[1]))
            negative += gains[0] < gains[1]
            flipped += exact[1] < 0
            if name in ("ipo", "slic", "sppo"):
                said = printed_form(name, sums[0], sums[1], gains, parameters)
                printed = max(printed, *(abs(a - b) for a, b in zip(said, exact, strict=True)))
        rows.append(
            {
                "objective": name,
                "cases": cases,
                "negative margins": negative,
                "c- below zero": flipped,
                "largest coefficient": scale,
                "error of c": worst,
                "error of the logit gradient": outside,
                "error of the printed form": printed or None,
            }
        )
    return rows


_ONE, _OTHER = Example((0,), (1,)), Example((0,), (2,))


def at_margin(name: str, gains: tuple[float, float], reference: tuple[float, float]) -> Any:
    """(c+, c−) of one-token responses at r±, with the settings of the pictures."""
    objective = build(name, _ONE, _OTHER, reference, SETTINGS[name])
    log_probs = [
        torch.tensor([r + g], dtype=torch.float64) for r, g in zip(reference, gains, strict=True)
    ]
    return coefficients(objective, log_probs)


def scan(lab: Lab) -> list[dict[str, Any]]:
    """c± along the margin, r± = ±h/2, log π_ref = −2 of both."""
    rows = []
    for name in lab.bar(LOSSES, "margins"):
        for step in range(-24, 25):
            h = step / 4
            c = at_margin(name, (h / 2, -h / 2), (-2.0, -2.0))
            row: dict[str, Any] = {"objective": name, "margin": h, "c+": c[0], "c-": c[1]}
            if name in ("ipo", "slic", "sppo"):
                full = {**SETTINGS[name]}
                said = printed_form(name, h / 2 - 2, -h / 2 - 2, (h / 2, -h / 2), full)
                row |= {"printed c+": said[0], "printed c-": said[1]}
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Where they push


def pushes(
    name: str, good: Tensor, bad: Tensor, reference: Tensor, chosen: int, rejected: int
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """A step's coefficients on the softmax at χ+, on that at χ−, and (c+, c−).

    Args:
        name: Of the objective.
        good: log π at χ+, (V,).
        bad: log π at χ−, (V,).
        reference: log π_ref of both, (V,).
        chosen: y+.
        rejected: y−.
    """
    objective = build(
        name, _ONE, _OTHER, (float(reference[chosen]), float(reference[rejected])), SETTINGS[name]
    )
    c = coefficients(objective, [good[chosen, None], bad[rejected, None]])
    on_good, on_bad = torch.zeros_like(good), torch.zeros_like(bad)
    on_good[chosen], on_bad[rejected] = c[0], -c[1]
    return on_good, on_bad, c


def descend(
    name: str, start: Tensor, chosen: int, rejected: int, steps: int, *, shared: bool
) -> list[tuple[Tensor, tuple[float, float]]]:
    """Gradient descent on logits: log π at χ− and (c+, c−) before every step.

    The learning rate makes |c+| + |c−| of the first step 0.1 for every objective. `shared`: y+ and
    y− are labels of one softmax, as first tokens of two responses are; else each has its own,
    which begin alike, as later tokens have.
    """
    good = bad = start
    on_good, on_bad, _ = pushes(name, good, bad, start, chosen, rejected)
    rate = 0.1 / float(on_good.abs().sum() + on_bad.abs().sum())
    path = []
    for _ in range(steps + 1):
        on_good, on_bad, c = pushes(name, good, bad, start, chosen, rejected)
        path.append((bad, c))
        if shared:
            good = bad = bad + softmax_step(bad, rate * (on_good + on_bad))
        else:
            good = good + softmax_step(good, rate * on_good)
            bad = bad + softmax_step(bad, rate * on_bad)
    return path


STARTS = {"valley": (0.12, 0.03, 0.85), "peak": (0.3, 0.5, 0.2)}  # π of y+, y−, the other


def fields(lab: Lab, resolution: int = 12) -> dict[str, Any]:
    """dπ on the simplex and the path from the reference, by objective and start."""
    found: dict[str, Any] = {}
    for where, point in STARTS.items():
        start = torch.tensor(point, dtype=torch.float64).log()
        found[where] = {}
        for name in lab.bar(LOSSES, f"simplex, {where}"):
            arrows = []
            for i in range(1, resolution):
                for j in range(1, resolution - i):
                    probs = torch.tensor([i, j, resolution - i - j]).double() / resolution
                    on_good, on_bad, _ = pushes(name, probs.log(), probs.log(), start, 0, 1)
                    on = on_good + on_bad
                    move = on - on.sum() * probs
                    arrows.append([*probs.tolist(), *(probs * (move - probs @ move)).tolist()])
            path = descend(name, start, 0, 1, 250, shared=True)[::5]
            found[where][name] = {"arrows": arrows, "path": [p.exp().tolist() for p, _ in path]}
    return found


# Which label y− is: unlikely; the model's second choice; its own answer, as on-policy samples
# mostly are; and unlikely, in one softmax with y+.
SITUATIONS = ("valley", "second", "likeliest", "valley, same context")


def flows(lab: Lab, labels: int, steps: int) -> dict[str, Any]:
    """What becomes of the softmax at χ−: y* and the others, under each objective."""
    logits = 2.5 * torch.randn(labels, generator=lab.generator("flow"), dtype=torch.float64)
    start = logits.log_softmax(-1)
    order = start.argsort(descending=True).tolist()
    chosen = order[3]
    curves, summary = [], []
    for where in SITUATIONS:
        rejected = order[{"second": 1, "likeliest": 0}.get(where, int(0.8 * labels))]
        star = order[0] if rejected != order[0] else order[1]
        others = torch.ones(labels, dtype=torch.bool)
        others[[star, chosen, rejected]] = False
        for name in lab.bar(LOSSES, where):
            path = descend(name, start, chosen, rejected, steps, shared="same" in where)
            for step in range(0, steps + 1, max(1, steps // 25)):
                now, c = path[step]
                values = {"y-": now[rejected], "y*": now[star], "others": now[others].logsumexp(0)}
                curves.append(
                    {
                        "situation": where,
                        "objective": name,
                        "step": step,
                        "c-": _digits(c[1]),
                        **{k: _digits(float(v)) for k, v in values.items()},
                    }
                )
            (first, c), (end, last) = path[0], path[-1]
            summary.append(
                {
                    "situation": where,
                    "objective": name,
                    "c- at the start": c[1],
                    "c- at the end": last[1],
                    "change of log y-": float((end - first)[rejected]),
                    "change of log others": float((end - first)[others].mean()),
                    "change of y*": float(end[star].exp() - first[star].exp()),
                    "others that fall": float((end < first)[others].double().mean()),
                }
            )
    return {"curves": curves, "summary": summary}


def _digits(value: float) -> float:
    """As precise as a picture."""
    return float(f"{value:.5g}")


# ---------------------------------------------------------------------------------------------
# Pictures


def _panels(name: str, title: str, height: float = 7.4) -> tuple[Figure, dict[str, Axes]]:
    figure = blank_figure(11.0, height, name)
    axes = {}
    for place, objective in enumerate(LOSSES):
        line, column = divmod(place, 4)
        axes[objective] = figure.add_axes((0.055 + 0.24 * column, 0.7 - 0.31 * line, 0.19, 0.2))
        axes[objective].set_title(
            TITLES[objective], loc="left", fontsize=10, weight="bold", color=INK
        )
    figure.text(0.012, 0.962, title, fontsize=13, weight="bold", color=INK)
    return figure, axes


def draw_scan(rows: list[dict[str, Any]]) -> Figure:
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


def draw_simplex(found: dict[str, Any], where: str) -> Figure:
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
        arrows = torch.tensor(found[where][name]["arrows"], dtype=torch.float64)
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
        path = torch.tensor(found[where][name]["path"], dtype=torch.float64)
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


def draw_flow(curves: list[dict[str, Any]]) -> Figure:
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


# ---------------------------------------------------------------------------------------------
# The experiment


def run(
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
    cases: int = 200,
    labels: int = 50,
    steps: int = 300,
) -> dict[str, Any]:
    """Runs the experiment.

    Args:
        out: Folder for everything.
        seed: Of all random numbers.
        progress: Show bars on standard error.
        cases: Random pairs per objective for the closed forms.
        labels: V of the flows.
        steps: Of gradient descent in the flows.

    Returns:
        What results.json holds.
    """
    if cases < 10 or labels < 20 or steps < 10:
        raise ValueError(
            f"cases and steps must be at least 10 and labels 20, got {cases}, {steps} and {labels}"
        )
    options = {"cases": cases, "labels": labels, "steps": steps}
    lab = Lab("objectives", Path(out), seed, options, progress)
    residuals = lab.once("residuals", lambda: check(lab, cases))
    scanned = lab.once("margins", lambda: scan(lab))
    found = lab.once("simplex", lambda: fields(lab))
    flowed = lab.once("flows", lambda: flows(lab, labels, steps))
    lab.table("residuals", residuals)
    lab.table("margins", scanned)
    lab.table(
        "simplex",
        [
            {"start": where, "objective": name, **{k: _short(v) for k, v in parts.items()}}
            for where, by_name in found.items()
            for name, parts in by_name.items()
        ],
    )
    lab.table("flows", flowed["curves"])
    lab.table("summary", flowed["summary"])
    lab.figure(
        "coefficients",
        draw_scan(scanned),
        "Lines are the library's, by autograd. Shaded: the push has become a pull.",
    )
    for where in STARTS:
        lab.figure(
            f"simplex-{where}",
            draw_simplex(found, where),
            "Arrows are dπ of a gradient step, their lengths as the square root.",
        )
    lab.figure(
        "flow",
        draw_flow(flowed["curves"]),
        "50 labels, the softmax that holds y−; every objective's first push is as long.",
    )
    return _conclude(lab, residuals, scanned, flowed["summary"])


def _short(rows: list[list[float]]) -> str:
    """Rows of numbers as text, as precise as a picture."""
    return ";".join(",".join(f"{x:.3g}" for x in row) for row in rows)


def _conclude(
    lab: Lab,
    residuals: list[dict[str, Any]],
    scanned: list[dict[str, Any]],
    summary: list[dict[str, Any]],
) -> dict[str, Any]:
    worst = max(max(r["error of c"], r["error of the logit gradient"]) for r in residuals)
    total = sum(r["cases"] for r in residuals)
    lab.claim(
        Claim(
            "closed forms",
            "Each objective's residual is c+ (π − y+) and −c− (π − y−) with its closed form.",
            "App. B, corrected",
            "12 pairs of formulas",
            f"largest difference {worst:.1e} in {total:,} random pairs",
            verdict(worst <= 1e-8),
            "autograd, float64, logits included; with a negative margin in "
            f"{sum(r['negative margins'] for r in residuals):,}",
            value=worst,
        )
    )
    corrected = {
        "ipo": "2 (1/(2β) − h) on both",
        "slic": "1[·] on y−, 1[·] + β on y+ (regularised on y+)",
        "sppo": "2 (η/2 − r+) and 2 (η/2 + r−)",
    }
    printed = {
        "ipo": "β (1 − a), a = h − 1/(2β)",
        "slic": "1[·] times DPO's",
        "sppo": "2 (r+ − η/2) (π − y+) + 2 (r− + η/2) (π − y−)",
    }
    by_name = {r["objective"]: r for r in residuals}
    for name in ("ipo", "slic", "sppo"):
        off = by_name[name]["error of the printed form"]
        lab.claim(
            Claim(
                f"{TITLES[name]}, printed",
                f"{TITLES[name]}'s residual as printed.",
                "App. B Eq. 16-22",
                printed[name],
                f"off by up to {off:.3g}; largest true coefficient "
                f"{by_name[name]['largest coefficient']:.3g}",
                verdict(off <= 1e-8),
                "read literally; the gradient of the loss stated there is by autograd",
                corrected[name],
                off,
            )
        )
    starts = {}
    for name in LOSSES:
        c = at_margin(name, (0.0, 0.0), (-2.0, -2.0))[1]
        starts[name] = (c, strength_at_start(name, SETTINGS[name]))
    off = max(abs(a - b) for a, b in starts.values())
    lab.claim(
        Claim(
            "strength at the start",
            "The push on y− where r± = 0.",
            "App. B, corrected",
            "β/2 for DPO, 1/β for IPO, η for SPPO, …",
            ", ".join(f"{TITLES[k]} {v[0]:.3g}" for k, v in starts.items()),
            verdict(off <= 1e-8),
            f"largest difference from the table {off:.1e}",
            value=off,
        )
    )
    sppo = starts["sppo"][0]
    lab.claim(
        Claim(
            "SPPO pushes nothing down",
            "SPPO has “no negative sign”, hence no squeezing.",
            "App. B",
            "two positive vectors",
            f"c− = η = {sppo:g} at the start; it changes sign at r− = −η/2",
            verdict(sppo <= 0),
            "bounded, not absent",
            "a push until r− = −η/2, then a pull",
            sppo,
        )
    )
    dpo = [r["c-"] for r in scanned if r["objective"] == "dpo"]
    falling = Share(sum(a > b for a, b in itertools.pairwise(dpo)), len(dpo) - 1)
    lab.claim(
        Claim(
            "regularising",
            "The larger the gap, the smaller DPO's residual.",
            "App. B",
            "larger Gap → smaller ‖G‖",
            f"c− falls over {falling} steps of h from −6 to 6",
            verdict(falling.count == falling.total),
            "it never changes sign",
            "",
            falling.value,
            falling.interval,
        )
    )
    flips = [n for n in LOSSES if any(r["c-"] < -1e-9 for r in scanned if r["objective"] == n)]
    lab.claim(
        Claim(
            "sign flips",
            "Which pushes turn into pulls once the margin is large.",
            "App. B, corrected",
            "IPO, SPPO (and cDPO, Cal-DPO)",
            ", ".join(TITLES[n] for n in flips),
            verdict(set(flips) == {"ipo", "sppo", "cdpo", "cal-dpo"}),
            "|h| ≤ 6",
            value=len(flips),
        )
    )
    rows = {(r["situation"], r["objective"]): r for r in summary}
    pushing = [n for n in LOSSES if rows["valley", n]["c- at the start"] > 0]
    key = "change of log others"
    squeezed = [
        n for n in pushing if rows["valley", n][key] < 0 and rows["valley", n]["change of y*"] > 0
    ]
    valley, second, likeliest, same = (rows[where, "dpo"] for where in SITUATIONS)
    lab.claim(
        Claim(
            "a valley squeezes",
            "A push on y− in a valley lowers others and lifts y*.",
            "§3.3, Fig. 2",
            "off-policy DPO squeezes",
            f"DPO: others {valley[key]:+.3g} nats on average, y* {valley['change of y*']:+.3g}; "
            f"so do {', '.join(TITLES[n] for n in squeezed if n != 'dpo')}",
            verdict("dpo" in squeezed),
            f"y− in a softmax of its own, {lab.options['steps']} steps; SFT has no push, SLiC's "
            "margin is met there already",
            value=valley[key],
        )
    )
    deeper = [n for n in pushing if rows["valley", n][key] < rows["likeliest", n][key]]
    lab.claim(
        Claim(
            "off-policy is worse",
            "The push squeezes in a valley, not where y− is the model's own answer.",
            "§3.3, Fig. 2",
            "on-policy DPO does not squeeze",
            f"DPO, others: {valley[key]:+.3g} nats in the valley, {second[key]:+.3g} on the second "
            f"choice, {likeliest[key]:+.3g} on the likeliest label; lower in the valley than there "
            f"for {len(deeper)} of {len(pushing)}",
            verdict("dpo" in deeper and likeliest[key] >= 0),
            f"of the others {valley['others that fall']:.0%}, {second['others that fall']:.0%} and "
            f"{likeliest['others that fall']:.0%} fall; repeated pushes make every y− a valley",
            value=valley[key] - likeliest[key],
        )
    )
    lab.claim(
        Claim(
            "same context",
            "Where y+ and y− are labels of one softmax, DPO's two pushes cancel for all others.",
            "derived",
            "not discussed; panel D of App. E shows it",
            f"DPO lowers the others by {same[key]:+.3g} nats there, y* moves by "
            f"{same['change of y*']:+.3g}, for y+ takes the mass",
            verdict(same["change of y*"] < 0),
            "c+ = c−, so Δz = 0 for every other label: they fall together, by the normaliser "
            "alone, and y* with them; the squeeze needs contexts of their own, as all tokens after "
            "the first difference have",
            value=same["change of y*"],
        )
    )
    stopped = [
        n
        for n in pushing
        if abs(rows["valley", n]["c- at the end"]) < 0.05 * rows["valley", n]["c- at the start"]
    ]
    return lab.finish(
        [
            "Every objective pulls y+ up and, SFT aside, pushes y− down; they differ in how hard, "
            "and in when they stop. The push on an unlikely y− squeezes.",
            "The paper prints residuals for IPO, SLiC and SPPO, and says that SPPO has no negative "
            "gradient.",
        ],
        [
            f"Autograd and the closed forms agree to {worst:.0e}; the printed forms of IPO, SLiC "
            "and SPPO do not.",
            "SPPO pushes y− down, with c− = η at the start, until r− = −η/2. Pushes that turn into "
            f"pulls: {', '.join(TITLES[n] for n in flips)}.",
            f"In a valley the push squeezes under {', '.join(TITLES[n] for n in squeezed)}"
            f"; within {lab.options['steps']} steps it has nearly stopped under "
            f"{', '.join(TITLES[n] for n in stopped) or 'none'}.",
        ],
    )
