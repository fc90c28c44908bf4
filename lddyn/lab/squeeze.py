"""Where the probability goes when one label is pushed down: paper §3.3 and App. E.

In multinomial regression z = Wᵀx one gradient step with η' = η‖x‖² changes the prediction at x as
Lemma 1 says, and `massflow.softmax_step` computes. Measured here: four regimes and V = 1000 by real
steps; the lemma's two guarantees and its trends on random cases; the threshold τ; entropy; and what
is left of it where other positions and other layers share the parameters that move.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.lab.record import Claim, Lab
from lddyn.lab.shares import Share, verdict
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy
from lddyn.steps.flow import Flow, leading, renormalised, softmax_step, threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Entropy and prediction after one step of η' = 0.5 on logits (2, 1, 0, −1, −2), App. E.
REFERENCE = [
    ("pushed down", 0, (0.5720, 0.2837, 0.0969, 0.0347, 0.0126), 0.0751),
    ("pushed down", 3, (0.6948, 0.2090, 0.0714, 0.0155, 0.0093), -0.1231),
    ("pulled up", 0, (0.6959, 0.1899, 0.0752, 0.0284, 0.0106), -0.0883),
    ("pulled up", 3, (0.5668, 0.2550, 0.1010, 0.0630, 0.0142), 0.1363),
]
PUBLISHED_PEAK = 0.76  # of the likeliest label before the step, panel C
STEPS = [0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
OVERLAPS = [0.0, 0.3, 0.6, 0.9]
POSITIONS = [1, 2, 4, 8, 16, 32]
COSINES = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0]
BODIES = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]


# ---------------------------------------------------------------------------------------------
# The steps


def regression_step(
    weights: Tensor, features: Tensor, pushes: dict[int, float], lr: float
) -> tuple[Tensor, Tensor]:
    """Log π before and after one SGD step on W, by autograd.

    Args:
        weights: W, (d, V).
        features: x, (d,).
        pushes: Label -> +1 to pull it up, −1 to push it down.
        lr: η.
    """
    moving = weights.clone().requires_grad_(True)
    before = (features @ moving).log_softmax(-1)
    loss = -torch.stack([sign * before[label] for label, sign in pushes.items()]).sum()
    (gradient,) = torch.autograd.grad(loss, moving)
    return before.detach(), (features @ (weights - lr * gradient)).log_softmax(-1)


def regimes(lab: Lab, labels: int, large: int) -> list[dict[str, Any]]:
    """One real step in each regime, beside Lemma 1."""

    def normal(*shape: int, of: str) -> Tensor:
        return torch.randn(*shape, generator=lab.generator("regimes", of), dtype=torch.float64)

    # Of the length that such features have on average, so that every seed takes the same step.
    x = 2 * torch.nn.functional.normalize(normal(4, of="features"), dim=0)
    scattered = normal(4, labels, of="weights")
    flat = 1 + 0.05 * normal(4, labels, of="flat")
    # Peaks as the authors made them, one step (lr 1) that pulls up labels 5 to 12, and as sharp.
    several = torch.zeros(labels, dtype=torch.float64)
    several[5:13] = 1.0
    peaky = scattered + x[:, None] * (several - (x @ scattered).softmax(-1))
    peaky = peaky * _sharpness(x @ peaky, PUBLISHED_PEAK)
    order = (x @ peaky).argsort(descending=True).tolist()
    peak, valley, other = order[1], order[int(0.8 * labels)], order[labels // 2]
    wide_x = 50**0.5 * torch.nn.functional.normalize(normal(50, of="wide features"), dim=0)
    wide = 0.5 * normal(50, large, of="wide weights")
    cases = [
        ("flat, one label pushed down", flat, x, {int(0.84 * labels): -1.0}, 0.3),
        ("peaky, the second peak pulled up", peaky, x, {peak: 1.0}, 0.5),
        ("peaky, the second peak pushed down", peaky, x, {peak: -1.0}, 0.5),
        ("peaky, a valley pushed down", peaky, x, {valley: -1.0}, 0.5),
        ("as published: another pulled up too", peaky, x, {valley: -1.0, other: 1.0}, 0.5),
        (f"V = {large:,}, a typical label down", wide, wide_x, {}, 1.0),
    ]
    found = []
    for name, weights, features, pushes, lr in cases:
        if not pushes:
            middle = (features @ weights).argsort(descending=True).tolist()
            pushes = {middle[large // 10]: -1.0}
        before, after = regression_step(weights, features, pushes, lr)
        eta = lr * float(features @ features)
        coefficients = torch.zeros_like(before)
        for label, sign in pushes.items():
            coefficients[label] = eta * sign
        lemma = softmax_step(before, coefficients)
        label = torch.tensor([next(iter(pushes))])
        flow = Flow.of(before[None], (after - before)[None], label)
        ratio = float(flow.ratio[0])
        found.append(
            {
                "regime": name,
                "eta": eta,
                "pushes": {str(k): v for k, v in pushes.items()},
                "argmax": int(flow.leading[0, 0]),
                "threshold": float(threshold(before, label[0])),
                "lemma_error": float((after - before - lemma).abs().max()),
                "gainers": int(flow.gainers[0]),
                "losers": int(flow.losers[0]),
                "label_change": float(flow.label[0]),
                "argmax_change": float(flow.argmax[0]),
                "ratio": ratio if ratio == ratio else None,
                "entropy": float(flow.entropy[0]),
                "before": before.tolist(),
                "after": after.tolist(),
            }
        )
    return found


def _sharpness(logits: Tensor, peak: float) -> float:
    """The factor on the logits that gives the likeliest label this probability, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((middle * logits).softmax(-1).max()) < peak:
            low = middle
        else:
            high = middle
    return high


