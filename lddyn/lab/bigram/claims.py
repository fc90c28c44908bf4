"""The claims about a negative step in three bigram models, and how each is decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from lddyn.lab.bigram.models import KINDS
from lddyn.lab.record import Claim, Row, Rows
from lddyn.lab.settings import Bigram as Settings
from lddyn.lab.shares import Share, verdict

_STRONG = 0.5  # a rank correlation above this is called strong
_POSTER = "poster §5, 2-gram example"
_PICTURE = "a picture; its content is not preserved"


def make_claims(measured: Row, settings: Settings) -> Iterator[Claim]:
    """All claims of the experiment, from what `measure_pushes` returned."""
    pushes = {kind: [r for r in measured["pairs"] if r["model"] == kind] for kind in KINDS}
    kernels = {row["model"]: row for row in measured["kernels"]}
    yield _table(kernels["table"], pushes["table"])
    yield _leak(kernels["network"], pushes)
    yield _leaked_squeeze(pushes["network"])
    yield _kernel(pushes["network"])
    for kind in KINDS:
        yield _argmax(kind, pushes[kind])
    for kind in KINDS:
        yield _longer(kind, measured, settings.steps)
    for kind in KINDS:
        yield _again(kind, measured, settings.pushes)


def _table(kernel: Row, pushes: Rows) -> Claim:
    moved = max(row["moved elsewhere"] for row in pushes)
    return Claim(
        "table",
        "Where every context has logits of its own, a push changes its own context only.",
        _POSTER,
        _PICTURE,
        f"{kernel['nonzero']} of {kernel['entries between contexts']:,} entries of K between "
        f"contexts are not zero; largest probability moved in other contexts: {moved:g}",
        verdict(kernel["nonzero"] == 0 and moved == 0.0),
        "explicit Jacobians, real steps",
        value=float(kernel["nonzero"]),
    )


def _leak(kernel: Row, pushes: Mapping[str, Rows]) -> Claim:
    network = pushes["network"]
    mean, interval = _mean([row["moved elsewhere"] / row["moved here"] for row in network])
    return Claim(
        "leak",
        "Where contexts share features, a push also changes other contexts.",
        _POSTER,
        _PICTURE,
        f"per unit of probability moved in the pushed context {leak_ratio(network):.3g} moved in "
        f"the others (factorised: {leak_ratio(pushes['factorised']):.3g}); mean over pushes "
        f"{mean:.3g}; {kernel['nonzero'] / kernel['entries between contexts']:.1%} of the entries "
        "of K between contexts are not zero",
        verdict(interval[0] > 1),
        f"network, {len(network)} pushes, total variation summed over all other contexts; refuted "
        "if the interval over pushes is not above 1, that is if all others together move no more "
        "than the pushed context",
        value=mean,
        interval=interval,
    )


def leak_ratio(pushes: Rows) -> float:
    """Probability moved in other contexts over probability moved in the pushed one."""
    elsewhere = sum(row["moved elsewhere"] for row in pushes)
    return float(elsewhere / sum(row["moved here"] for row in pushes))


def _leaked_squeeze(pushes: Rows) -> Claim:
    share, interval = _mean([row["label falls elsewhere"] for row in pushes])
    rises, _ = _mean([row["argmax rises elsewhere"] for row in pushes])
    return Claim(
        "leak, squeeze",
        "Other contexts change as the pushed one does: the pushed word falls there too.",
        _POSTER,
        _PICTURE,
        f"the word falls in {100 * share:.3g} % of the other contexts, and the pushed context's y* "
        f"rises in {100 * rises:.3g} %",
        verdict(interval[0] > 0.95),
        "network; agrees if the interval over pushes lies above 95 %; contexts whose features "
        "point the other way change the other way",
        value=share,
        interval=interval,
    )


def _kernel(pushes: Rows) -> Claim:
    correlation, interval = _mean([row["kernel rank correlation"] for row in pushes])
    return Claim(
        "kernel",
        "Contexts with a larger ‖K‖ change more.",
        "§2, Proposition 1",
        "the change is proportional to K",
        f"rank correlation, over contexts, of ‖K‖ and the probability moved: {correlation:.3f}",
        verdict(interval[0] > _STRONG),
        f"network, mean over pushes; refuted if the interval is not above {_STRONG:g}",
        "",
        correlation,
        interval,
    )


def _argmax(kind: str, pushes: Rows) -> Claim:
    most = Share(sum(row["argmax gains most"] for row in pushes), len(pushes))
    table = kind == "table"
    return Claim(
        f"argmax, {kind}",
        "The likeliest other word gains most.",
        "§3.3",
        "guaranteed to rise",
        f"{most}; it rises in {sum(row['argmax rises'] for row in pushes)}",
        verdict(most.count == most.total) if table else most.rule,
        "a theorem here, as each context is one softmax: one exception refutes it"
        if table
        else "not a theorem here, as words share features too: agrees if the interval lies above "
        "95 %",
        "",
        most.value,
        most.interval,
    )


def _longer(kind: str, measured: Row, steps: int) -> Claim:
    fall, falls = trend(measured, kind, "others fall")
    lose, loses = trend(measured, kind, "others lose")
    first, last = (
        row for row in measured["longer"] if row["model"] == kind and row["steps"] in (0, steps)
    )
    noise = first["others lose ±"] + last["others lose ±"]
    return Claim(
        f"longer, {kind}",
        "The longer the training, the stronger the squeeze.",
        _POSTER,
        "an arrow",
        f"for the same push: share of other words that fall {falls}, probability that they lose "
        f"{loses}",
        verdict(fall > 0 and lose > noise),
        f"after 0 and after {steps} training steps; both must grow, the second by more than its "
        "intervals",
        value=lose,
        interval=(lose - noise, lose + noise),
    )


def _again(kind: str, measured: Row, repeats: int) -> Claim:
    gain, gains = trend(measured, kind, "argmax", "repeated")
    _, entropies = trend(measured, kind, "entropy", "repeated")
    return Claim(
        f"again, {kind}",
        "Repeating the push makes the squeeze stronger.",
        _POSTER,
        "an arrow, N times",
        f"π(y*) {gains}, entropy {entropies} nats, in {repeats} pushes",
        verdict(gain > 0),
        "mean over pushed words, real steps",
        value=gain,
    )


def trend(measured: Row, kind: str, key: str, table: str = "longer") -> tuple[float, str]:
    """Last minus first value of a curve, and both as text."""
    rows = [row for row in measured[table] if row["model"] == kind]
    return rows[-1][key] - rows[0][key], f"{rows[0][key]:.3g} → {rows[-1][key]:.3g}"


def _mean(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of independent values, and its 95 % confidence interval (normal approximation)."""
    given = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(given.std()) / len(given) ** 0.5
    return float(given.mean()), (float(given.mean()) - half, float(given.mean()) + half)


