"""Tables of the DPO experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lddyn.lab.curves import Curves
from lddyn.lab.mass import (
    total_mass,
)
from lddyn.lab.record import Lab, Row

AGAIN, ON_POLICY = "SFT at the same rate", "on-policy"


def off_policy(length: int) -> str:
    """Name of the run that begins after `length` updates of SFT."""
    return f"off-policy after {length}"


@dataclass
class Runs:
    """What the runs of the experiment measured.

    Attributes:
        lengths: Updates of SFT before DPO, ascending.
        curves: Name of the run → log-probs over training.
        mass: Name of the run → where the mass of each probe's y− went.
        steps: Where the mass of y− went in single steps, predicted and measured.
    """

    lengths: tuple[int, ...]
    curves: dict[str, Curves] = field(default_factory=dict)
    mass: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)

    @property
    def main(self) -> str:
        """Name of the off-policy run after the longest SFT."""
        return off_policy(self.lengths[-1])

    def step(self, kind: str) -> Row:
        """The sum over positions of the single steps: "measured" or "predicted"."""
        return next(row for row in self.steps if row["kind"] == kind and row["position"] < 0)


def write_tables(lab: Lab, runs: Runs) -> None:
    """Writes every table of the experiment."""
    columns = ("run", "update", "type", "log_prob", "greedy")
    lab.table(
        "curves",
        [
            {name: row[name] for name in columns}
            for run, curves in runs.curves.items()
            for row in curves.rows(run)
        ],
    )
    lab.table("terms", terms(runs.curves))
    lab.table(
        "mass",
        [
            {
                "run": run,
                "moved": place,
                "sum over positions, mean over prompts": value / len(mass),
            }
            for run, mass in runs.mass.items()
            for place, value in total_mass(mass).items()
        ],
    )
    lab.table("mass_step", runs.steps)


def terms(curves: Mapping[str, Curves]) -> list[Row]:
    """The y+ and the y− term at every type, mean over probes and explained updates."""
    rows = []
    for name, curve in curves.items():
        parts, types = curve.raw["explained"], np.array(curve.raw["explained types"])
        if not parts:
            continue
        measured = np.mean([p["measured"] for p in parts], 0)
        plus, minus = (
            np.mean([p["predicted"][t] for p in parts], 0) for t in ("chosen", "rejected")
        )
        rows += [
            {
                "run": name,
                "type": field,
                "updates": len(parts),
                "y+ term": float(plus[types == field].mean()),
                "y- term": float(minus[types == field].mean()),
                "measured": float(measured[types == field].mean()),
            }
            for field in curve.fields
            if (types == field).any()
        ]
    return rows
