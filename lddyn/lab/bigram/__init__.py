"""The same negative step in a table of logits and in shared features: the poster's 2-gram example.

Three bigram language models read the same text. In a table every context has logits of its own,
so K between two contexts is exactly zero and a push changes its own context only. In a factorised
model and in a network contexts share features, and the push changes other contexts too. Every step
is a real one.
"""

from __future__ import annotations

from collections.abc import Mapping

from lddyn.lab.bigram.claims import expected, make_claims, seen
from lddyn.lab.bigram.measure import measure_pushes
from lddyn.lab.bigram.models import KINDS
from lddyn.lab.bigram.pictures import draw_leak, draw_longer
from lddyn.lab.experiment import experiment
from lddyn.lab.record import Lab, Results, Row
from lddyn.lab.settings import Bigram
from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("bigram", Bigram)
def run(lab: Lab, settings: Bigram) -> Results:
    """Trains three bigram models of one text, and pushes the same words down in each.

    Cost: with the default settings 2 seconds of one core.
    """
    measured = lab.once("pushes", lambda: measure_pushes(lab, settings))
    for name in ("kernels", "longer", "repeated", "pairs"):
        lab.table(name, measured[name])
    lab.table("shown", _shown_rows(measured["shown"]))
    lab.figure(
        "leak",
        draw_leak(measured),
        "Above: ‖K‖_F between contexts; darker is larger, white is below 0.001 of the diagonal. "
        "Below: in a table the push changes its own row only; shared features carry it to others.",
    )
    lab.figure("longer", draw_longer(measured), "Means over pairs, with 95 % intervals.")
    made = list(make_claims(measured, settings))
    for claim in made:
        lab.claim(claim)
    return lab.finish(expected(), seen(measured, made))


def _shown_rows(shown: Mapping[str, Mapping[str, list[list[float]]]]) -> list[Row]:
    """The picture's push, one row per model and context, with four digits."""
    return [
        {
            "model": kind,
            "context": context,
            **{
                name: [float(f"{x:.4g}") for x in values[context]]
                for name, values in shown[kind].items()
            },
        }
        for kind in KINDS
        for context in range(len(shown[kind]["before"]))
    ]
