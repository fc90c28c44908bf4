"""Measures where probability goes: real steps, the lemma on random cases, and beyond one softmax.

In multinomial regression z = Wᵀx one gradient step with η' = η‖x‖² changes the prediction at x as
Lemma 1 says, which `massflow.softmax_step` computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.lab.record import Lab, Row
from lddyn.lab.shares import Share
from lddyn.steps.flow import Flow, leading, renormalised, softmax_step, threshold

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


@dataclass(frozen=True)
class _Regime:
    """A prediction, and the labels of it that one step pulls up (+1) or pushes down (−1)."""

    name: str
    weights: Tensor
    features: Tensor
    pushes: dict[int, float]
    lr: float


def regimes(lab: Lab, labels: int, large: int) -> list[Row]:
    """Takes one real step of softmax regression in each regime and compares it with Lemma 1.

    Returns:
        One row a regime (flat, peaky, …): the measured change of π, and what Lemma 1 predicts.
    """
    return [_regime_row(regime) for regime in _regimes(lab, labels, large)]


def _regimes(lab: Lab, labels: int, large: int) -> list[_Regime]:
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
    typical = (wide_x @ wide).argsort(descending=True).tolist()[large // 10]
    return [
        _Regime("flat, one label pushed down", flat, x, {int(0.84 * labels): -1.0}, 0.3),
        _Regime("peaky, the second peak pulled up", peaky, x, {peak: 1.0}, 0.5),
        _Regime("peaky, the second peak pushed down", peaky, x, {peak: -1.0}, 0.5),
        _Regime("peaky, a valley pushed down", peaky, x, {valley: -1.0}, 0.5),
        _Regime("as published: another pulled up too", peaky, x, {valley: -1.0, other: 1.0}, 0.5),
        _Regime(f"V = {large:,}, a typical label down", wide, wide_x, {typical: -1.0}, 1.0),
    ]


def _regime_row(regime: _Regime) -> Row:
    """One real step in a regime, and its difference from Lemma 1."""
    before, after = regression_step(regime.weights, regime.features, regime.pushes, regime.lr)
    eta = regime.lr * float(regime.features @ regime.features)
    coefficients = torch.zeros_like(before)
    for label, sign in regime.pushes.items():
        coefficients[label] = eta * sign
    lemma = softmax_step(before, coefficients)
    pushed = torch.tensor([next(iter(regime.pushes))])
    flow = Flow.of(before[None], (after - before)[None], pushed)
    ratio = float(flow.ratio[0])
    return {
        "regime": regime.name,
        "eta": eta,
        "pushes": {str(k): v for k, v in regime.pushes.items()},
        "argmax": int(flow.leading[0, 0]),
        "threshold": float(threshold(before, pushed[0])),
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


def _sharpness(logits: Tensor, peak: float) -> float:
    """The factor on the logits that makes the largest probability `peak`, by bisection."""
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


@dataclass(frozen=True)
class _Cases:
    """Random predictions, each with a label that is pushed down, and what the push does.

    Attributes:
        log_probs: log π before the step, nats, (count, V).
        label: The pushed label y, (count,).
        size: |η′|, (count,).
        delta: Δ log π, nats, (count, V).
        flow: Where the probability goes.
        kinds: "flat", "between" and "peaky" to the cases of that kind, (count,) bool.
    """

    log_probs: Tensor
    label: Tensor
    size: Tensor
    delta: Tensor
    flow: Flow
    kinds: dict[str, Tensor]

    @classmethod
    def draw(cls, lab: Lab, count: int, labels: int) -> _Cases:
        log_probs, label, size = random_cases(lab, count, labels)
        delta = push_down(log_probs, label, size)
        largest = log_probs.exp().amax(1)
        flat, peaky = largest <= 2 / labels, largest >= 0.8
        kinds = {"flat": flat, "between": ~flat & ~peaky, "peaky": peaky}
        return cls(log_probs, label, size, delta, Flow.of(log_probs, delta, label), kinds)

    @property
    def probs(self) -> Tensor:
        return self.log_probs.exp()

    @property
    def others(self) -> int:
        """The number of labels that are not pushed."""
        return self.log_probs.shape[1] - 1

    def flow_of_push(self, label: Tensor, size: Tensor) -> Flow:
        """The flow if another label were pushed down, or by another length."""
        return Flow.of(self.log_probs, push_down(self.log_probs, label, size), label)


def tallies(lab: Lab, count: int, labels: int) -> dict[str, list[Row]]:
    """The lemma's guarantees and trends, counted on random cases."""
    cases = _Cases.draw(lab, count, labels)
    statements = _guarantees(cases) | _flatness(cases) | _entropy_signs(cases)
    for name, (strong, weak, which) in _comparisons(lab, cases).items():
        statements |= {f"{name}: {k}": v[which] for k, v in _stronger(strong, weak).items()}
    return {
        "shares": [{"what": k, **Share.of(v).row()} for k, v in statements.items()],
        "kinds": [
            {
                "prediction": name,
                "cases": int(of.sum()),
                "gainers": float(cases.flow.gainers[of].double().mean()) / cases.others,
            }
            for name, of in cases.kinds.items()
        ],
        "gainers": list(_gainers_by_peak(cases)),
    }


