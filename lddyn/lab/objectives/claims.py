"""The claims about the objectives, and how each is decided."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lddyn.lab.objectives.flows import SITUATIONS
from lddyn.lab.objectives.residuals import (
    OBJECTIVES,
    PRINTED,
    SETTINGS,
    at_margin,
    strength_at_start,
)
from lddyn.lab.record import Claim, Row, Rows
from lddyn.lab.shares import Share, verdict
from lddyn.objectives.losses import LOSSES

_EXACT = 1e-8  # two numbers that differ by no more are called equal
_OTHERS = "change of log others"

_CORRECTED = {
    "ipo": "2 (1/(2β) − h) on both",
    "slic": "1[·] on y−, 1[·] + β on y+ (regularised on y+)",
    "sppo_hard": "2 (η/2 − r+) and 2 (η/2 + r−)",
}
_PUBLISHED = {
    "ipo": "β (1 − a), a = h − 1/(2β)",
    "slic": "1[·] times DPO's",
    "sppo_hard": "2 (r+ − η/2) (π − y+) + 2 (r− + η/2) (π − y−)",
}


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        residuals: Errors of the closed and the printed forms, one row per objective.
        margins: c± by the margin.
        flows: What becomes of the softmax at χ−, one row per situation and objective.
        steps: Steps of those descents.
    """

    residuals: Rows
    margins: Rows
    flows: Rows
    steps: int

    @property
    def error(self) -> float:
        """Largest difference between autograd and the closed forms."""
        kinds = ("error of c", "error of the logit gradient")
        return max(float(row[kind]) for row in self.residuals for kind in kinds)

    @property
    def turning(self) -> list[str]:
        """Objectives whose push on y− turns into a pull at some margin."""
        return [name for name in OBJECTIVES if any(c < -1e-9 for c in self.pushes(name))]

    def pushes(self, name: str) -> list[float]:
        """c− of an objective along the margins."""
        return [row["c-"] for row in self.margins if row["objective"] == name]

    def flow(self, situation: str, name: str) -> Row:
        """The row of a situation and an objective."""
        return next(
            row for row in self.flows if row["situation"] == situation and row["objective"] == name
        )

    @property
    def pushing(self) -> list[str]:
        """Objectives that push an unlikely y− down at the start."""
        return [name for name in OBJECTIVES if self.flow("valley", name)["c- at the start"] > 0]

    @property
    def squeezing(self) -> list[str]:
        """Those that thereby lower the other labels and raise y*."""
        rows = {name: self.flow("valley", name) for name in self.pushing}
        return [n for n, row in rows.items() if row[_OTHERS] < 0 and row["change of y*"] > 0]


def _titles(names: Iterable[str]) -> str:
    return ", ".join(LOSSES[name].title for name in names)


def make_claims(measured: Measured) -> Iterator[Claim]:
    """All claims of the experiment."""
    yield _closed_forms(measured)
    by_name = {row["objective"]: row for row in measured.residuals}
    for name in PRINTED:
        yield _printed(name, by_name[name])
    yield from _strength_at_start()
    yield _regularising(measured.pushes("dpo"))
    yield _sign_flips(measured.turning)
    yield _valley(measured)
    yield _off_policy(measured)
    yield _same_context(measured.flow(SITUATIONS[3], "dpo"))


def _closed_forms(measured: Measured) -> Claim:
    total = sum(row["cases"] for row in measured.residuals)
    return Claim(
        "closed forms",
        "Each objective's residual is c+ (π − y+) and −c− (π − y−), with c± in closed form.",
        "App. B, corrected",
        "12 pairs of formulas",
        f"largest difference {measured.error:.1e} in {total:,} random pairs",
        verdict(measured.error <= _EXACT),
        "autograd in float64, the whole gradient on the logits included; "
        f"{sum(row['negative margins'] for row in measured.residuals):,} of the pairs have a "
        "negative margin",
        value=measured.error,
    )


def _printed(name: str, row: Row) -> Claim:
    title, off = LOSSES[name].title, row["error of the printed form"]
    return Claim(
        f"{title}, printed",
        f"{title}'s residual is as printed.",
        "App. B Eq. 16-22",
        _PUBLISHED[name],
        f"the printed form is off by up to {off:.3g}; the largest true coefficient is "
        f"{row['largest coefficient']:.3g}",
        verdict(off <= _EXACT),
        "the printed residual, taken literally, against autograd of the loss that the paper states",
        _CORRECTED[name],
        off,
    )


def _strength_at_start() -> Iterator[Claim]:
    pushes = {name: at_margin(name, (0.0, 0.0), (-2.0, -2.0))[1] for name in OBJECTIVES}
    off = max(abs(c - strength_at_start(name, SETTINGS[name])) for name, c in pushes.items())
    yield Claim(
        "strength at the start",
        "How hard y− is pushed where r± = 0.",
        "App. B, corrected",
        "β/2 for DPO, 1/β for IPO, η for SPPO, …",
        ", ".join(f"{LOSSES[name].title} {c:.3g}" for name, c in pushes.items()),
        verdict(off <= _EXACT),
        f"largest difference from the table {off:.1e}",
        value=off,
    )
    yield Claim(
        "SPPO pushes nothing down",
        "SPPO has “no negative sign”, and therefore does not squeeze.",
        "App. B",
        "two positive vectors",
        f"c− = η = {pushes['sppo_hard']:g} at the start; it changes sign at r− = −η/2",
        verdict(pushes["sppo_hard"] <= 0),
        "the push on y− is bounded, not absent",
        "a push until r− = −η/2, then a pull",
        pushes["sppo_hard"],
    )


