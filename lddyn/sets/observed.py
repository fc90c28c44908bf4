"""What training on a set does to sequences that it does not train on, as rows of a table."""

from __future__ import annotations

from typing import Any

from lddyn.sets.forecast import Forecast
from lddyn.sets.training_step import TrainingStep

__all__ = ["observed_rows"]


def observed_rows(step: TrainingStep, run: Forecast | None, count: int) -> list[dict[str, Any]]:
    """One dict for each observed sequence.

    Args:
        step: One small step on the set.
        run: The predicted run, or None.
        count: Rows of the set that are named for each.

    Returns:
        Rows "name", "tokens", "log_prob" (nats); "set_change", d log π by a step on the set per
        unit of lr, with its "stderr" (0 where inner products are exact); with a run "run_change"
        (nats). "lowered_by" and "raised_by" are [row, part] of that rows' part, the largest first:
        nats of the run, or per unit of lr without one.
    """
    error, changes = step.observed_stderr, step.observed_effects.mean(1)
    parts = step.observed_effects / len(step)
    if run is not None and run.observed_effects is not None:
        parts = run.observed_effects
    rows = []
    for m, (name, example) in enumerate(step.set_.observed.items()):
        order = [int(j) for j in parts[m].argsort(stable=True)]
        falling = [(j, float(parts[m, j])) for j in order if parts[m, j] < 0]
        rising = [(j, float(parts[m, j])) for j in reversed(order) if parts[m, j] > 0]
        row = {
            "name": name,
            "tokens": len(example),
            "log_prob": float(step.readings.observed[m]),
            "set_change": float(changes[m]),
            "stderr": 0.0 if error is None else float(error[m]),
            "lowered_by": falling[:count],
            "raised_by": rising[:count],
        }
        if run is not None and run.observed is not None:
            row["run_change"] = float(run.observed[m])
        rows.append(row)
    return rows