def _guarantees(cases: _Cases) -> dict[str, Tensor]:
    """Statements that hold, or not, in each case: the two guarantees, and where the mass goes."""
    flow, label = cases.flow, cases.label[:, None]
    most = flow.change.scatter(1, label, -torch.inf).amax(1)
    over_half = flow.argmax > 0.5 * flow.gained
    # Rich get richer: sorted by π, the relative changes of all other labels are sorted too.
    order = cases.log_probs.scatter(1, label, -torch.inf).argsort(1, descending=True)[:, :-1]
    ranked = cases.delta.gather(1, order)
    return {
        "label falls": flow.label < 0,
        "argmax rises": flow.argmax > 0,
        "argmax gains most": flow.argmax >= most,
        "argmax gets over half": over_half,
        "argmax gets over half, peaky": over_half[cases.kinds["peaky"]],
        "richer rise more": (ranked.diff(dim=1) <= 1e-14).all(1),
    }


def _flatness(cases: _Cases) -> dict[str, Tensor]:
    """Which labels rise, by the kind of prediction."""
    flat, between, peaky = (cases.kinds[kind] for kind in ("flat", "between", "peaky"))
    all_rise, only_star = cases.flow.gainers == cases.others, cases.flow.gainers == 1
    return {
        "flat: all others rise": all_rise[flat],
        "between: some rise, some fall": (~all_rise & ~only_star)[between],
        "between: all others rise": all_rise[between],
        "between: all but the argmax fall": only_star[between],
        "peaky: all but the argmax fall": only_star[peaky],
    }


def _entropy_signs(cases: _Cases) -> dict[str, Tensor]:
    """Whether entropy rises when a peak is pushed down, and falls when a valley is."""
    star = cases.probs.argmax(1)
    rises = cases.flow_of_push(star, cases.size).entropy > 0
    valley = _own(cases.probs, cases.label) < 1 / cases.probs.shape[1]
    peak = "entropy rises when the likeliest label is pushed down"
    return {
        peak: rises,
        f"{peak}, |η′| ≤ 0.1": rises[cases.size <= 0.1],
        "entropy falls when a label below 1/V is pushed down": cases.flow.entropy[valley] < 0,
    }


def _comparisons(lab: Lab, cases: _Cases) -> dict[str, tuple[Flow, Flow, Tensor]]:
    """Pairs of pushes, the one that should squeeze more first, and the cases that count."""
    probs, label, size = cases.probs, cases.label, cases.size
    count, labels = probs.shape
    star = probs.argmax(1)
    every = torch.ones(count, dtype=torch.bool)
    # Trend 4, the same prediction: of two labels other than the argmax, push the rarer one.
    pairs = torch.rand(count, labels, generator=lab.generator("pairs"), dtype=torch.float64)
    pairs = pairs.scatter(1, star[:, None], -1.0).topk(2, dim=1).indices
    rarer = _own(probs, pairs[:, 0]) < _own(probs, pairs[:, 1])
    rare = torch.where(rarer, pairs[:, 0], pairs[:, 1])
    common = torch.where(rarer, pairs[:, 1], pairs[:, 0])
    # Trend 4, the same label: dig its valley three nats deeper.
    dug = torch.full((count, 1), -3.0).double()
    deeper = cases.log_probs.scatter_add(1, label[:, None], dug).log_softmax(-1)
    in_deeper = Flow.of(deeper, push_down(deeper, label, size), label)
    return {
        "a rarer label": (
            cases.flow_of_push(rare, size),
            cases.flow_of_push(common, size),
            every,
        ),
        "a deeper valley": (in_deeper, cases.flow, label != star),
        "a step twice as long": (cases.flow_of_push(label, 2 * size), cases.flow, every),
    }


def _stronger(strong: Flow, weak: Flow) -> dict[str, Tensor]:
    """In which respects one push squeezes more than another, in each case."""
    return {
        "no fewer others fall": strong.losers >= weak.losers,
        "the squeeze ratio is larger": strong.ratio > weak.ratio,
        "the others lose more": strong.lost < weak.lost,
        "the argmax gains more": strong.argmax > weak.argmax,
        "the label loses more": strong.label < weak.label,
    }


