"""What to do with each pair of a diagnosed set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis

__all__ = ["choose_actions"]


def choose_actions(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The rows of `Diagnosis.actions`."""
    weights, contribution = diagnosis.pair_weights().tolist(), diagnosis.contribution.tolist()
    entangled, pairs, rows = set(diagnosis.entangled), diagnosis.pairs, []
    for pair in diagnosis.worst():
        weight, part = weights[pair], contribution[pair]
        why = f"{'lowers' if part < 0 else 'raises'} the chosen responses"
        if pair in pairs.faults:
            action, why = "fix", pairs.faults[pair]
        elif pairs.equal(pair):
            action, why = "fix", "chosen and rejected are the same"
        elif pair in entangled:
            action, why = "fix", "y− is too like y+: the pair's own step lowers its y+"
        elif weight < 0.05:
            action = "drop"
        elif not 0.5 <= weight <= 2:
            action = "reweight"
        else:
            action = "keep"
        rows.append(
            {"pair": pair, "action": action, "weight": weight, "contribution": part, "why": why}
        )
    return rows
