"""Where the probability goes when one label is pushed down (paper §3.3 and App. E).

Measured: six real steps (four regimes, the published panel, V = 1000); the two guarantees of
Lemma 1 and its trends on random cases; the threshold τ; entropy; and what is left of the guarantees
where other positions and other layers share the parameters that move.
"""

from __future__ import annotations

from collections.abc import Sequence

from lddyn.lab.experiment import experiment
from lddyn.lab.record import Lab, Results, Row
from lddyn.lab.settings import Squeeze
from lddyn.lab.squeeze import measure, pictures
from lddyn.lab.squeeze.claims import Measured, expected, make_claims, seen
from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("squeeze", Squeeze)
def run(lab: Lab, settings: Squeeze) -> Results:
    """Takes real steps of softmax regression, tallies random cases, and goes beyond one softmax.

    Cost: with the default settings a second of one core.
    """
    cases, labels = settings.cases, settings.labels
    measured = Measured(
        regimes=lab.once("regimes", lambda: measure.regimes(lab, labels, settings.large)),
        counted=lab.once("cases", lambda: measure.tallies(lab, cases, labels)),
        accuracy=lab.once("threshold", lambda: measure.threshold_accuracy(lab, cases // 4, labels)),
        entropy=lab.once("entropy", lambda: measure.entropy_curves(lab, labels)),
        reference=lab.once("reference", measure.reference_rows),
        limits=lab.once("limits", lambda: measure.limits(lab, cases // 5, labels)),
    )
    _tables(lab, measured)
    lab.figure(
        "regimes",
        pictures.draw_regimes(measured.regimes),
        "One real step of multinomial regression: predictions before (grey) and after.",
    )
    lab.figure(
        "trends",
        pictures.draw_trends(measured.counted, measured.accuracy, measured.entropy),
        "Which labels gain, up to which step length τ is right, and how entropy changes, on "
        f"{cases:,} random predictions.",
    )
    lab.figure(
        "limits",
        pictures.draw_limits(measured.limits),
        "Where the analysis of one softmax stops being true. Bands are 95 % intervals.",
    )
    for claim in make_claims(measured):
        lab.claim(claim)
    return lab.finish(expected(), seen(measured))


def _tables(lab: Lab, measured: Measured) -> None:
    lab.table(
        "regimes",
        [
            {k: v for k, v in row.items() if k not in ("before", "after", "pushes")}
            for row in measured.regimes
        ],
    )
    lab.table(
        "predictions",
        [
            {"regime": row["regime"], **{k: _short(row[k]) for k in ("before", "after")}}
            for row in measured.regimes
        ],
    )
    for name in ("shares", "kinds", "gainers"):
        lab.table(name, measured.counted[name])
    lab.table("threshold", measured.accuracy)
    lab.table("entropy", measured.entropy)
    lab.table("reference", measured.reference)
    for name in ("contexts", "positions", "hidden"):
        lab.table(name, [_flat(row) for row in measured.limits[name]])


def _flat(row: Row) -> Row:
    """A row whose shares are columns of their own: "argmax rises: count"."""
    return {
        f"{name}: {part}" if part else name: value
        for name, inner in row.items()
        for part, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    }


def _short(values: Sequence[float]) -> list[float]:
    """Five significant digits, as precise as a picture."""
    return [float(f"{v:.5g}") for v in values]