def _gainers_by_peak(cases: _Cases) -> Iterator[dict[str, float]]:
    """Quantiles of the share of other labels that rise, by the largest probability."""
    largest = cases.probs.amax(1)
    edges = torch.logspace(-1.7, 0, 15, dtype=torch.float64).tolist()
    for low, high in itertools.pairwise(edges):
        inside = (largest >= low) & (largest < high)
        if int(inside.sum()) >= 30:
            gain = cases.flow.gainers[inside].double() / cases.others
            tenth, half, most = gain.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
            yield {
                "low": low,
                "high": high,
                "cases": int(inside.sum()),
                "tenth": tenth,
                "median": half,
                "ninetieth": most,
                "mean": float(gain.mean()),
            }


def _own(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, labels[:, None])[:, 0]


def threshold_accuracy(lab: Lab, count: int, labels: int) -> list[Row]:
    """How often π_i > τ says rightly whether a label rises, by the length of the step."""
    log_probs, label, _ = random_cases(lab, count, labels)
    own = torch.zeros_like(log_probs, dtype=torch.bool).scatter_(1, label[:, None], True)
    says = log_probs.exp() > threshold(log_probs, label)[:, None]
    rows = []
    for size in STEPS:
        right = (push_down(log_probs, label, torch.full((count,), size).double()) > 0) == says
        rows.append({"eta": size, **Share.of(right[~own]).row()})
    return rows


def entropy_curves(lab: Lab, labels: int) -> list[Row]:
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


def reference_rows() -> list[Row]:
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


def limits(lab: Lab, count: int, labels: int) -> dict[str, list[Row]]:
    """The two guarantees where other positions and layers share what moves; η' = −0.5 each."""
    generator = lab.generator("limits")
    return {
        "contexts": _other_contexts(generator, count, labels),
        "positions": [
            _several_positions(generator, max(1, count // number), labels, number, overlap)
            for overlap in OVERLAPS
            for number in POSITIONS
        ],
        "hidden": hidden(lab, count // 4, labels),
    }


def _scattered_logits(generator: torch.Generator, *shape: int) -> Tensor:
    return 2.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def _other_contexts(generator: torch.Generator, count: int, labels: int) -> list[Row]:
    """A context x_o whose features have some cosine with those of the pushed one.

    With the same W its logits Wᵀx_o have that cosine too, and K = cosine · ‖x‖² I.
    """
    here = _scattered_logits(generator, count, labels)
    other = _scattered_logits(generator, count, labels)
    label = torch.randint(labels, (count, 1), generator=generator)
    push = here.softmax(-1).scatter_add(1, label, -torch.ones(count, 1, dtype=torch.float64))
    star = leading(here, label[:, 0], 1)
    rows = []
    for cosine in COSINES:
        there = (cosine * here + (1 - cosine**2) ** 0.5 * other).log_softmax(-1)
        delta = renormalised(there, 0.5 * cosine * push)
        own = Flow.of(there, delta, label[:, 0]).argmax
        of_pushed = delta.gather(1, star)
        rows.append(
            {
                "cosine": cosine,
                "its own argmax rises": Share.of(own > 0).row(),
                "argmax of the pushed context rises": Share.of(of_pushed > 0).row(),
            }
        )
    return rows


def _several_positions(
    generator: torch.Generator, count: int, labels: int, number: int, overlap: float
) -> Row:
    """Positions of one response, each with a label pushed down, whose features overlap."""
    apart = _scattered_logits(generator, count, number, labels)
    common = _scattered_logits(generator, count, 1, labels)
    at = overlap**0.5 * common + (1 - overlap) ** 0.5 * apart
    label = torch.randint(labels, (count, number, 1), generator=generator)
    down = -torch.ones(count, number, 1, dtype=torch.float64)
    pushes = at.softmax(-1).scatter_add(2, label, down)
    kernel = torch.full((number, number), overlap, dtype=torch.float64).fill_diagonal_(1)
    shift = 0.5 * torch.einsum("mn,bnv->bmv", kernel, pushes)
    rows = at.log_softmax(-1).reshape(-1, labels)
    delta = renormalised(rows, shift.reshape(-1, labels))
    flow = Flow.of(rows, delta, label.reshape(-1))
    return {
        "overlap": overlap,
        "positions": number,
        "label falls": Share.of(flow.label < 0).row(),
        "argmax rises": Share.of(flow.argmax > 0).row(),
    }


def hidden(lab: Lab, count: int, labels: int, width: int = 32) -> list[Row]:
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
