"""Twelve objectives: their residuals, and where they push (paper App. B, Fig. 2).

Measured: the coefficients c± by autograd against closed forms and the paper's printed ones; how
they change with the margin; the gradient field on the simplex {y+, y−, another label}; and what a
softmax of 50 labels does under each objective when y− is unlikely, and when it is likely.
"""

from __future__ import annotations

from collections.abc import Sequence

from lddyn.lab.experiment import experiment
from lddyn.lab.objectives import flows, pictures, residuals
from lddyn.lab.objectives.claims import Measured, expected, make_claims, seen
from lddyn.lab.record import Lab, Results
from lddyn.lab.settings import Objectives
from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("objectives", Objectives)
def run(lab: Lab, settings: Objectives) -> Results:
    """Compares the residuals of twelve objectives, and descends a softmax under each.

    Cost: with the default settings 6 seconds of one core.
    """
    checked = lab.once("residuals", lambda: residuals.check(lab, settings.cases))
    scanned = lab.once("margins", lambda: residuals.scan(lab))
    fields = lab.once("simplex", lambda: flows.fields(lab))
    flowed = lab.once("flows", lambda: flows.flows(lab, settings.labels, settings.steps))
    lab.table("residuals", checked)
    lab.table("margins", scanned)
    lab.table(
        "simplex",
        [
            {"start": where, "objective": name, **{k: _short(v) for k, v in parts.items()}}
            for where, by_name in fields.items()
            for name, parts in by_name.items()
        ],
    )
    lab.table("flows", flowed["curves"])
    lab.table("summary", flowed["summary"])
    lab.figure(
        "coefficients",
        pictures.draw_scan(scanned),
        "The lines are the library's losses, by autograd. Shaded: y− is pulled up instead of "
        "pushed down.",
    )
    for where in flows.STARTS:
        lab.figure(
            f"simplex-{where}",
            pictures.draw_simplex(fields, where),
            "Arrows are dπ of a gradient step; their lengths are drawn as the square root.",
        )
    lab.figure(
        "flow",
        pictures.draw_flow(flowed["curves"]),
        "50 labels, the softmax that holds y−. The first step is equally long for all objectives.",
    )
    measured = Measured(checked, scanned, flowed["summary"], settings.steps)
    for claim in make_claims(measured):
        lab.claim(claim)
    return lab.finish(expected(), seen(measured))


def _short(rows: Sequence[Sequence[float]]) -> str:
    """Rows of numbers as text, as precise as a picture."""
    return ";".join(",".join(f"{x:.3g}" for x in row) for row in rows)
