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

EXTEND = "extend"  # SFT on both responses first, the paper's remedy


def compare_objectives(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The rows of `Diagnosis.objectives`."""
    names = dict.fromkeys([*COMPARED, diagnosis.objective])
    return [_row(diagnosis, name) for name in (*names, EXTEND)]


def _row(diagnosis: Diagnosis, name: str) -> dict[str, Any]:
    own = name in (diagnosis.objective, EXTEND)
    other = diagnosis if own else diagnosis.under(name)
    weights = other.step.weights
    if name == EXTEND:
        weights = _sft_on_both(weights)
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
