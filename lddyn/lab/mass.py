"""Where the probability mass of responses went: between two models, and to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.logits import response_logits
from lddyn.engine.pushforward import batched_shifts
from lddyn.lab.setting import Setting
from lddyn.optimizers import Direction
from lddyn.steps.flow import Flow

__all__ = [
    "PLACES",
    "mass_by_place",
    "mass_of_run",
    "measured_flows",
    "predicted_flows",
    "shares_of_mass",
    "total_mass",
]

# Where mass can be -> the attribute of a Flow that says how much it gained there.
PLACES = {"response": "label", "likeliest other": "argmax", "top": "top", "rest": "rest"}


def measured_flows(before: nn.Module, after: nn.Module, examples: Sequence[Example]) -> list[Flow]:
    """Where the mass of each response went between two models."""
    pairs = zip(_by_example(before, examples), _by_example(after, examples), strict=True)
    return [Flow.of(old, new - old, targets) for (old, targets), (new, _) in pairs]


def predicted_flows(
    model: nn.Module, examples: Sequence[Example], directions: Mapping[str, Direction]
) -> dict[str, list[Flow]]:
    """Where the mass of each response goes to first order in a change of the parameters.

    Returns:
        Name of the direction → one Flow per example.
    """
    flows: dict[str, dict[int, Flow]] = {name: {} for name in directions}
    for index, shift in batched_shifts(model, examples, list(directions.values())):
        log_probs = shift.logits.double().log_softmax(-1)
        for name, change in zip(directions, shift.change, strict=True):
            flows[name][index] = Flow.first_order(log_probs, change, shift.targets)
    return {name: [by[i] for i in range(len(examples))] for name, by in flows.items()}


def _by_example(model: nn.Module, examples: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
    """Log π (L, V) and targets (L,) of each response, in order."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in examples]
    with torch.inference_mode():
        for logits, targets, owners in response_logits(model, examples):
            log_probs = logits.double().log_softmax(-1)
            for owner in owners.unique().tolist():
                mine = owners == owner
                parts[owner].append((log_probs[mine], targets[mine]))
    return [(torch.cat([p for p, _ in part]), torch.cat([t for _, t in part])) for part in parts]


def mass_by_place(flow: Flow, positions: slice = slice(None)) -> dict[str, float]:
    """Probability that each place gained at these positions, and how often y was the likeliest."""
    gained = {place: float(getattr(flow, name)[positions].sum()) for place, name in PLACES.items()}
    return {**gained, "was likeliest": float(flow.likeliest[positions].double().mean())}


def mass_of_run(setting: Setting, before: nn.Module, after: nn.Module) -> list[dict[str, float]]:
    """Where the mass of every probe's y− went between two models."""
    rejected = setting.encode(setting.probes, ("rejected",)).examples
    return [mass_by_place(flow) for flow in measured_flows(before, after, rejected)]


def total_mass(responses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Probability that each place gained, summed over responses."""
    return {place: float(np.sum([r[place] for r in responses])) for place in PLACES}


def shares_of_mass(responses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What each place besides y− gained, per unit that y− lost."""
    total = total_mass(responses)
    return {k: -v / total["response"] for k, v in total.items() if k != "response"}
