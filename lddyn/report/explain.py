"""A diagnosis in sentences: the same on the console and on the page.

All numbers but measured ones are first order, in nats of the unit step: the step that moves the
margins log π(y+) − log π(y−) by one nat on average. In it objectives and learning rates compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lddyn.report.data import Rows
from lddyn.report.dynamics import Labels, explain_dynamics
from lddyn.report.step import explain_distance
from lddyn.report.words import count, moves, named, percent, size, true_minus
from lddyn.text import signed

__all__ = ["SOURCES", "Sentence", "Summary", "explain_diagnosis", "explain_run", "lines"]

Summary = Mapping[str, Any]  # what `lddyn.sets.summary.summarise` returns


class Sentence(TypedDict):
    """One finding.

    Attributes:
        about: What it is about, two or three words.
        text: The finding.
        sure: How sure it is, and why.
        kind: "exact", "estimate" or "measured".
    """

    about: str
    text: str
    sure: str
    kind: str


# Source of change -> what it is.
SOURCES = {
    "own chosen": "raising their own chosen response",
    "other chosen": "raising the chosen responses of other pairs",
    "own rejected": "lowering their own rejected response",
    "other rejected": "lowering the rejected responses of other pairs",
}

_SHORT = {"exact": "exact, first order", "estimate": "estimated from sketched gradients"}
_VERBS = {"rejected": "lowering", "chosen": "raising"}
_ONE_SIDED = ("sft", "unlikelihood", "extend")  # losses that do not compare two responses


def explain_diagnosis(
    summary: Summary, dynamics: Rows = (), labels: Labels | None = None
) -> list[Sentence]:
    """Why the chosen log-probs fall, or do not: mechanism, pairs, tokens, probability, losses.

    Args:
        summary: `Diagnosis.summary()`.
        dynamics: Rows of a watched run.
        labels: Response type of the watched run -> its name in words.
    """
    kind = "exact" if summary["exact"] else "estimate"
    watched = [
        Sentence(about="the watched run", text=text, sure="measured on its probes", kind="measured")
        for text in explain_dynamics(dynamics, labels)[:1]
    ]
    if not summary["unit_lr"]:
        text = "No step of this objective moves any pair: all weights or gradients are zero."
        answer_alone = Sentence(about="the answer", text=text, sure=_sure(summary), kind=kind)
        return [answer_alone, *watched, *_settings(summary)]

    def first_order(about: str, text: str) -> list[Sentence]:
        return [Sentence(about=about, text=text, sure=_SHORT[kind], kind=kind)] if text else []

    answer = _answer(summary) + _contradiction(summary, dynamics)
    return [
        Sentence(about="the answer", text=answer, sure=_sure(summary), kind=kind),
        *watched,
        *_settings(summary),
        *first_order("the step", _step(summary)),
        *first_order("the mechanism", _mechanism(summary)),
        *first_order("own steps", _own_steps(summary)),
        *_run(summary),
        *_harm(summary, kind),
        *_tokens(summary),
        *_mass(summary["mass"]),
        *first_order("other losses", _losses(summary)),
        *_unavailable(summary),
    ]


def lines(sentences: Sequence[Sentence]) -> list[str]:
    """Sentences as the console prints them: "The answer: … [exact, first order]"."""
    return [
        f"{s['about'][0].upper()}{s['about'][1:]}: {s['text']} [{s['sure']}]" for s in sentences
    ]


def _settings(summary: Summary) -> list[Sentence]:
    """The reference, how far the policy is from it, and what of the settings is left out."""
    sentences = []
    reference = summary["reference"]
    if reference is not None:
        text = (
            f"The reference is {reference['name']}; the mean margin against it before the step is "
            f"{signed(reference['margin'], 4)} nats"
        )
        if abs(reference["margin"]) > 1e-3 or reference["distance"] > 1e-2:
            text += (
                ", where a run that begins at its reference has 0 (policy and reference differ by "
                f"up to {signed(reference['distance'], 3).lstrip('+')} nats on one response)"
            )
        text = " ".join([text + ".", *explain_distance(reference["distance"])])
        sentences.append(
            Sentence(about="the reference", text=text, sure="forward passes", kind="exact")
        )
    return sentences + [
        Sentence(about="note", text=remark, sure="settings and data", kind="exact")
        for remark in summary["remarks"]
    ]


# ---------------------------------------------------------------------------------------------
# The answer


def _sure(summary: Summary) -> str:
    """How sure a sentence about all pairs is."""
    if summary["exact"]:
        text = "exact to first order: all inner products computed"
    else:
        text = (
            f"estimated from sketched gradients: for {summary['uncertain']} of "
            f"{count(summary['pairs'])} the error is too large to tell whether log π(y+) rises or "
            "falls (two standard errors); give more memory or a larger sketch"
        )
    checked = summary["validation"]
    if checked is not None:
        text += (
            f"; {checked['steps']} real steps differ from it by {percent(checked['own'])} for the "
            f"pairs of their batch and {percent(checked['others'])} for others"
        )
    ranking = (summary["measured"] or {}).get("ranking")
    if ranking is not None:
        text += true_minus(
            f"; its rank correlation with the changes of y+ in training is "
            f"ρ = {ranking['rho']:.2f} ({ranking['low']:.2f} to {ranking['high']:.2f})"
        )
    return text


def _answer(summary: Summary) -> str:
    """The first sentence: do they fall, and why."""
    step, pairs = summary["step"], summary["pairs"]
    falls = step["chosen_falls"]
    if not falls:
        return (
            "At this point the chosen log-probs do not fall: a small step lowers log π(y+) of no "
            "pair."
        )
    some = f"{falls} of {count(pairs)}"
    if step["chosen"] < 0:
        lead = f"The chosen log-probs fall on average, and in {some}."
        parts, among = step["sources"], "On average over all pairs"
    else:
        lead = f"On average the chosen log-probs do not fall, but they do in {some}."
        parts = step["sources_where_falling"]
        among = "In this pair" if falls == 1 else f"On average over these {falls} pairs"
    if parts["own chosen"] < 0:  # squares past their target
        return (
            f"{lead} {among}, {summary['objective']} itself lowers chosen responses: the margins "
            "are past its target, and w+ is positive."
        )
    return (
        f"{lead} {among}, log π(y+) changes per nat of margin gained by "
        f"{_push(parts, 'rejected', 'y− down')} and by {_push(parts, 'chosen', 'y+ up')}."
    )


def _push(parts: Mapping[str, float], side: str, what: str) -> str:
    """The change that one kind of response causes: "−0.42 nats from pushing y− down (…)"."""
    other = parts[f"other {side}"]
    total = parts[f"own {side}"] + other
    through = ""
    if total < 0 and other < 0:
        part = percent(min(other / total, 1.0))
        through = f" ({part} of it from other pairs' {what[:2]})"
    return f"{signed(total, 2)} nats from pushing {what}{through}"


def _contradiction(summary: Summary, dynamics: Rows) -> str:
    """What a run does to y+, where a small step does the opposite."""
    watched = dynamics[-1].get("change/chosen") if dynamics else None
    mean, source = 0.0, ""
    if summary["measured"] is not None:
        mean, source = summary["measured"]["chosen"], "But the training that followed"
    elif watched is not None:
        mean, source = float(watched), "But the watched run"
    elif summary["run"] is not None:
        mean, source = summary["run"]["chosen"], "But the planned run is predicted to"
    if mean * summary["step"]["chosen"] >= 0:
        return ""
    verb = "raise" if mean > 0 else "lower"
    if not source.endswith(" to"):
        verb += "ed" if mean < 0 else "d"
    return f" {source} {verb} the chosen log-probs by {size(mean)} on average."


# ---------------------------------------------------------------------------------------------
# The step


def _step(summary: Summary) -> str:
    step = summary["step"]
    return (
        f"While a small {summary['objective']} step moves the margins by 1 nat, log π(y+) "
        f"{moves(step['chosen'])} and log π(y−) {moves(step['rejected'])} on average. It lowers "
        f"log π(y+) of {count(step['chosen_falls'])}"
        + (f", and both responses of {count(step['both_fall'])}." if step["chosen_falls"] else ".")
    )


def _mechanism(summary: Summary) -> str:
    step = summary["step"]
    mean = {k: signed(v, 2) for k, v in step["sources"].items()}
    text = (
        f"Causes of the change of log π(y+) by this step, in nats: raising y+ of its own pair "
        f"{mean['own chosen']}, raising y+ of other pairs {mean['other chosen']}, lowering y− of "
        f"its own pair {mean['own rejected']}, lowering y− of other pairs {mean['other rejected']}."
    )
    falls, times = step["chosen_falls"], step["strongest_in"]
    if not falls:
        return text
    where = f" in {times} of {count(falls)}" if falls > 1 else ""
    if step["strongest"] == "own chosen":
        cause = "the loss itself, which lowers their own chosen response"
    else:
        cause = f"{SOURCES[step['strongest']]}, which changes parameters that both depend on"
    return f"{text} Where y+ falls, the main cause{where} is {cause}."


def _own_steps(summary: Summary) -> str:
    """What pairs do to themselves."""
    own = summary["own_step"]
    text = (
        f"By a step on the pair alone, {count(own['chosen_falls'])} would lower "
        f"{'its' if own['chosen_falls'] <= 1 else 'their'} own chosen response."
    )
    if own["entangled"]:
        text += (
            f" In {named(own['entangled_pairs'], summary['noun'])} y− is too like y+: what y− "
            "loses, w− ⟨g+, g−⟩, exceeds what y+ gains, −w+ ‖g+‖²."
        )
    if own["past_target"]:
        text += (
            f" {summary['objective']} itself lowers the chosen response of "
            f"{count(own['past_target'])}: past the target of the loss."
        )
    return text


# ---------------------------------------------------------------------------------------------
# The run, the pairs, the tokens


def explain_run(run: Mapping[str, Any]) -> str:
    """A prediction of a run in one sentence, from `Forecast.summary()`."""
    amount, unit = (run["max_steps"], "step") if run["max_steps"] else (run["epochs"], "epoch")
    rest = f"The rest, from step {run['start']} on, of " if run["start"] else ""
    plural = amount != 1 and not run["start"]
    return (
        f"{rest}{count(amount, unit)} of {run['optimizer']} at a learning rate of "
        f"{run['lr']:g}, batches of {run['batch']}, {'are' if plural else 'is'} "
        f"predicted to change log π(y+) by {signed(run['chosen'], 2)} nats and log π(y−) by "
        f"{signed(run['rejected'], 2)} nats on average; log π(y+) falls in {run['chosen_falls']} "
        f"of {count(run['pairs'])}."
    )


def _run(summary: Summary) -> list[Sentence]:
    if summary["run"] is None:
        return []
    text = explain_run(summary["run"]) + " Trust the order of pairs more than the level."
    points = count(summary["run"]["segments"], "point")
    sure = f"gradients taken at {points} of the run; less reliable for longer runs"
    return [Sentence(about="the planned run", text=text, sure=sure, kind="estimate")]


def _without(without: Mapping[str, Any], pairs: str) -> str:
    """What the run is predicted to do without the worst pairs, and with pair weights."""
    if not without["adds_up"]:
        return (
            " The effects of single pairs leave more than half of this prediction unexplained, so "
            f"no prediction is made for a run without {pairs}."
        )
    return (
        f" Without {pairs} the run is predicted to change log π(y+) by "
        f"{signed(without['dropped'], 2)} nats on average, with reweighted pairs by "
        f"{signed(without['reweighted'], 2)} nats."
    )


def _harm(summary: Summary, kind: str) -> list[Sentence]:
    """Which pairs lower the chosen responses of all."""
    harm, run = summary["harm"], summary["run"]
    sure = _SHORT[kind]
    if run is not None:
        sure, kind = "predicted for the run", "estimate"
    if not harm["pairs"]:
        text = "No pair lowers the chosen responses of all pairs on average."
        return [Sentence(about="the pairs", text=text, sure=sure, kind=kind)]
    worst = harm["worst"]
    text = (
        f"{count(harm['pairs'])} lower{'s' if harm['pairs'] == 1 else ''} the chosen responses of "
        f"all pairs on average; the worst {worst} do{'es' if worst == 1 else ''} "
        f"{percent(harm['part'])} of it ({named(harm['worst_pairs'], summary['noun'])})"
        + (" in the planned run." if run is not None else ".")
    )
    if harm["without"] is not None:
        text += _without(harm["without"], "this pair" if worst == 1 else "these pairs")
    return [Sentence(about="the pairs", text=text, sure=sure, kind=kind)]


def _tokens(summary: Summary) -> list[Sentence]:
    """Through which tokens the most harmful pairs act, and who lowers the deepest fall."""
    parts = []
    tokens, deepest, noun = summary["tokens"], summary["deepest"], summary["noun"]
    if tokens is not None:
        listed = " and ".join(
            f"{verb} "
            + ", ".join(
                f"‘{t['text']}’ ({percent(t['part'])})"
                for t in tokens["top"]
                if t["response"] == side
            )
            for side, verb in _VERBS.items()
            if any(t["response"] == side for t in tokens["top"])
        )
        when = " in the first step" if summary["run"] is not None else ""
        parts.append(
            f"In the most harmful pairs ({named(tokens['pairs'], noun)}) these tokens lower the "
            f"chosen responses of all pairs most{when}: {listed}."
        )
    if deepest is not None:
        blamed = ", ".join(
            f"{_VERBS[t['response']]} ‘{t['text']}’ of {noun} {t['pair']}"
            for t in deepest["tokens"]
        )
        parts.append(
            f"The chosen response of {noun} {deepest['pair']} falls most; of other pairs' tokens "
            f"these lower it most: {blamed}."
        )
    if not parts:
        return []
    sure = "exact, first order: the effects of a pair's tokens add up to the pair's effect"
    return [Sentence(about="the tokens", text=" ".join(parts), sure=sure, kind="exact")]


def _mass(mass: Mapping[str, Any] | None) -> list[Sentence]:
    """Where the probability goes that rejected tokens lose."""
    if mass is None:
        return []
    star = mass["argmax"]
    if not mass["measured"]:
        text = (
            f"In each softmax by itself, lowering a rejected token moves {percent(star)} of its "
            "probability to a single other token."
        )
        sure = "exact for one softmax alone, first order; shared parameters are left out"
        return [Sentence(about="the probability", text=text, sure=sure, kind="estimate")]
    if min(star, mass["top"], mass["rest"]) < 0:
        got = {k: true_minus(f"{100 * mass[k]:+.0f}") for k in ("argmax", "top", "rest")}
        text = (
            "For 100 units of probability that rejected tokens lose, the likeliest other token of "
            f"each position gains {got['argmax']}, the next nine {got['top']}, all the rest "
            f"{got['rest']}."
        )
    else:
        text = (
            f"Of the probability that rejected tokens lose, {percent(star)} goes to the likeliest "
            f"other token of each position, {percent(mass['top'])} to the next nine, "
            f"{percent(mass['rest'])} to all the rest."
        )
    if mass["receivers"]:
        text += f" Most often it is {', '.join(f'‘{t}’' for t in mass['receivers'])}."
    text += " That is the squeezing effect." if star >= 0.5 else ""
    sure = (
        f"measured: a real step of each pair's part on a copy, {mass['positions']} positions of "
        f"{count(mass['responses'], 'response')}"
    )
    return [Sentence(about="the probability", text=text, sure=sure, kind="measured")]


def _losses(summary: Summary) -> str:
    """The loss of both responses under which the chosen ones rise most."""
    rows = summary["losses"]
    best = max((r for r in rows if r["objective"] not in _ONE_SIDED), key=lambda r: r["chosen"])
    mine = next(r for r in rows if r["objective"] == summary["objective"])
    if best is mine:
        return (
            f"Of the losses that compare two responses, {mine['objective']} raises the chosen "
            "responses most, for a step of the same length."
        )
    return (
        f"Of the losses that compare two responses, for a step of the same length, "
        f"{best['objective']} raises the chosen responses most: log π(y+) changes by "
        f"{signed(best['chosen'])} nats per unit of ‖Δθ‖ on average and falls in "
        f"{percent(best['chosen_falls'])} of the pairs. With {mine['objective']} it changes by "
        f"{signed(mine['chosen'])} and falls in {percent(mine['chosen_falls'])}."
    )


def _unavailable(summary: Summary) -> list[Sentence]:
    if not summary["unavailable"]:
        return []
    text = f"Token gradients and LBK are unavailable for this model: {summary['unavailable']}."
    return [Sentence(about="what is missing", text=text, sure="see the message", kind="exact")]
