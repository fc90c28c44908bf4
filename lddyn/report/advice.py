"""What a diagnosis asks its reader to look at, and the thresholds behind it."""

from __future__ import annotations

from typing import TypedDict

from lddyn.files import JsonObject
from lddyn.report.explain import Summary
from lddyn.report.words import count, named, percent, true_minus

__all__ = ["Warning", "warnings"]


class Warning(TypedDict):
    """One thing to look at.

    Attributes:
        state: "act", "note" or "fine".
        what: The finding.
        sure: How sure it is.
        do: What to do about it; empty where there is nothing to do.
    """

    state: str
    what: str
    sure: str
    do: str


def warnings(summary: Summary) -> list[Warning]:
    """What needs an act, what a note, and what is fine, in this order.

    Args:
        summary: `Diagnosis.summary()`.
    """
    sure = f"{'exact' if summary['exact'] else 'estimate'}, first order"
    rows = [
        _falling(summary, sure),
        _harmful(summary, sure),
        _entangled(summary),
        *_alike(summary),
        *_deep(summary),
        *_squeezed(summary),
        *_idle(summary),
        *_uncertain(summary),
        *_ranked(summary),
    ]
    order = {"act": 0, "note": 1, "fine": 2}
    return sorted(rows, key=lambda row: order[row["state"]])


def _row(state: str, what: str, sure: str, do: str = "") -> Warning:
    return Warning(state=state, what=what, sure=sure, do=do)


def _part_falling(summary: Summary) -> float:
    return float(summary["step"]["chosen_falls"] / summary["pairs"])


def _falling(summary: Summary, sure: str) -> Warning:
    """More than 5 % of the chosen responses fall: a note; more than half: an act."""
    falls = _part_falling(summary)
    what = f"log π(y+) falls in {percent(falls)} of the pairs"
    if falls <= 0.05:
        return _row("fine", what, sure)
    do = f"Leave out or reweight the pairs below, or change the loss.{_other_loss(summary, falls)}"
    return _row("act" if falls > 0.5 else "note", what, sure, do)


def _other_loss(summary: Summary, falls: float) -> str:
    """A loss that also widens the margins and lowers fewer chosen responses."""
    without = ("sft", "unlikelihood", "extend", summary["objective"])
    losses: list[JsonObject] = [
        o
        for o in summary["losses"]
        if o["chosen"] > o["rejected"] and o["objective"] not in without
    ]
    best = min(losses, key=lambda o: (o["chosen_falls"], -o["chosen"]), default=None)
    if best is None or best["chosen_falls"] >= falls:
        return ""
    return (
        f" A step of {best['objective']}, which widens the margins too, lowers "
        f"{percent(best['chosen_falls'])} of them."
    )


def _harmful(summary: Summary, sure: str) -> Warning:
    """A tenth of the pairs does over 40 % of a harm that is over 25 % of the help: an act."""
    harm = summary["harm"]
    if not harm["pairs"]:
        return _row("fine", "no pair harms the chosen responses of all pairs on average", "")
    worst = harm["worst"]
    what = (
        f"{worst} of {count(summary['pairs'])} do{'es' if worst == 1 else ''} "
        f"{percent(harm['part'])} of the harm to all chosen responses"
    )
    do = (
        f"Read them ({named(harm['worst_pairs'], summary['noun'])}). To leave them out: lddyn "
        f"filter FOLDER --drop {worst} --out OTHER"
    )
    state = "act" if harm["heavy"] and harm["part"] > 0.4 else "note"
    return _row(state, what, sure if summary["run"] is None else "predicted", do)


def _entangled(summary: Summary) -> Warning:
    """Any pair whose own step lowers its y+ is a note; over 20 % of them an act."""
    own = summary["own_step"]
    entangled = own["entangled"]
    what = (
        f"{count(entangled)} would lower {'its' if entangled <= 1 else 'their'} own y+ even alone"
    )
    if not entangled:
        return _row("fine", what, "exact, first order")
    do = f"Rewrite one response, or leave out {named(own['entangled_pairs'], summary['noun'])}."
    state = "act" if entangled > 0.2 * summary["pairs"] else "note"
    return _row(state, f"{what}: y+ and y− are too alike", "exact, first order", do)


def _alike(summary: Summary) -> list[Warning]:
    alike = summary["audit"]["alike"]
    if not alike:
        return []
    what = f"y+ and y− of {count(alike)} differ in fewer than one token of ten"
    pairs = named(summary["audit"]["alike_pairs"], summary["noun"])
    do = f"Check that the difference is meant: {pairs}."
    return [_row("note", what, "exact", do)]


def _deep(summary: Summary) -> list[Warning]:
    deep = summary["audit"]["deep"]
    if not deep:
        return []
    what = (
        f"in {deep} of {count(summary['pairs'])} y− is unlikely already: over 2 nats a token less "
        "likely than y+"
    )
    do = (
        "Lowered further, its probability goes to what is likely already. SFT on both responses "
        "first, a smaller β, or responses that the model itself writes."
    )
    return [_row("note", what, "exact now; the consequence is paper §3.3", do)]


def _squeezed(summary: Summary) -> list[Warning]:
    """Over 40 % of the lost probability for one token is a note; over 70 %, with falls, an act."""
    mass = summary["mass"]
    if mass is None or not mass["measured"]:
        return []
    star = mass["argmax"]
    state = "fine"
    if star >= 0.4:  # alone it harms no y+
        state = "act" if star >= 0.7 and _part_falling(summary) > 0.05 else "note"
    do = "Watch the confidence curve of the run; stop early, lower β or the learning rate."
    what = f"the likeliest other token gains {percent(star)} of what rejected tokens lose"
    sure = f"measured, {count(mass['responses'], 'response')}"
    return [_row(state, what, sure, "" if state == "fine" else do)]


def _idle(summary: Summary) -> list[Warning]:
    idle = summary["audit"]["idle"]
    if not idle:
        return []
    have = "has" if idle == 1 else "have"
    what = f"{count(idle)} {have} under 1/20 of the largest weight: learnt already"
    return [_row("fine", what, "exact")]


def _uncertain(summary: Summary) -> list[Warning]:
    unsure, pairs = summary["uncertain"], summary["pairs"]
    if unsure is None:
        return []
    noted = unsure > pairs / 10
    what = f"the sketch leaves open whether {unsure} of {pairs} chosen responses rise or fall"
    do = "Give more memory or a larger sketch." if noted else ""
    return [_row("note" if noted else "fine", what, "two standard errors", do)]


def _ranked(summary: Summary) -> list[Warning]:
    """How well the prediction ranks what training did."""
    ranking = (summary["measured"] or {}).get("ranking")
    if ranking is None:
        return []
    what = f"the prediction ranks the changes that training made with ρ = {ranking['rho']:.2f}"
    sure = f"95% interval: {ranking['low']:.2f} to {ranking['high']:.2f}"
    state, do = "act", "The run did not do what a small step predicts: diagnose a later checkpoint."
    if ranking["low"] > 0.5:
        state, do = "fine", "Trust the ranking."
    elif ranking["low"] > 0:
        state = "note"
        do = "Trust the direction of groups of pairs, not the order of single ones."
    return [_row(state, true_minus(what), true_minus(sure), do)]
