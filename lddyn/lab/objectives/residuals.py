"""The coefficients c± of every objective: by autograd, in closed form, and as printed.

Every loss of a pair has ∂L/∂z+ = c+ (π − y+) and ∂L/∂z− = −c− (π − y−) at each token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.lab.record import Lab, Row
from lddyn.objectives.losses import LOSSES
from lddyn.objectives.objective import Objective
from lddyn.objectives.paired import preference

# For pictures: of like scale, so that targets lie at h = 1 or r = ±1.
SETTINGS: dict[str, dict[str, float]] = {
    "sft": {},
    "unlikelihood": {},
    "dpo": {"beta": 0.5},
    "cdpo": {"beta": 0.5, "label_smoothing": 0.1},
    "ipo": {"beta": 0.5},
    "slic": {"delta": 1.0, "beta": 0.1},
    "sppo_hard": {"beta": 0.5},
    "kto": {"beta": 0.5},
    "simpo": {"beta": 0.5, "simpo_gamma": 0.5},
    "dpop": {"beta": 0.5, "penalty": 5.0},
    "dpo+nll": {"beta": 0.5, "alpha": 0.2},
    "cal-dpo": {"beta": 0.5},
}

# The objectives that are examined.
OBJECTIVES = tuple(SETTINGS)

PRINTED = ("ipo", "slic", "sppo_hard")  # whose printed residual (Eq. 16-22) is not the gradient


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
        return 1.0 / lengths[0], 0.0
    if name == "unlikelihood":
        return 0.0, 1.0
    if name in ("dpo", "cdpo", "dpo+nll"):
        a, smooth = _sigmoid(p["beta"] * h), p.get("label_smoothing", 0.0)
        c = p["beta"] * ((1 - smooth) * (1 - a) - smooth * a)
        return c + p.get("alpha", 0.0) / lengths[0], c
    if name == "ipo":
        c = 2 * (1 / (2 * p["beta"]) - (good / lengths[0] - bad / lengths[1]))
        return c / lengths[0], c / lengths[1]
    if name == "slic":
        active = 1.0 if p["delta"] - (chosen - rejected) > 0 else 0.0
        return active + p["beta"], active
    if name == "sppo_hard":
        target = 1 / (2 * p["beta"])
        return 2 * (target - good), 2 * (target + bad)
    if name == "kto":
        s = _sigmoid(p["beta"] * (good - p["baseline"]))
        t = _sigmoid(p["beta"] * (p["baseline"] - bad))
        weights = (p["desirable_weight"] / 2, p["undesirable_weight"] / 2)
        return weights[0] * p["beta"] * s * (1 - s), weights[1] * p["beta"] * t * (1 - t)
    if name == "simpo":
        s = _sigmoid(p["beta"] * (chosen / lengths[0] - rejected / lengths[1]) - p["simpo_gamma"])
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
    if name == "sppo_hard":  # both signs turned
        return 2 * (good - 1 / (2 * p["beta"])), -2 * (bad + 1 / (2 * p["beta"]))
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
        "sppo_hard": 1 / beta if beta else 0.0,
        "kto": p.get("undesirable_weight", 1.0) * beta / 8,
        "simpo": beta / length * (1 - _sigmoid(-p.get("simpo_gamma", 0.0))),
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
        "baseline": (-1.0, 1.0),
        "desirable_weight": (0.5, 2.0),
        "undesirable_weight": (0.5, 2.0),
        "simpo_gamma": (0.0, 2.0),
        "penalty": (0.0, 50.0),
        "alpha": (0.0, 2.0),
    }
    wanted = LOSSES[name].parameters if name == "kto" else SETTINGS[name]
    return {key: uniform(*ranges[key]) for key in wanted}


def check(lab: Lab, cases: int) -> list[Row]:
    """Coefficients and logit gradients by autograd against closed and printed forms."""
    rows = []
    for name in lab.bar(OBJECTIVES, "residuals"):
        generator = lab.generator("residuals", name)
        drawn = [_random_pair(name, generator) for _ in range(cases)]
        printed = max(case["printed"] for case in drawn)
        rows.append(
            {
                "objective": name,
                "cases": cases,
                "negative margins": sum(case["negative margin"] for case in drawn),
                "c- below zero": sum(case["c- below zero"] for case in drawn),
                "largest coefficient": max(case["largest coefficient"] for case in drawn),
                "error of c": max(case["coefficients"] for case in drawn),
                "error of the logit gradient": max(case["gradient"] for case in drawn),
                "error of the printed form": printed or None,
            }
        )
    return rows


def _random_pair(name: str, generator: torch.Generator, labels: int = 12) -> dict[str, float]:
    """One random pair: the errors of the forms, and what kind of pair it was."""
    lengths = [int(n) for n in torch.randint(1, 21, (2,), generator=generator)]
    targets = [torch.randint(labels, (n,), generator=generator) for n in lengths]
    logits = [
        (2 * torch.randn(n, labels, generator=generator, dtype=torch.float64)) for n in lengths
    ]
    leaves = [z.requires_grad_(True) for z in logits]
    log_probs = [
        z.log_softmax(-1).gather(1, y[:, None])[:, 0] for z, y in zip(leaves, targets, strict=True)
    ]
    sums = [float(lp.detach().sum()) for lp in log_probs]
    drift = 3 * torch.randn(2, generator=generator, dtype=torch.float64)
    reference = (sums[0] - float(drift[0]), sums[1] - float(drift[1]))
    gains = (sums[0] - reference[0], sums[1] - reference[1])
    parameters = _draw_parameters(name, generator)
    examples = [Example((0,), tuple(y.tolist())) for y in targets]
    objective = build(name, examples[0], examples[1], reference, parameters)
    exact = closed_form(name, sums[0], sums[1], gains, (lengths[0], lengths[1]), parameters)
    # The whole gradient on the logits must be c+ R+ and −c− R−, nothing beside.
    gradients = torch.autograd.grad(objective.loss(log_probs), leaves, allow_unused=True)
    outside = 0.0
    for z, y, g, c in zip(leaves, targets, gradients, (exact[0], -exact[1]), strict=True):
        residual = z.detach().softmax(-1) - torch.nn.functional.one_hot(y, labels)
        gradient = torch.zeros_like(residual) if g is None else g
        outside = max(outside, float((gradient - c * residual).abs().max()))
    printed = stated = exact
    if name in PRINTED:  # the paper states sums over tokens, IPO's authors and TRL mean a token
        printed = printed_form(name, sums[0], sums[1], gains, parameters)
        stated = closed_form(name, sums[0], sums[1], gains, (1, 1), parameters)
    return {
        "negative margin": gains[0] < gains[1],
        "c- below zero": exact[1] < 0,
        "largest coefficient": max(map(abs, exact)),
        "coefficients": _difference(coefficients(objective, log_probs), exact),
        "gradient": outside,
        "printed": _difference(printed, stated),
    }


def _difference(one: tuple[float, float], other: tuple[float, float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


CHOSEN, REJECTED = Example((0,), (1,)), Example((0,), (2,))


CHOSEN, REJECTED = Example((0,), (1,)), Example((0,), (2,))


def at_margin(
    name: str, gains: tuple[float, float], reference: tuple[float, float]
) -> tuple[float, float]:
    """(c+, c−) of one-token responses at r±, with the settings of the pictures."""
    objective = build(name, CHOSEN, REJECTED, reference, SETTINGS[name])
    log_probs = [
        torch.tensor([r + g], dtype=torch.float64) for r, g in zip(reference, gains, strict=True)
    ]
    return coefficients(objective, log_probs)


def scan(lab: Lab) -> list[Row]:
    """c± along the margin, r± = ±h/2, log π_ref = −2 of both."""
    rows = []
    for name in lab.bar(OBJECTIVES, "margins"):
        for step in range(-24, 25):
            h = step / 4
            c = at_margin(name, (h / 2, -h / 2), (-2.0, -2.0))
            row: Row = {"objective": name, "margin": h, "c+": c[0], "c-": c[1]}
            if name in PRINTED:
                full = {**SETTINGS[name]}
                said = printed_form(name, h / 2 - 2, -h / 2 - 2, (h / 2, -h / 2), full)
                row |= {"printed c+": said[0], "printed c-": said[1]}
            rows.append(row)
    return rows