def _regularising(pushes: Sequence[float]) -> Claim:
    falling = Share(sum(a > b for a, b in itertools.pairwise(pushes)), len(pushes) - 1)
    return Claim(
        "regularising",
        "The larger the margin, the smaller DPO's residual.",
        "App. B",
        "larger Gap → smaller ‖G‖",
        f"c− falls over {falling} steps of h from −6 to 6",
        verdict(falling.count == falling.total),
        "c− never changes sign",
        "",
        falling.value,
        falling.interval,
    )


def _sign_flips(turning: Sequence[str]) -> Claim:
    return Claim(
        "sign flips",
        "Which objectives pull y− up once the margin is large.",
        "App. B, corrected",
        "IPO, SPPO (and cDPO, Cal-DPO)",
        _titles(turning),
        verdict(set(turning) == {"ipo", "sppo_hard", "cdpo", "cal-dpo"}),
        "|h| ≤ 6",
        value=len(turning),
    )


def _valley(measured: Measured) -> Claim:
    dpo, squeezing = measured.flow("valley", "dpo"), measured.squeezing
    return Claim(
        "a valley squeezes",
        "Pushing down an unlikely y− lowers the other labels and raises y*.",
        "§3.3, Fig. 2",
        "off-policy DPO squeezes",
        f"DPO: others {dpo[_OTHERS]:+.3g} nats on average, y* {dpo['change of y*']:+.3g}; so do "
        f"{_titles(n for n in squeezing if n != 'dpo')}",
        verdict("dpo" in squeezing),
        f"y− in a softmax of its own, {measured.steps} steps; SFT does not push y−, and SLiC's "
        "margin is already reached there",
        value=dpo[_OTHERS],
    )


def _off_policy(measured: Measured) -> Claim:
    valley, second, likeliest = (measured.flow(where, "dpo") for where in SITUATIONS[:3])
    deeper = [
        name
        for name in measured.pushing
        if measured.flow("valley", name)[_OTHERS] < measured.flow("likeliest", name)[_OTHERS]
    ]
    return Claim(
        "off-policy is worse",
        "The push squeezes where y− is unlikely, not where y− is the model's own answer.",
        "§3.3, Fig. 2",
        "on-policy DPO does not squeeze",
        f"DPO, other labels: {valley[_OTHERS]:+.3g} nats where y− is unlikely, "
        f"{second[_OTHERS]:+.3g} where it is the second choice, {likeliest[_OTHERS]:+.3g} where it "
        "is the likeliest label; lower where y− is unlikely than where it is the likeliest for "
        f"{len(deeper)} of {len(measured.pushing)} objectives",
        verdict("dpo" in deeper and likeliest[_OTHERS] >= 0),
        f"of the other labels {valley['others that fall']:.0%}, {second['others that fall']:.0%} "
        f"and {likeliest['others that fall']:.0%} fall; repeated pushes make every y− unlikely",
        value=valley[_OTHERS] - likeliest[_OTHERS],
    )


def _same_context(dpo: Row) -> Claim:
    return Claim(
        "same context",
        "Where y+ and y− are labels of one softmax, DPO's two pushes cancel for all other labels.",
        "derived",
        "not discussed; panel D of App. E shows it",
        f"DPO lowers the other labels by {dpo[_OTHERS]:+.3g} nats there and moves y* by "
        f"{dpo['change of y*']:+.3g}, because y+ takes the mass",
        verdict(dpo["change of y*"] < 0),
        "c+ = c−, so Δz = 0 for every other label: they fall together, y* with them, because of "
        "the normaliser alone; the squeeze needs contexts of their own, which all tokens after the "
        "first difference have",
        value=dpo["change of y*"],
    )


def expected() -> list[str]:
    """What the paper predicts."""
    return [
        "Every objective pulls y+ up and, except SFT, pushes y− down. They differ in how hard they "
        "push and in when they stop. Pushing an unlikely y− squeezes.",
        "The paper prints residuals for IPO, SLiC and SPPO, and says that SPPO has no negative "
        "gradient.",
    ]


def seen(measured: Measured) -> list[str]:
    """What was measured."""
    stopped = []
    for name in measured.pushing:
        row = measured.flow("valley", name)
        if abs(row["c- at the end"]) < 0.05 * row["c- at the start"]:
            stopped.append(name)
    return [
        f"Autograd and the closed forms agree to {measured.error:.0e}. The printed forms of IPO, "
        "SLiC and SPPO differ from autograd.",
        "SPPO pushes y− down, with c− = η at the start, until r− = −η/2. The push turns into a "
        f"pull under {_titles(measured.turning)}.",
        f"The push on an unlikely y− squeezes under {_titles(measured.squeezing)}. Within "
        f"{measured.steps} steps it has nearly stopped under {_titles(stopped) or 'none'}.",
    ]