def random_cases(lab: Lab, count: int, labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random log π from flat to peaky (count, V), labels (count,), and |η'| (count,)."""
    generator = lab.generator("cases")

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        return low + (high - low) * drawn

    spread = 10 ** uniform(-1.0, 0.7)  # of the logits: 0.1 to 5
    logits = torch.randn(count, labels, generator=generator, dtype=torch.float64)
    labels_pushed = torch.randint(labels, (count,), generator=generator)
    return (spread[:, None] * logits).log_softmax(-1), labels_pushed, 10 ** uniform(-2.0, 1.0)


def push_down(log_probs: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """Δ log π of a step that pushes one label of each row down with η' = −size."""
    coefficients = torch.zeros_like(log_probs).scatter_(1, labels[:, None], -size[:, None])
    return softmax_step(log_probs, coefficients)


def tallies(lab: Lab, count: int, labels: int) -> dict[str, Any]:
    """The lemma's guarantees and trends, counted on random cases."""
    log_probs, label, size = random_cases(lab, count, labels)
    probs = log_probs.exp()
    delta = push_down(log_probs, label, size)
    flow = Flow.of(log_probs, delta, label)
    others = labels - 1
    largest = probs.amax(1)
    flat, peaky = largest <= 2 / labels, largest >= 0.8
    between = ~flat & ~peaky
    all_rise, only_star = flow.gainers == others, flow.gainers == 1
    most = flow.change.scatter(1, label[:, None], -torch.inf).amax(1)
    # Rich get richer: sorted by π, the relative changes of all other labels are sorted too.
    order = log_probs.scatter(1, label[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
    ranked = delta.gather(1, order)
    star = probs.argmax(1)
    peak_pushed = Flow.of(log_probs, push_down(log_probs, star, size), star).entropy > 0
    shares = {
        "label falls": flow.label < 0,
        "argmax rises": flow.argmax > 0,
        "argmax gains most": flow.argmax >= most,
        "argmax gets over half": flow.argmax > 0.5 * flow.gained,
        "argmax gets over half, peaky": (flow.argmax > 0.5 * flow.gained)[peaky],
        "richer rise more": (ranked.diff(dim=1) <= 1e-14).all(1),
        "flat: all others rise": all_rise[flat],
        "between: some rise, some fall": (~all_rise & ~only_star)[between],
        "between: all others rise": all_rise[between],
        "between: all but the argmax fall": only_star[between],
        "peaky: all but the argmax fall": only_star[peaky],
        "entropy rises when the likeliest label is pushed down": peak_pushed,
        "entropy rises when the likeliest label is pushed down, |η′| ≤ 0.1": peak_pushed[
            size <= 0.1
        ],
        "entropy falls when a label below 1/V is pushed down": (
            flow.entropy[_own(probs, label) < 1 / labels] < 0
        ),
    }

    # Trend 4, the same prediction: of two labels other than the argmax, push the rarer one.
    pairs = torch.rand(count, labels, generator=lab.generator("pairs"), dtype=torch.float64)
    pairs = pairs.scatter(1, probs.argmax(1, keepdim=True), -1.0).topk(2, dim=1).indices
    rarer = _own(probs, pairs[:, 0]) < _own(probs, pairs[:, 1])
    rare = torch.where(rarer, pairs[:, 0], pairs[:, 1])
    common = torch.where(rarer, pairs[:, 1], pairs[:, 0])
    # Trend 4, the same label: dig its valley three nats deeper.
    not_star = label != probs.argmax(1)
    deeper = log_probs.scatter_add(1, label[:, None], torch.full((count, 1), -3.0).double())
    deeper = deeper.log_softmax(-1)
    comparisons = {
        "a rarer label": (
            Flow.of(log_probs, push_down(log_probs, rare, size), rare),
            Flow.of(log_probs, push_down(log_probs, common, size), common),
            torch.ones(count, dtype=torch.bool),
        ),
        "a deeper valley": (
            Flow.of(deeper, push_down(deeper, label, size), label),
            flow,
            not_star,
        ),
        "a step twice as long": (
            Flow.of(log_probs, push_down(log_probs, label, 2 * size), label),
            flow,
            torch.ones(count, dtype=torch.bool),
        ),
    }
    for name, (strong, weak, which) in comparisons.items():
        shares |= {
            f"{name}: no fewer others fall": (strong.losers >= weak.losers)[which],
            f"{name}: the squeeze ratio is larger": (strong.ratio > weak.ratio)[which],
            f"{name}: the others lose more": (strong.lost < weak.lost)[which],
            f"{name}: the argmax gains more": (strong.argmax > weak.argmax)[which],
            f"{name}: the label loses more": (strong.label < weak.label)[which],
        }
    curve = []
    edges = torch.logspace(-1.7, 0, 15, dtype=torch.float64).tolist()
    for low, high in itertools.pairwise(edges):
        inside = (largest >= low) & (largest < high)
        if int(inside.sum()) >= 30:
            gain = flow.gainers[inside].double() / others
            tenth, half, most = gain.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
            curve.append(
                {
                    "low": low,
                    "high": high,
                    "cases": int(inside.sum()),
                    "tenth": tenth,
                    "median": half,
                    "ninetieth": most,
                    "mean": float(gain.mean()),
                }
            )
    return {
        "shares": [{"what": k, **Share.of(v).row()} for k, v in shares.items()],
        "kinds": [
            {
                "prediction": name,
                "cases": int(of.sum()),
                "gainers": float(flow.gainers[of].double().mean()) / others,
            }
            for name, of in (("flat", flat), ("between", between), ("peaky", peaky))
        ],
        "gainers": curve,
    }


def _own(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, labels[:, None])[:, 0]


def threshold_accuracy(lab: Lab, count: int, labels: int) -> list[dict[str, Any]]:
    """How often π_i > τ says rightly whether a label rises, by the length of the step."""
    log_probs, label, _ = random_cases(lab, count, labels)
    own = torch.zeros_like(log_probs, dtype=torch.bool).scatter_(1, label[:, None], True)
    says = log_probs.exp() > threshold(log_probs, label)[:, None]
    rows = []
    for size in STEPS:
        right = (push_down(log_probs, label, torch.full((count,), size).double()) > 0) == says
        rows.append({"eta": size, **Share.of(right[~own]).row()})
    return rows


def entropy_curves(lab: Lab, labels: int) -> list[dict[str, Any]]:
    """ΔH of pushing down each label in turn (η' = −0.5), for three predictions."""
    logits = torch.randn(labels, generator=lab.generator("entropy"), dtype=torch.float64)
    rows = []
    for name, spread in (("flat", 0.3), ("between", 1.5), ("peaky", 4.0)):
        log_probs = (spread * logits).log_softmax(-1).expand(labels, -1)
        each = torch.arange(labels)
        flow = Flow.of(
            log_probs, push_down(log_probs, each, torch.full((labels,), 0.5).double()), each
        )
        for i in log_probs[0].argsort().tolist():
            rows.append(
                {
                    "prediction": name,
                    "label": i,
                    "probability": float(log_probs[0, i].exp()),
                    "entropy_change": float(flow.entropy[i]),
                }
            )
    return rows


def reference_rows() -> list[dict[str, Any]]:
    """The published example: prediction and entropy change, ours beside theirs."""
    logits = torch.tensor([2.0, 1, 0, -1, -2], dtype=torch.float64)
    rows = []
    for verb, label, prediction, entropy in REFERENCE:
        coefficients = torch.zeros_like(logits)
        coefficients[label] = -0.5 if verb == "pushed down" else 0.5
        step = softmax_step(logits, coefficients)
        log_probs = logits.log_softmax(-1)
        flow = Flow.of(log_probs[None], step[None], torch.tensor([label]))
        after = (log_probs + step).exp()
        wrong = (after - torch.tensor(prediction, dtype=torch.float64)).abs().max()
        rows.append(
            {
                "label": label,
                "step": verb,
                "after": after.tolist(),
                "published": prediction,
                "largest_difference": float(wrong),
                "entropy_change": float(flow.entropy[0]),
                "published_entropy_change": entropy,
            }
        )
    return rows


def limits(lab: Lab, count: int, labels: int) -> dict[str, list[dict[str, Any]]]:
    """The two guarantees where other positions and layers share what moves; η' = −0.5 each."""
    generator = lab.generator("limits")

    def logits(*shape: int) -> Tensor:
        return 2.5 * torch.randn(*shape, labels, generator=generator, dtype=torch.float64)

    # Another context x_o whose features have this cosine with the pushed one's: with the same W
    # its logits Wᵀx_o have it too, and K = cosine · ‖x‖² I.
    contexts = []
    here, other = logits(count), logits(count)
    label = torch.randint(labels, (count, 1), generator=generator)
    push = here.softmax(-1).scatter_add(1, label, -torch.ones(count, 1, dtype=torch.float64))
    star_here = leading(here, label[:, 0], 1)
    for cosine in COSINES:
        there = (cosine * here + (1 - cosine**2) ** 0.5 * other).log_softmax(-1)
        delta = renormalised(there, 0.5 * cosine * push)
        own = Flow.of(there, delta, label[:, 0]).argmax
        contexts.append(
            {
                "cosine": cosine,
                "its own argmax rises": Share.of(own > 0).row(),
                "argmax of the pushed context rises": Share.of(
                    delta.gather(1, star_here) > 0
                ).row(),
            }
        )
    # Several positions of one response, each with a label pushed down, features overlapping.
    positions = []
    for overlap in OVERLAPS:
        for number in POSITIONS:
            each = max(1, count // number)
            apart, common = logits(each, number), logits(each, 1)
            at = overlap**0.5 * common + (1 - overlap) ** 0.5 * apart
            label = torch.randint(labels, (each, number, 1), generator=generator)
            pushes = at.softmax(-1).scatter_add(
                2, label, -torch.ones(each, number, 1, dtype=torch.float64)
            )
            kernel = torch.full((number, number), overlap, dtype=torch.float64).fill_diagonal_(1)
            shift = 0.5 * torch.einsum("mn,bnv->bmv", kernel, pushes)
            rows = at.log_softmax(-1).reshape(-1, labels)
            delta = renormalised(rows, shift.reshape(-1, labels))
            flow = Flow.of(rows, delta, label.reshape(-1))
            positions.append(
                {
                    "overlap": overlap,
                    "positions": number,
                    "label falls": Share.of(flow.label < 0).row(),
                    "argmax rises": Share.of(flow.argmax > 0).row(),
                }
            )
    return {"contexts": contexts, "positions": positions, "hidden": hidden(lab, count // 4, labels)}


def hidden(lab: Lab, count: int, labels: int, width: int = 32) -> list[dict[str, Any]]:
    """Networks z = W₂ tanh(W₁ x): one real step with the hidden layer's rate scaled by `body`.

    K = ‖h‖² I + body ‖x‖² W₂ D² W₂ᵀ: at body = 0 this is Lemma 1, beyond it labels share features.
    """
    generator = lab.generator("hidden")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(count, width) / width**0.5
    first = normal(count, width, width)
    second = 2.5 * normal(count, labels, width) / width**0.5 * 2
    label = torch.randint(labels, (count,), generator=generator)

    def log_probs(first: Tensor, second: Tensor) -> Tensor:
        units = torch.tanh(torch.einsum("bij,bj->bi", first, x))
        return torch.einsum("bvi,bi->bv", second, units).log_softmax(-1)

    leaves = [first.requires_grad_(True), second.requires_grad_(True)]
    before = log_probs(*leaves)
    loss = _own(before, label).sum()  # minimised: every network pushes its label down
    by_first, by_second = torch.autograd.grad(loss, leaves)
    before = before.detach()
    units = torch.tanh(torch.einsum("bij,bj->bi", first, x)).detach()
    lr = 0.5 / (units**2).sum(1)[:, None, None]  # η' = 0.5 of the head alone
    says = before.exp() > threshold(before, label)[:, None]
    own = torch.zeros_like(says).scatter_(1, label[:, None], True)
    rows = []
    for body in BODIES:
        with torch.no_grad():
            after = log_probs(first - body * lr * by_first, second - lr * by_second)
        delta = after - before
        flow = Flow.of(before, delta, label)
        rows.append(
            {
                "body": body,
                "label falls": Share.of(flow.label < 0).row(),
                "argmax rises": Share.of(flow.argmax > 0).row(),
                "threshold is right": Share.of(((delta > 0) == says)[~own]).row(),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Pictures


def draw_regimes(found: list[dict[str, Any]]) -> Figure:
    """Every label before and after, on a logarithmic scale."""
    figure = blank_figure(11.0, 6.3, "regimes")
    small = [p for case in found[:-1] for p in case["before"] + case["after"]]
    for place, case in enumerate(found):
        line, column = divmod(place, 3)
        axes = figure.add_axes((0.065 + 0.32 * column, 0.545 - 0.465 * line, 0.275, 0.31))
        before, after = (
            torch.tensor(case[k], dtype=torch.float64).exp() for k in ("before", "after")
        )
        if case is found[-1]:
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


def _by_label(axes: Axes, case: dict[str, Any], before: Tensor, after: Tensor) -> None:
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


def _by_rank(axes: Axes, case: dict[str, Any], before: Tensor, after: Tensor) -> None:
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


def draw_trends(
    results: dict[str, Any], accuracy: list[dict[str, Any]], entropy: list[dict[str, Any]]
) -> Figure:
    """Who gains by peakedness; where τ holds; entropy by the pushed label's probability."""
    figure = blank_figure(11.0, 3.4, "trends")
    left, middle, right = (figure.add_axes((0.065 + 0.33 * i, 0.15, 0.25, 0.73)) for i in range(3))
    rows = results["gainers"]
    x = [(r["low"] * r["high"]) ** 0.5 for r in rows]
    left.fill_between(
        x,
        [r["tenth"] for r in rows],
        [r["ninetieth"] for r in rows],
        color=RAISED,
        alpha=0.18,
        linewidth=0,
    )
    left.plot(x, [r["median"] for r in rows], color=RAISED, linewidth=2)
    left.set_xscale("log")
    left.set_xlabel("largest probability", fontsize=8.5)
    left.set_title("Flat: most others rise. Peaky: one.", loc="left", fontsize=10, weight="bold")
    left.set_ylabel("share of other labels that rise", fontsize=8.5)
    left.text(
        0.98,
        0.9,
        "median and 80 % band",
        fontsize=8,
        color=RAISED,
        ha="right",
        transform=left.transAxes,
    )
    middle.plot(
        [r["eta"] for r in accuracy],
        [r["share"] for r in accuracy],
        "o-",
        color=INK,
        linewidth=1.6,
        markersize=4,
    )
    middle.set_xscale("log")
    middle.set_ylim(min(r["share"] for r in accuracy) - 0.02, 1.004)
    middle.set_xlabel("length of the step, |η′|", fontsize=8.5)
    middle.set_ylabel("labels for which π > τ says rightly\nwhether they rise", fontsize=8.5)
    middle.set_title("τ holds while the step is short", loc="left", fontsize=10, weight="bold")
    for name, colour in (("flat", "#e69f00"), ("between", "#009e73"), ("peaky", "#0072b2")):
        line = [r for r in entropy if r["prediction"] == name]
        at = [r["probability"] for r in line]
        change = [r["entropy_change"] for r in line]
        right.plot(at, change, ".-", color=colour, linewidth=1.4, markersize=4)
        first = (at[0], change[0]) if name != "flat" else (at[-1], change[-1])
        right.annotate(
            name,
            first,
            xytext=(4, -12 if name == "between" else 6),
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
            weight="bold",
        )
    right.axhline(0, color=FAINT, linewidth=0.7)
    right.set_xscale("log")
    right.set_xlabel("probability of the label pushed down", fontsize=8.5)
    right.set_ylabel("entropy change, nats", fontsize=8.5)
    right.set_title("Valleys cost entropy, peaks give it", loc="left", fontsize=10, weight="bold")
    for axes in (left, middle, right):
        tidy(axes)
    return figure


def draw_limits(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """How often the guarantees hold with shared features, several positions, a hidden layer."""
    figure = blank_figure(11.0, 3.4, "limits")
    left, middle, right = (figure.add_axes((0.065 + 0.33 * i, 0.15, 0.25, 0.73)) for i in range(3))
    # Nothing moves at cosine 0: the lines end on both sides of it.
    for rows in (
        [r for r in found["contexts"] if r["cosine"] < 0],
        [r for r in found["contexts"] if r["cosine"] > 0],
    ):
        for key, colour in (
            ("argmax of the pushed context rises", LOWERED),
            ("its own argmax rises", RAISED),
        ):
            _line(left, [r["cosine"] for r in rows], [r[key] for r in rows], colour)
    left.text(
        0.17, 0.98, "y* of the pushed one", fontsize=8.5, color=LOWERED, weight="bold", ha="right"
    )
    left.text(0.22, 0.3, "its own y*", fontsize=8.5, color=RAISED, weight="bold")
    left.set_xlabel("cosine of its features with the pushed context's", fontsize=8.5)
    left.set_title("At another context: who rises?", loc="left", fontsize=10, weight="bold")
    shades = ["#9ecae1", "#6baed6", "#3182bd", "#08519c"]
    for overlap, colour in zip(OVERLAPS, shades, strict=True):
        rows = [r for r in found["positions"] if r["overlap"] == overlap]
        x = [r["positions"] for r in rows]
        _line(middle, x, [r["argmax rises"] for r in rows], colour)
        middle.annotate(
            f"overlap {overlap:g}",
            (x[-1], rows[-1]["argmax rises"]["share"]),
            xytext=(5, {0.3: 3, 0.9: -9}.get(overlap, -3)),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            weight="bold",
        )
    middle.set_xscale("log", base=2)
    middle.set_xticks(POSITIONS, [str(n) for n in POSITIONS])
    middle.set_xlim(0.9, 110)
    middle.set_xlabel("positions pushed down together", fontsize=8.5)
    middle.set_title("Several positions: y* rises at", loc="left", fontsize=10, weight="bold")
    rows = found["hidden"]
    x = list(range(len(rows)))
    for key, colour, text, at, above in (
        ("label falls", LOWERED, "y falls", 4, -11),
        ("argmax rises", RAISED, "y* rises", 5, -12),
        ("threshold is right", INK, "τ is right", 2, -13),
    ):
        _line(right, x, [r[key] for r in rows], colour)
        right.annotate(
            text,
            (x[at], rows[at][key]["share"]),
            xytext=(-44, above),
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
            weight="bold",
        )
    right.set_xticks(x, [f"{b:g}" for b in BODIES])
    right.set_xlabel("learning rate of the hidden layer / of the head", fontsize=8.5)
    right.set_title("A hidden layer shares features", loc="left", fontsize=10, weight="bold")
    for axes in (left, middle, right):
        axes.set_ylim(0, 1.06)
        axes.set_ylabel("share of cases", fontsize=8.5)
        tidy(axes)
    right.set_ylim(0.75, 1.015)
    return figure


def _line(axes: Axes, x: list[Any], rows: list[dict[str, Any]], colour: str) -> None:
    axes.plot(x, [r["share"] for r in rows], "o-", color=colour, linewidth=1.6, markersize=3.5)
    axes.fill_between(
        x,
        [r["low"] for r in rows],
        [r["high"] for r in rows],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )


# ---------------------------------------------------------------------------------------------
# The experiment


def run(
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
    cases: int = 10_000,
    labels: int = 50,
    large: int = 1000,
) -> dict[str, Any]:
    """Runs the experiment.

    Args:
        out: Folder for everything.
        seed: Of all random numbers.
        progress: Show bars on standard error.
        cases: Random predictions for the lemma's claims.
        labels: V of the regimes and cases.
        large: V of the large regime.

    Returns:
        What results.json holds.
    """
    if labels < 20 or large < 20 or cases < 100:
        raise ValueError(
            "labels and large must be at least 20 and cases at least 100, got "
            f"{labels}, {large} and {cases}"
        )
    lab = Lab(
        "squeeze", Path(out), seed, {"cases": cases, "labels": labels, "large": large}, progress
    )
    found = lab.once("regimes", lambda: regimes(lab, labels, large))
    counted = lab.once("cases", lambda: tallies(lab, cases, labels))
    accuracy = lab.once("threshold", lambda: threshold_accuracy(lab, cases // 4, labels))
    entropy = lab.once("entropy", lambda: entropy_curves(lab, labels))
    reference = lab.once("reference", reference_rows)
    beyond = lab.once("limits", lambda: limits(lab, cases // 5, labels))

    lab.table(
        "regimes",
        [{k: v for k, v in r.items() if k not in ("before", "after", "pushes")} for r in found],
    )
    lab.table(
        "predictions",
        [{"regime": r["regime"], **{k: _short(r[k]) for k in ("before", "after")}} for r in found],
    )
    lab.table("shares", counted["shares"])
    lab.table("kinds", counted["kinds"])
    lab.table("gainers", counted["gainers"])
    lab.table("threshold", accuracy)
    lab.table("entropy", entropy)
    lab.table("reference", reference)
    for name in ("contexts", "positions", "hidden"):
        lab.table(
            name,
            [
                {
                    f"{k}: {part}" if part else k: value
                    for k, v in row.items()
                    for part, value in (v.items() if isinstance(v, dict) else [("", v)])
                }
                for row in beyond[name]
            ],
        )
    lab.figure(
        "regimes",
        draw_regimes(found),
        "One real step of multinomial regression; predictions before (grey) and after.",
    )
    lab.figure(
        "trends",
        draw_trends(counted, accuracy, entropy),
        f"Who gains, how far τ reaches, and what entropy does, on {cases:,} random predictions.",
    )
    lab.figure(
        "limits",
        draw_limits(beyond),
        "Where the analysis of one softmax stops being true; bands are 95 % intervals.",
    )
    return _conclude(lab, found, counted, accuracy, reference, beyond)


def _short(values: list[float]) -> list[float]:
    """As precise as a picture."""
    return [float(f"{v:.5g}") for v in values]


def _conclude(
    lab: Lab,
    found: list[dict[str, Any]],
    counted: dict[str, Any],
    accuracy: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    beyond: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    share = {row["what"]: Share(row["count"], row["total"]) for row in counted["shares"]}

    def claim(
        name: str,
        text: str,
        source: str,
        published: str,
        of: Share,
        reason: str,
        kind: str = "tendency",
        corrected: str = "",
    ) -> None:
        decided = {
            "guarantee": verdict(of.count == of.total),
            "rule": of.rule,
            "tendency": of.tendency,
        }
        lab.claim(
            Claim(
                name,
                text,
                source,
                published,
                f"{of}",
                decided[kind],
                reason,
                corrected,
                of.value,
                of.interval,
            )
        )

    exact = max(r["lemma_error"] for r in found)
    lab.claim(
        Claim(
            "Lemma 1",
            "One step on W moves the prediction as the lemma's closed form says.",
            "App. E",
            "an identity",
            f"largest |Δ log π − lemma| {exact:.1e} nats in 6 real steps",
            verdict(exact < 1e-9),
            "float64, against autograd and a real step",
            "exp(|η′|(p_i − [i=y])) / Σ_j p_j exp(|η′|(p_j − [j=y]))",
            exact,
        )
    )
    # A comparison or a "largely" holds more often than not; what is said without an "often" of all
    # predictions of a kind holds as a rule.
    most = "agrees if the interval lies above one half"
    rule = "agrees if the interval lies above 95 %"
    random = "random predictions, V labels, 0.01 ≤ |η′| ≤ 10"
    claim(
        "claim 1",
        "The label pushed down falls.",
        "App. E",
        "guaranteed",
        share["label falls"],
        random,
        kind="guarantee",
    )
    claim(
        "claim 2",
        "The likeliest other label y* rises.",
        "App. E",
        "guaranteed",
        share["argmax rises"],
        random,
        kind="guarantee",
    )
    claim(
        "claim 2, largely",
        "The mass is largely squeezed into y*.",
        "§3.3",
        "largely",
        share["argmax gets over half"],
        f"over half of all that is gained; of peaky predictions (largest ≥ 0.8) "
        f"{share['argmax gets over half, peaky']}; {most}",
    )
    claim(
        "trend 3",
        "The rich get richer, the poor poorer.",
        "§3.3",
        "a trend",
        share["richer rise more"],
        "in relative terms this is exact: Δ log π_i = |η′| π_i − const for i ≠ y",
        kind="guarantee",
        corrected="a theorem for Δ log π, not only a trend",
    )
    some = {row["prediction"]: f"{100 * row['gainers']:.3g} %" for row in counted["kinds"]}
    claim(
        "trend 3A",
        "Of a flat prediction, all others rise together.",
        "App. E",
        "a trend",
        share["flat: all others rise"],
        f"flat: largest ≤ 2/V; {rule}; on average {some['flat']} of the others rise: of a label "
        "rarer than most there is not enough to go round",
        kind="rule",
    )
    claim(
        "trend 3B",
        "In between, some rise and some fall.",
        "App. E",
        "a trend",
        share["between: some rise, some fall"],
        f"{rule}; all rise in {share['between: all others rise']}, all but y* fall in "
        f"{share['between: all but the argmax fall']}",
        kind="rule",
    )
    claim(
        "trend 3C",
        "Of a peaky prediction, all but y* fall.",
        "App. E",
        "a trend",
        share["peaky: all but the argmax fall"],
        f"peaky: largest ≥ 0.8; {rule}",
        kind="rule",
    )
    same = "same prediction and step, the rarer against the commoner of two labels"
    deep = share["a deeper valley: the others lose more"]
    rise = share["a deeper valley: the argmax gains more"]
    ratio = share["a rarer label: the squeeze ratio is larger"]
    claim(
        "trend 4, others",
        "Pushing a rarer label makes the others fall more.",
        "§3.3, App. E",
        "a trend",
        share["a rarer label: the others lose more"],
        f"{same}; with the same label and a valley 3 nats deeper {deep}; {most}",
    )
    claim(
        "trend 4, ratio",
        "Pushing a rarer label squeezes more into y* per mass it loses.",
        "§3.3, App. E",
        "a trend",
        ratio,
        f"{same}; {most}",
    )
    claim(
        "trend 4, y*",
        "Pushing a rarer label makes y* rise more.",
        "§3.3, point 5",
        "y* rises more",
        share["a rarer label: the argmax gains more"],
        f"{same}; with the same label and a valley 3 nats deeper {rise}; to first order "
        "Δ log π(y*) = |η′| (π(y*) − ‖π‖² + π(y)) grows with π(y): a rarer label squeezes more "
        "of others' mass, but gives less of its own",
        corrected="y* rises less: Δ log π(y*) grows with π(y)",
    )
    longer = {
        what: share[f"a step twice as long: {what}"]
        for what in ("the argmax gains more", "the label loses more", "no fewer others fall")
    }
    claim(
        "trend 5",
        "A longer step amplifies everything.",
        "App. E",
        "a trend",
        min(longer.values(), key=lambda s: s.value),
        "the least often of: " + "; ".join(f"{k} in {v}" for k, v in longer.items()) + f"; {most}",
    )
    short, long = accuracy[0], accuracy[-1]
    # Labels of one prediction are not independent of each other: no interval.
    lab.claim(
        Claim(
            "τ",
            "A label rises if and only if π_i > τ = ‖π‖² − π_y (first order).",
            "derived",
            "",
            f"{Share(short['count'], short['total'])} labels at |η′| = {short['eta']:g}; at "
            f"{long['eta']:g} {100 * long['share']:.4g} %",
            verdict(short["share"] > 0.999),
            "agrees if it is right for 99.9 % at the shortest step",
            value=short["share"],
        )
    )
    worst = max(r["largest_difference"] for r in reference)
    off = max(abs(r["entropy_change"] - r["published_entropy_change"]) for r in reference)
    lab.claim(
        Claim(
            "entropy, values",
            "Predictions and entropy changes of the 5-label example.",
            "App. E",
            "four steps, 4 digits",
            f"largest difference {worst:.1e} in π, {off:.1e} nats in ΔH",
            verdict(worst <= 6e-5 and off <= 6e-5),
            "equal to the printed digits",
            value=max(worst, off),
        )
    )
    claim(
        "entropy, valley",
        "Pushing down a label in a valley lowers the entropy.",
        "App. E",
        "",
        share["entropy falls when a label below 1/V is pushed down"],
        rule,
        kind="rule",
    )
    claim(
        "entropy, peak",
        "Pushing down the likeliest label raises the entropy.",
        "App. E",
        "",
        share["entropy rises when the likeliest label is pushed down"],
        f"{rule}; a long step digs a valley where the peak was: at |η′| ≤ 0.1 "
        f"{share['entropy rises when the likeliest label is pushed down, |η′| ≤ 0.1']}",
        kind="rule",
    )
    valley, published, wide = found[3], found[4], found[5]
    lab.claim(
        Claim(
            "panel D",
            "A negative step in a valley makes all but y* fall.",
            "App. E figure",
            "the committed panel shows no global fall: it also pulls another label up",
            f"alone: {valley['losers']} of {valley['gainers'] + valley['losers']} others fall, y* "
            f"{valley['argmax_change']:+.3f}; as committed: y* {published['argmax_change']:+.3f}",
            verdict(valley["gainers"] == 1),
            "the claim holds for the negative step alone, which the published panel does not show",
            "the negative step alone",
            valley["losers"] / (valley["gainers"] + valley["losers"]),
        )
    )
    lab.claim(
        Claim(
            "panel E",
            "With many labels the mass goes to one, all others fall.",
            "App. E figure",
            "one label from about .12 to .86, almost all others fall",
            f"y* {wide['argmax_change']:+.3f}; {wide['losers']} of "
            f"{wide['gainers'] + wide['losers']} others fall",
            verdict(wide["gainers"] == 1 and wide["argmax_change"] > 0),
            f"V = {len(wide['before'])}, one real step, |η′| = {wide['eta']:.3g}",
            value=wide["losers"] / (wide["gainers"] + wide["losers"]),
        )
    )
    crowd = min(beyond["positions"], key=lambda r: r["argmax rises"]["share"])
    deep_net = next(r for r in beyond["hidden"] if r["body"] == 1.0)
    near = next(r for r in beyond["contexts"] if r["cosine"] == 0.75)
    rises = Share(crowd["argmax rises"]["count"], crowd["argmax rises"]["total"])
    falls = Share(crowd["label falls"]["count"], crowd["label falls"]["total"])
    lab.claim(
        Claim(
            "beyond one softmax",
            "With several positions and shared features it is more complicated.",
            "§3.3",
            "“can become more complicated”",
            f"{crowd['positions']} positions, overlap {crowd['overlap']:g}: y* rises at {rises}, "
            f"y falls at {falls}",
            verdict(rises.count < rises.total),
            "both are guaranteed for one softmax: one counterexample decides; the lowest of "
            f"{len(beyond['positions'])} settings; with a hidden layer at the head's rate y* rises "
            f"in {100 * deep_net['argmax rises']['share']:.4g} %, τ is right for "
            f"{100 * deep_net['threshold is right']['share']:.4g} % of the labels",
            value=rises.value,
        )
    )
    flat, peak = found[0], found[2]
    return lab.finish(
        [
            "A negative gradient on one label of a softmax lowers it and raises the likeliest "
            "other label y*; a flat prediction spreads the mass, a peaky one sends it to y*.",
            "The rarer the label that is pushed, the stronger this is.",
        ],
        [
            f"Both guarantees held in all of {share['argmax rises'].total:,} random cases, and "
            f"real steps follow the lemma to {exact:.0e} nats.",
            f"Flat: {flat['gainers']} of {flat['gainers'] + flat['losers']} others rose. Peaky: "
            f"{peak['losers']} of {peak['gainers'] + peak['losers']} fell, y* rose by "
            f"{peak['argmax_change']:+.3f}.",
            "A rarer label takes more from the others, but y* then rises less, not more: "
            f"it rose more in only {share['a rarer label: the argmax gains more']}.",
            f"At another context with cosine 0.75 to the pushed one its own y* rose in "
            f"{100 * near['its own argmax rises']['share']:.3g} %, the pushed context's y* in "
            f"{100 * near['argmax of the pushed context rises']['share']:.3g} %: mass follows the "
            "context that is pushed, not the one that is observed.",
            f"With {crowd['positions']} overlapping positions y* rises at {rises} only, and y "
            f"itself falls at {falls}.",
        ],
    )