def expected() -> list[str]:
    """What the paper predicts."""
    return [
        "In a table of logits K between contexts is zero: a negative step changes its own context "
        "and no other. Shared features carry it to other contexts.",
        "The longer the model was trained, and the more often the step is repeated, the stronger "
        "the squeeze.",
    ]


def seen(measured: Row, made: Sequence[Claim]) -> list[str]:
    """What was measured."""
    kernels = {row["model"]: row for row in measured["kernels"]}
    network = kernels["network"]
    pushes = [row for row in measured["pairs"] if row["model"] == "network"]
    by_name = {claim.name: claim for claim in made}
    stronger = [
        name.removeprefix("longer, ")
        for name, claim in by_name.items()
        if name.startswith("longer") and claim.verdict == "agrees"
    ]
    return [
        f"Between contexts, {kernels['table']['nonzero']} entries of the table's K are not zero; "
        f"of the network's {network['nonzero'] / network['entries between contexts']:.0%}.",
        f"Per unit of probability that moves in the pushed context, {leak_ratio(pushes):.2g} moves "
        "in the network's other contexts; the probability moved there before training → after: "
        f"{trend(measured, 'network', 'moved elsewhere')[1]}.",
        "After longer training the same push takes more from other words in these models: "
        f"{', '.join(stronger)}. In the network the likeliest other word gained most in "
        f"{by_name['argmax, network'].ours.split(';')[0]}.",
    ]
