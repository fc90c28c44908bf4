"""Measures where probability goes: real steps, the lemma on random cases, and beyond one softmax.

In multinomial regression z = Wᵀx one gradient step with η' = η‖x‖² changes the prediction at x as
Lemma 1 says, which `massflow.softmax_step` computes.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.lab.record import Lab
from lddyn.lab.shares import Share
from lddyn.steps.flow import Flow, leading, renormalised, softmax_step, threshold

if TYPE_CHECKING:
    pass


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
    """Takes one real step of softmax regression in each regime and compares it with Lemma 1.

    Returns:
        One row a regime (flat, peaky, …): the measured change of π, and what Lemma 1 predicts.
    """

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
    rows = []
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
        rows.append(
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
    return rows


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
