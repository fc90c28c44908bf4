"""The claims about the squeeze, and how each is decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lddyn.lab.record import Claim, Row, Rows
from lddyn.lab.shares import Share, claim_of_share, verdict

# How a share of cases decides. A comparison, or a "largely", must hold more often than not. What is
# said without an "often" of all predictions of a kind must hold as a rule.
_MOST = "agrees if the 95 % interval lies above one half"
_RULE = "agrees if the 95 % interval lies above 95 %"
_RANDOM = "random predictions, V labels, 0.01 ≤ |η′| ≤ 10"
_SAME = "same prediction and step; of two labels the rarer one against the commoner one"


@dataclass(frozen=True)
class Measured:
    """What `measure` returned.

    Attributes:
        regimes: One real step in each of six situations.
        counted: Tallies on random cases: "shares", "kinds", "gainers".
        accuracy: How often τ is right, by the length of the step.
        entropy: Entropy changes by the pushed label.
        reference: The published 5-label example.
        limits: Rates with other contexts, several positions, a hidden layer.
    """

    regimes: list[Row]
    counted: dict[str, list[Row]]
    accuracy: list[Row]
    entropy: list[Row]
    reference: list[Row]
    limits: dict[str, list[Row]]

    @property
    def shares(self) -> dict[str, Share]:
        """How often each statement held in the random cases."""
        return {row["what"]: Share(row["count"], row["total"]) for row in self.counted["shares"]}

    @property
    def lemma_error(self) -> float:
        """Largest difference between a real step and the lemma, nats."""
        return max(float(row["lemma_error"]) for row in self.regimes)


def make_claims(measured: Measured) -> Iterator[Claim]:
    """All claims of the experiment."""
    shares = measured.shares
    yield _lemma(measured.lemma_error)
    yield from _guarantees(shares)
    yield from _by_flatness(shares, measured.counted["kinds"])
    yield from _rarer_label(shares)
    yield _longer_step(shares)
    yield _threshold(measured.accuracy)
    yield _entropy_values(measured.reference)
    yield from _entropy_signs(shares)
    yield from _panels(measured.regimes)
    yield _beyond(measured.limits)


def _lemma(error: float) -> Claim:
    return Claim(
        "Lemma 1",
        "One step on W changes the prediction as the lemma's closed form says.",
        "App. E",
        "an identity",
        f"largest |Δ log π − lemma| {error:.1e} nats in 6 real steps",
        verdict(error < 1e-9),
        "float64; the lemma against autograd and a real step",
        "exp(|η′|(p_i − [i=y])) / Σ_j p_j exp(|η′|(p_j − [j=y]))",
        error,
    )


def _guarantees(shares: Mapping[str, Share]) -> Iterator[Claim]:
    for name, text, statement in (
        ("claim 1", "The pushed label falls.", "label falls"),
        ("claim 2", "The likeliest other label y* rises.", "argmax rises"),
    ):
        yield claim_of_share(
            name, text, "App. E", "guaranteed", shares[statement], _RANDOM, kind="guarantee"
        )
    yield claim_of_share(
        "claim 2, largely",
        "Most of the mass goes to y*.",
        "§3.3",
        "largely",
        shares["argmax gets over half"],
        "y* gets over half of all that is gained; of peaky predictions (largest probability ≥ "
        f"0.8): {shares['argmax gets over half, peaky']}; {_MOST}",
    )
    yield claim_of_share(
        "trend 3",
        "The rich get richer and the poor poorer.",
        "§3.3",
        "a trend",
        shares["richer rise more"],
        "in relative terms this is exact: Δ log π_i = |η′| π_i − const for i ≠ y",
        kind="guarantee",
        corrected="a theorem for Δ log π, not only a trend",
    )


def _by_flatness(shares: Mapping[str, Share], kinds: Rows) -> Iterator[Claim]:
    gainers = {row["prediction"]: f"{100 * row['gainers']:.3g} %" for row in kinds}
    for name, text, statement, reason in (
        (
            "trend 3A",
            "Where the prediction is flat, all other labels rise.",
            "flat: all others rise",
            f"flat: largest probability ≤ 2/V; {_RULE}; on average {gainers['flat']} of the other "
            "labels rise, and labels rarer than most fall",
        ),
        (
            "trend 3B",
            "In between, some labels rise and some fall.",
            "between: some rise, some fall",
            f"{_RULE}; all others rise in {shares['between: all others rise']}, all but y* fall "
            f"in {shares['between: all but the argmax fall']}",
        ),
        (
            "trend 3C",
            "Where the prediction is peaky, all labels but y* fall.",
            "peaky: all but the argmax fall",
            f"peaky: largest probability ≥ 0.8; {_RULE}",
        ),
    ):
        yield claim_of_share(
            name, text, "App. E", "a trend", shares[statement], reason, kind="rule"
        )


def _rarer_label(shares: Mapping[str, Share]) -> Iterator[Claim]:
    others = shares["a deeper valley: the others lose more"]
    star = shares["a deeper valley: the argmax gains more"]
    yield claim_of_share(
        "trend 4, others",
        "Pushing a rarer label makes the other labels fall more.",
        "§3.3, App. E",
        "a trend",
        shares["a rarer label: the others lose more"],
        f"{_SAME}; for the same label made 3 nats less likely: {others}; {_MOST}",
    )
    yield claim_of_share(
        "trend 4, ratio",
        "Pushing a rarer label moves more into y* per mass that the label loses.",
        "§3.3, App. E",
        "a trend",
        shares["a rarer label: the squeeze ratio is larger"],
        f"{_SAME}; {_MOST}",
    )
    yield claim_of_share(
        "trend 4, y*",
        "Pushing a rarer label makes y* rise more.",
        "§3.3, point 5",
        "y* rises more",
        shares["a rarer label: the argmax gains more"],
        f"{_SAME}; for the same label made 3 nats less likely: {star}; to first order "
        "Δ log π(y*) = |η′| (π(y*) − ‖π‖² + π(y)), which grows with π(y): a rarer label takes more "
        "from the others, but has less of its own to give",
        corrected="y* rises less: Δ log π(y*) grows with π(y)",
    )


def _longer_step(shares: Mapping[str, Share]) -> Claim:
    effects = {
        what: shares[f"a step twice as long: {what}"]
        for what in ("the argmax gains more", "the label loses more", "no fewer others fall")
    }
    return claim_of_share(
        "trend 5",
        "A longer step makes every effect larger.",
        "App. E",
        "a trend",
        min(effects.values(), key=lambda share: share.value),
        "the rarest of these: "
        + "; ".join(f"{what} in {share}" for what, share in effects.items())
        + f"; {_MOST}",
    )


def _threshold(accuracy: Rows) -> Claim:
    short, long = accuracy[0], accuracy[-1]
    # Labels of one prediction are not independent of each other: no interval.
    return Claim(
        "τ",
        "A label rises if and only if π_i > τ = ‖π‖² − π_y (first order).",
        "derived",
        "",
        f"right for {Share(short['count'], short['total'])} labels at |η′| = {short['eta']:g}; "
        f"at {long['eta']:g} for {100 * long['share']:.4g} %",
        verdict(short["share"] > 0.999),
        "agrees if τ is right for 99.9 % of the labels at the shortest step",
        value=short["share"],
    )


def _entropy_values(reference: Rows) -> Claim:
    worst = max(row["largest_difference"] for row in reference)
    off = max(abs(row["entropy_change"] - row["published_entropy_change"]) for row in reference)
    return Claim(
        "entropy, values",
        "The predictions and entropy changes of the 5-label example.",
        "App. E",
        "four steps, 4 digits",
        f"largest difference {worst:.1e} in π, {off:.1e} nats in ΔH",
        verdict(worst <= 6e-5 and off <= 6e-5),
        "agrees if all printed digits are equal",
        value=max(worst, off),
    )


def _entropy_signs(shares: Mapping[str, Share]) -> Iterator[Claim]:
    peak = "entropy rises when the likeliest label is pushed down"
    yield claim_of_share(
        "entropy, valley",
        "Pushing down an unlikely label lowers the entropy.",
        "App. E",
        "",
        shares["entropy falls when a label below 1/V is pushed down"],
        _RULE,
        kind="rule",
    )
    yield claim_of_share(
        "entropy, peak",
        "Pushing down the likeliest label raises the entropy.",
        "App. E",
        "",
        shares[peak],
        f"{_RULE}; a long step makes the likeliest label the rarest one; at |η′| ≤ 0.1: "
        f"{shares[f'{peak}, |η′| ≤ 0.1']}",
        kind="rule",
    )


def _panels(regimes: Rows) -> Iterator[Claim]:
    valley, published, wide = regimes[3], regimes[4], regimes[5]
    others = valley["gainers"] + valley["losers"]
    yield Claim(
        "panel D",
        "A negative step on an unlikely label makes all labels but y* fall.",
        "App. E figure",
        "the committed panel shows no global fall: its step also pulls another label up",
        f"the negative step alone: {valley['losers']} of {others} others fall, y* "
        f"{valley['argmax_change']:+.3f}; the committed step: y* "
        f"{published['argmax_change']:+.3f}",
        verdict(valley["gainers"] == 1),
        "the claim holds for the negative step alone, which the published panel does not show",
        "the negative step alone",
        valley["losers"] / others,
    )
    others = wide["gainers"] + wide["losers"]
    yield Claim(
        "panel E",
        "With many labels one label gains the mass and all others fall.",
        "App. E figure",
        "one label from about .12 to .86, almost all others fall",
        f"y* {wide['argmax_change']:+.3f}; {wide['losers']} of {others} others fall",
        verdict(wide["gainers"] == 1 and wide["argmax_change"] > 0),
        f"V = {len(wide['before'])}, one real step, |η′| = {wide['eta']:.3g}",
        value=wide["losers"] / others,
    )


def _beyond(limits: Mapping[str, Rows]) -> Claim:
    crowd, rises, falls = _crowded(limits)
    layer = next(row for row in limits["hidden"] if row["body"] == 1.0)
    return Claim(
        "beyond one softmax",
        "With several positions and shared features the picture is more complicated.",
        "§3.3",
        "“can become more complicated”",
        f"{crowd['positions']} positions with overlap {crowd['overlap']:g}: y* rises at {rises}, "
        f"y falls at {falls}",
        verdict(rises.count < rises.total),
        "both are guaranteed for one softmax, so one counterexample decides; this is the lowest of "
        f"{len(limits['positions'])} settings; with a hidden layer at the head's learning rate y* "
        f"rises in {100 * layer['argmax rises']['share']:.4g} % and τ is right for "
        f"{100 * layer['threshold is right']['share']:.4g} % of the labels",
        value=rises.value,
    )


def _crowded(limits: Mapping[str, Rows]) -> tuple[Row, Share, Share]:
    """The setting of positions in which y* rises least often; how often y* rises and y falls."""
    crowd = min(limits["positions"], key=lambda row: float(row["argmax rises"]["share"]))
    rises, falls = (
        Share(crowd[k]["count"], crowd[k]["total"]) for k in ("argmax rises", "label falls")
    )
    return crowd, rises, falls


def expected() -> list[str]:
    """What the paper predicts."""
    return [
        "A negative gradient on one label of a softmax lowers that label and raises the likeliest "
        "other label y*. A flat prediction spreads the mass; a peaky one sends it to y*.",
        "The rarer the pushed label, the stronger these effects.",
    ]


def seen(measured: Measured) -> list[str]:
    """What was measured."""
    shares, (flat, _, peak, *_) = measured.shares, measured.regimes
    near = next(row for row in measured.limits["contexts"] if row["cosine"] == 0.75)
    crowd, rises, falls = _crowded(measured.limits)
    return [
        f"Both guarantees held in all of {shares['argmax rises'].total:,} random cases, and real "
        f"steps equal the lemma to {measured.lemma_error:.0e} nats.",
        f"Flat prediction: {flat['gainers']} of {flat['gainers'] + flat['losers']} other labels "
        f"rose. Peaky prediction: {peak['losers']} of {peak['gainers'] + peak['losers']} fell and "
        f"y* rose by {peak['argmax_change']:+.3f}.",
        "Pushing a rarer label takes more from the other labels, but y* then rises less, not more: "
        f"y* rose more in only {shares['a rarer label: the argmax gains more']}.",
        "At another context, whose features have a cosine of 0.75 with the pushed one's, that "
        f"context's own y* rose in {100 * near['its own argmax rises']['share']:.3g} % of the "
        "cases, the pushed context's y* in "
        f"{100 * near['argmax of the pushed context rises']['share']:.3g} %: the mass goes to the "
        "likeliest label of the pushed context.",
        f"With {crowd['positions']} overlapping positions y* rises at only {rises}, and y itself "
        f"falls at {falls}.",
    ]
