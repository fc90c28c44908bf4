"""Compares one preference set under every loss, without training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.sets.forecast import simulate
from lddyn.sets.training_step import row_effects

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis

__all__ = ["compare_objectives"]

# Losses that pull at chosen and rejected responses in ways of their own.
COMPARED = (
    "sft",
    "unlikelihood",
    "dpo",
    "ipo",
    "hinge",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "kto",
    "simpo",
    "cpo",
    "orpo",
    "slic",
    "dpop",
    "dpo+nll",
    "cal-dpo",
)

_ALIKE = 1e-6  # largest difference of unit vectors of weights that are one direction

EXTEND = "extend"  # SFT on both responses first, the paper's remedy


def compare_objectives(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The rows of `Diagnosis.objectives`."""
    names = [*dict.fromkeys([*COMPARED, diagnosis.objective]), EXTEND]
    own = (diagnosis.objective, EXTEND)
    others = {name: diagnosis if name in own else diagnosis.under(name) for name in names}
    weights = {name: other.step.weights for name, other in others.items()}
    weights[EXTEND] = _sft_on_both(weights[EXTEND])
    directions = {name: w / w.norm().clamp(min=1e-300) for name, w in weights.items()}
    rows = []
    for name in names:
        alike = [n for n in names if float((directions[n] - directions[name]).abs().max()) < _ALIKE]
        row = _row(diagnosis, name, others[name], weights[name])
        rows.append({**row, "alike": [n for n in alike if n != name]})
    return rows


def _row(diagnosis: Diagnosis, name: str, other: Diagnosis, weights: Tensor) -> dict[str, Any]:
    """What a step of a loss with these weights (2, N) does, and a run where one is predicted."""
    step = weights.flatten() / len(diagnosis)
    size = math.sqrt(max(float(step @ diagnosis.gram @ step), 0.0)) or 1.0
    up, fall = row_effects(diagnosis.gram, weights).mean(1).view(2, -1)
    row = {
        "objective": name,
        "chosen_falls": float((up < 0).double().mean()),
        "both_fall": float(((up < 0) & (fall < 0)).double().mean()),
        "chosen": float(up.mean()) / size,
        "rejected": float(fall.mean()) / size,
    }
    if diagnosis.forecast is None:
        return row
    change = other.simulate(diagnosis.forecast.run).change
    if name == EXTEND:
        change = change + _extended(diagnosis)
    return row | {
        "run_chosen": float(change[0].mean()),
        "run_rejected": float(change[1].mean()),
        "run_chosen_falls": float((change[0] < 0).double().mean()),
    }


def _sft_on_both(log_probs: Tensor) -> Tensor:
    """∂L/∂ log π of SFT on both responses."""
    return -torch.ones_like(log_probs)


def _extended(diagnosis: Diagnosis) -> Tensor:
    """Δ log π (2, N) by SFT on both responses for as long as the run."""
    forecast, n = diagnosis.forecast, len(diagnosis)
    if forecast is None:
        return torch.zeros(2, n).double()
    run = forecast.run
    adam = diagnosis.adam if run.optimizer == "adamw" else None
    ones = torch.ones(n).double()
    linear = simulate(diagnosis.gram, adam, diagnosis.log_probs, _sft_on_both, run, range(n), ones)
    return linear.change
