"""A diagnosis as a page: why the chosen log-probs fall, which pairs and tokens do it, what to do.

All numbers but the real steps are first order, and so is their unit: a step that moves the margins
log π(y+) − log π(y−) by one nat on average. In it objectives and learning rates compare.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.environment import env
from lddyn.files import plain, replace_file
from lddyn.probes.probe_set import LABELS
from lddyn.report.dynamics import curves, explain_dynamics
from lddyn.report.page import axis, installation, render, versions, word
from lddyn.report.step import token_tables
from lddyn.text import readable, signed, visible

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis
    from lddyn.steps.decomposition import Decomposition
    from lddyn.steps.massflow import MassFlow

__all__ = ["CloseUp", "look_closer", "tell_diagnosis", "warnings", "write_diagnosis"]

_MAPPED = 256  # pairs in the map
_LISTED = 500  # pairs in the table
_PROMPT, _RESPONSE = 600, 1200  # characters of a text in the table
_COPIED = 1 << 29  # parameters of a model that is copied in float64 for a real step
_TOKENS = 800  # coloured tokens of a pair

# Score -> heading of the table's column, and what it says.
_COLUMNS = {
    "gives": (
        "does to all y+",
        "what this pair's share of the step does to log π(y+), mean over all pairs",
    ),
    "set_chosen": ("Δ y+", "what the step on the whole set does to log π(y+) of this pair"),
    "set_rejected": ("Δ y−", "what the step on the whole set does to log π(y−) of this pair"),
    "own_chosen": ("own Δ y+", "what this pair's own share of the step does to its log π(y+)"),
    "cosine": ("cos(g+, g−)", "how alike the gradients of y+ and y− are: 1 is the same direction"),
    "valley": ("y− per token", "mean log π of a token of y−: the lower, the deeper in a valley"),
}


@dataclass(frozen=True)
class CloseUp:
    """One pair's share of a step, token by token.

    Attributes:
        pair: The pair that is learnt from.
        victim: The pair whose chosen response it lowers most; None if it lowers none.
        decomposition: What its tokens do to its own responses, and to the chosen response that
            it lowers most.
        flow: Where the probability goes that its rejected response loses.
    """

    pair: int
    victim: int | None
    decomposition: Decomposition
    flow: MassFlow


def unit(found: Diagnosis) -> float:
    """The learning rate that moves the margins by one nat on average, to first order; 0 if none."""
    margin = found.scores["set_chosen"] - found.scores["set_rejected"]
    mean = float(margin.abs().mean())
    return 1 / mean if 0 < mean < math.inf else 0.0


def _gives(found: Diagnosis) -> Tensor:
    """What each pair gives to the mean Δ log π(y+), nats: of the run if foretold, else the step."""
    if found.foretold is not None:
        return found.foretold.gives
    return found.scores["gives"] * unit(found)


def look_closer(
    found: Diagnosis, model: nn.Module, tokenizer: Any = None, pairs: Sequence[int] | None = None
) -> list[CloseUp]:
    """The most harmful pairs token by token, and where the probability goes.

    Args:
        found: The diagnosis.
        model: The model that it is of.
        tokenizer: Names tokens of the vocabulary that no response has. None: by number.
        pairs: Which pairs. None: `found.worst(3)`.

    Returns:
        A CloseUp for each; none where no step moves anything.

    Cost: a `decompose` of three responses and a `massflow` of one for each pair, the latter with a
    real step on a copy of the model, in float64 up to half a billion parameters.
    """
    from lddyn.objectives import preference
    from lddyn.steps.decompose import decompose
    from lddyn.steps.massflow import massflow

    lr, closeups = unit(found) / len(found), []
    effects = _effects(found)
    small = sum(p.numel() for p in model.parameters()) <= _COPIED
    dtype = torch.float64 if small else None
    for pair in (found.worst(3) if pairs is None else pairs) if lr else ():
        chosen, rejected = found.pairs[pair]
        update = preference(
            found.objective,
            chosen,
            rejected,
            reference=tuple(found.reference[:, pair].tolist()),
            **found.parameters,
        )
        observed = {"chosen": chosen, "rejected": rejected}
        others = effects[: len(found), pair].clone()
        others[pair] = math.inf
        victim = int(others.argmin()) if float(others.min()) < 0 else None
        if victim is not None:
            observed = {"victim": found.pairs[victim][0], **observed}
        flow = massflow(model, rejected, update, lr=lr, dtype=dtype)
        if tokenizer is not None:  # running text, not a byte-level tokenizer's own spelling
            flow.text_of = lambda token: str(tokenizer.decode([token]))
        closeups.append(CloseUp(pair, victim, decompose(model, observed, update, lr), flow))
    return closeups


def _effects(found: Diagnosis) -> Tensor:
    """D log π of sequence i by pair j's step, (2N, N), per unit of lr."""
    n = len(found)
    up, down = found.scores["weight_chosen"], found.scores["weight_rejected"]
    return found.gram[:, :n] * up + found.gram[:, n:] * down


# ---------------------------------------------------------------------------------------------
# Words

_SOURCES = {
    "own chosen": "their own chosen response, pulled up",
    "other chosen": "the chosen responses of other pairs, pulled up",
    "own rejected": "their own rejected response, pushed down",
    "other rejected": "the rejected responses of other pairs, pushed down",
}


def _sources(found: Diagnosis) -> dict[str, Tensor]:
    """What moves each sequence, (2N,) in nats of the unit step, by the response learnt from."""
    n, scale = len(found), unit(found) / len(found)
    place, parts = torch.arange(n), {}
    for name, block in (("chosen", found.gram[:, :n]), ("rejected", found.gram[:, n:])):
        effect = block * found.scores[f"weight_{name}"] * scale
        own = torch.cat([effect[place, place], effect[n + place, place]])
        parts[f"own {name}"], parts[f"other {name}"] = own, effect.sum(1) - own
    return {name: parts[name] for name in _SOURCES}


def _size(value: float) -> str:
    return f"{signed(abs(value), 2).lstrip('+')} nat{'' if f'{abs(value):.2g}' == '1' else 's'}"


def _moves(value: float) -> str:
    """A change in words: "rises by 0.42 nats"."""
    if abs(value) < 5e-7:
        return "stays"
    return f"{'rises' if value > 0 else 'falls'} by {_size(value)}"


def _count(number: int, of: str = "pair") -> str:
    return f"{number or 'no'} {of}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%".replace("-", "−")


def _named(pairs: Sequence[int], places: Sequence[int] | None, most: int = 5) -> str:
    """Pairs by their rows: "rows 3, 5 …"."""
    rows = [pair if places is None else places[pair] for pair in pairs]
    what = "row" if places is not None else "pair"
    shown = ", ".join(map(str, rows[:most])) + (" …" if len(rows) > most else "")
    return f"{what}{'' if len(rows) == 1 else 's'} {shown}"


def _certainty(found: Diagnosis) -> dict[str, str]:
    """How sure a sentence about all pairs is."""
    checked = ""
    if found.validated is not None:
        own, others = (_percent(found.validated[k]["error"]) for k in ("own", "others"))
        checked = (
            f"; {found.validated['steps']} real steps differ from it by {own} for their own pairs "
            f"and {others} for others"
        )
    error = found.set_stderr()
    if error is None:
        return {
            "kind": "exact",
            "sure": f"exact to first order: every gradient was compared with every other{checked}",
        }
    up = found.scores["set_chosen"].abs()
    unsure = int((up < 2 * error[0]).sum())
    return {
        "kind": "estimate",
        "sure": f"estimated from sketched gradients: {unsure} of {len(found)} could as well rise "
        f"as fall (within two standard errors of 0){checked}",
    }


def tell_diagnosis(
    found: Diagnosis,
    closeups: Sequence[CloseUp] = (),
    *,
    dynamics: Sequence[Mapping[str, Any]] = (),
    measured: Tensor | None = None,
    places: Sequence[int] | None = None,
) -> list[dict[str, str]]:
    """Why the chosen log-probs fall, or do not: the mechanism, the pairs, the tokens, the mass.

    Args:
        found: The diagnosis.
        closeups: What `look_closer` found.
        dynamics: Rows of a watched run.
        measured: Δ log π(y+) that training did, (N,) nats.
        places: The row of the data that each pair comes from.

    Returns:
        Sentences: "about" (a word), "text", "sure" (how sure, and why), "kind" (exact, estimate or
        measured).
    """
    n, scale, sure = len(found), unit(found), _certainty(found)
    run = [
        {"about": "the run", "text": text, "kind": "measured", "sure": "measured on its probes"}
        for text in explain_dynamics(dynamics, LABELS)[:1]
    ]
    if not scale:
        text = "No step of this objective moves any pair: all weights or gradients are zero."
        return [{"about": "the answer", "text": text, **sure}, *run]
    short = sure | {"sure": "exact, first order" if found.stderr is None else "estimated"}
    up, down = (found.scores[k] for k in ("set_chosen", "set_rejected"))
    parts = {k: v[:n] for k, v in _sources(found).items()}
    answer = {"about": "the answer", "text": _answer(found, parts), **sure}
    answer["text"] += _otherwise(found, measured, dynamics)
    if measured is not None:
        row = _ranking(found, measured)
        answer["sure"] += (
            f"; it ranks what training did to y+ with ρ = {row['rho']:.2f} ({row['low']:.2f} to "
            f"{row['high']:.2f})"
        ).replace("-", "−")
    said = [
        answer,
        *run,
        {"about": "the step", "text": _step(found, up, down), **short},
        {"about": "the mechanism", "text": _mechanism(parts, up < 0), **short},
        *_tell_forecast(found),
    ]
    gives = _gives(found)
    harmful = gives[gives < 0]
    if len(harmful):
        top = found.worst(min(max(1, n // 10), len(harmful)))
        text = (
            f"{_count(len(harmful))} pull{'s' if len(harmful) == 1 else ''} the chosen responses "
            f"of all pairs down on the whole; {_percent(float(gives[top].sum() / harmful.sum()))} "
            f"of it is done by the worst {len(top)} ({_named(top, places)})"
            + (" in the foretold run." if found.foretold else ".")
        )
    else:
        text = "No pair pulls the chosen responses down on the whole."
    foretold = {"kind": "estimate", "sure": "foretold"} if found.foretold else {}
    said.append({"about": "the pairs", "text": text, **short, **foretold})
    return [*said, *_tell_tokens(found, places), *_tell_mass(found, closeups)]


def _tell_forecast(found: Diagnosis) -> list[dict[str, str]]:
    """What a run that is planned will do."""
    if found.foretold is None:
        return []
    run, (up, down) = found.foretold.run, found.foretold.change
    text = (
        f"{run.epochs} epoch{'' if run.epochs == 1 else 's'} of {run.optimizer} at a learning rate "
        f"of {run.lr:g} are foretold to move log π(y+) by {signed(float(up.mean()), 2)} nats and "
        f"log π(y−) by {signed(float(down.mean()), 2)} on average; log π(y+) falls in "
        f"{int((up < 0).sum())} of {_count(len(found))}."
    )
    sure = "foretold with the gradients of now: the longer the run, the less it holds"
    return [{"about": "the run ahead", "text": text, "kind": "estimate", "sure": sure}]


def _answer(found: Diagnosis, parts: Mapping[str, Tensor]) -> str:
    """The first sentence: do they fall, and why."""
    up = found.scores["set_chosen"]
    falls = up < 0
    if not falls.any():
        return "At this point they do not fall: a small step lowers log π(y+) of no pair."
    lot = f"{int(falls.sum())} of {_count(len(found))}"
    on_average = bool(up.mean() < 0)
    why = (
        "Because" if on_average else f"On average they do not fall, but those of {lot} do, because"
    )
    mean = {k: float((v if on_average else v[falls]).mean()) for k, v in parts.items()}
    raised = mean["own chosen"] + mean["other chosen"]
    taken = mean["own rejected"] + mean["other rejected"]
    end = f" The chosen log-prob of {lot} falls." if on_average else ""
    if mean["own chosen"] < 0:  # squares past their target
        return (
            f"{why} {found.objective} itself pulls chosen responses down: the margins are past its "
            f"target, and w+ is negative.{end}"
        )
    if taken >= 0:  # rare: it is the chosen responses themselves that are at odds
        return (
            f"{why} pulling other chosen responses up takes {_size(mean['other chosen'])} from log "
            f"π(y+) for each nat of margin.{end}"
        )
    share = ""
    if mean["other rejected"] < 0:
        part = _percent(min(mean["other rejected"] / taken, 1.0))
        share = f", {part} of it through the y− of other pairs"
    than = "and pulling chosen ones up gives nothing"
    if raised < 0:
        than = f"and pulling chosen ones up takes another {_size(raised)}"
    elif raised > 0:
        than = f"more than the {_size(raised)} that pulling chosen ones up gives"
    return (
        f"{why} pushing rejected responses down takes {_size(taken)} from log π(y+) for each nat "
        f"of margin{share}: {than}.{end}"
    )


def _otherwise(
    found: Diagnosis, measured: Tensor | None, dynamics: Sequence[Mapping[str, Any]]
) -> str:
    """What a run does to y+, where a small step says the opposite."""
    watched = dynamics[-1].get("change/chosen") if dynamics else None
    mean, name = 0.0, ""
    if measured is not None:
        mean, name = float(measured.mean()), "But the training that followed was measured"
    elif watched is not None:
        mean, name = float(watched), "But the watched run was measured"
    elif found.foretold is not None:
        mean, name = float(found.foretold.change[0].mean()), "But the run ahead is foretold"
    if mean * float(found.scores["set_chosen"].mean()) >= 0:
        return ""
    return f" {name} to {'raise' if mean > 0 else 'lower'} them by {_size(mean)} on average."


def _step(found: Diagnosis, up: Tensor, down: Tensor) -> str:
    both, scale = int(((up < 0) & (down < 0)).sum()), unit(found)
    return (
        f"While a small {found.objective} step moves the margins by 1 nat, log π(y+) "
        f"{_moves(float(up.mean()) * scale)} and log π(y−) {_moves(float(down.mean()) * scale)} on "
        f"average; both responses of {_count(both)} fall."
    )


def _mechanism(parts: Mapping[str, Tensor], falls: Tensor) -> str:
    mean = {k: signed(float(v.mean()), 2) for k, v in parts.items()}
    text = (
        f"What moves y+, in those nats: its own pair's y+ pulled up {mean['own chosen']}, other "
        f"pairs' y+ {mean['other chosen']}, its own pair's y− pushed down {mean['own rejected']}, "
        f"other pairs' y− {mean['other rejected']}."
    )
    if falls.any():
        cause = torch.stack([v[falls] for v in parts.values()]).argmin(0).tolist()
        name, times = Counter(list(parts)[i] for i in cause).most_common(1)[0]
        text += (
            f" Where y+ falls, the strongest pull down is in "
            f"{'all' if times == len(cause) else f'{times} of'} {_count(len(cause))} "
            + (
                "their own chosen response, which the loss itself pulls down."
                if name == "own chosen"
                else f"{_SOURCES[name]}: they share directions in the weights with it."
            )
        )
    return text


def _tell_tokens(found: Diagnosis, places: Sequence[int] | None) -> list[dict[str, str]]:
    """Through which tokens the most harmful pairs do it."""
    pairs = [i for i in found.worst(len(found.named)) if i in found.named]
    pairs = [i for i in pairs if float(found.scores["gives"][i]) < 0]
    rows = [row for i in pairs for row in found.tokens(i) if row["gives"] < 0]
    total = sum(row["gives"] for row in rows)
    if not total:
        return []
    shares: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["response"], visible(row["text"], 24))
        shares[key] = shares.get(key, 0.0) + row["gives"] / total
    top = sorted(shares, key=lambda k: -shares[k])[:6]
    said = {"rejected": "pushing down", "chosen": "pulling up"}
    listed = " and ".join(
        f"{verb} " + ", ".join(f"‘{t}’ ({_percent(shares[side, t])})" for s, t in top if s == side)
        for side, verb in said.items()
        if any(s == side for s, _ in top)
    )
    text = (
        f"In the most harmful pairs ({_named(pairs, places)}), what takes most from the chosen "
        f"responses of all pairs is {listed}."
    )
    sure = "exact, first order, token by token: they add up to the pair's effect"
    return [{"about": "the tokens", "text": text, "kind": "exact", "sure": sure}]


def _tell_mass(found: Diagnosis, closeups: Sequence[CloseUp]) -> list[dict[str, str]]:
    """Where the probability goes that rejected tokens lose."""
    shares = _mass(closeups)
    if shares is None:
        share = float(found.scores["squeeze"].nanmean())
        if not math.isfinite(share):
            return []
        text = (
            f"In each softmax by itself, pushing a rejected token down gives {_percent(share)} of "
            "the freed probability to a single other token."
        )
        sure = "exact for a softmax alone, first order; what tokens share is not in it"
        return [{"about": "the mass", "text": text, "kind": "estimate", "sure": sure}]
    receivers = Counter(
        visible(c.flow.text_of(int(i)), 24)
        for c in closeups
        for i, gain in zip(c.flow.argmax, c.flow.measured.argmax, strict=True)
        if float(gain) > 0
    )
    often = ", ".join(f"‘{t}’" for t, _ in receivers.most_common(3))
    star = shares["argmax"]
    if min(shares.values()) < 0:
        got = {k: f"{100 * v:+.0f}".replace("-", "−") for k, v in shares.items()}
        text = (
            "For 100 units of probability that rejected tokens lose, the one likeliest other token "
            f"of each position gets {got['argmax']}, the next nine {got['top']}, all the rest "
            f"{got['rest']}"
        )
    else:
        text = (
            f"Of the probability that rejected tokens lose, {_percent(star)} goes to the one "
            f"likeliest other token of each position, {_percent(shares['top'])} to the next nine, "
            f"{_percent(shares['rest'])} to all the rest"
        )
    text += f". Most often it is {often}" if often else ""
    text += ". That is the squeezing effect." if star >= 0.5 else "."
    positions = sum(len(c.flow.labels) for c in closeups)
    return [
        {
            "about": "the mass",
            "text": text,
            "kind": "measured",
            "sure": f"measured: a real step of each pair's share on a copy, {positions} "
            f"positions of {_count(len(closeups), 'response')}",
        }
    ]


def _mass(closeups: Sequence[CloseUp]) -> dict[str, float] | None:
    """Shares of what rejected tokens lost; None where they lost nothing."""
    flows = [c.flow.summary()["measured"] for c in closeups]
    lost = -sum(f["label"] for f in flows)
    if lost <= 0:
        return None
    return {k: sum(f[k] for f in flows) / lost for k in ("argmax", "top", "rest")}


def warnings(
    found: Diagnosis,
    closeups: Sequence[CloseUp] = (),
    *,
    measured: Tensor | None = None,
    places: Sequence[int] | None = None,
) -> list[dict[str, str]]:
    """What to look at: "state" (act, note or fine), "what", "sure", "do"; the worst first."""
    n, scores, rows = len(found), found.scores, []
    up, gives = scores["set_chosen"], _gives(found)
    exact = found.stderr is None
    sure = "exact, first order" if exact else "estimate, first order"

    def add(state: str, what: str, do: str, how: str = sure) -> None:
        rows.append({"state": state, "what": what, "sure": how, "do": do})

    falls = float((up < 0).double().mean())
    losses = [
        o
        for o in found.objectives()
        if o["chosen"] > o["rejected"]
        and o["objective"] not in ("sft", "unlikelihood", "extend", found.objective)
    ]
    best = min(losses, key=lambda o: (o["chosen_falls"], -o["chosen"]), default=None)
    other = ""
    if best is not None and best["chosen_falls"] < falls:
        other = (
            f" A step of {best['objective']}, which widens the margins too, lowers "
            f"{_percent(best['chosen_falls'])}."
        )
    add(
        "act" if falls > 0.5 else "note" if falls > 0.05 else "fine",
        f"log π(y+) falls in {_percent(falls)} of the pairs",
        f"Leave out or reweight the pairs below, or change the loss.{other}"
        if falls > 0.05
        else "",
    )
    harmful = gives[gives < 0]
    if len(harmful):
        top = found.worst(min(max(1, n // 10), len(harmful)))
        share, against = float(gives[top].sum() / harmful.sum()), float(gives[gives > 0].sum())
        heavy = float(-harmful.sum()) > 0.25 * against
        add(
            "act" if heavy and share > 0.4 else "note",
            f"{len(top)} of {_count(n)} do{'es' if len(top) == 1 else ''} {_percent(share)} of the "
            "harm to all chosen responses",
            f"Read them ({_named(top, places)}). To leave out: lddyn filter FOLDER "
            f"--drop {len(top)} --out OTHER",
            "foretold" if found.foretold else sure,
        )
    else:
        add("fine", "no pair harms the chosen responses on the whole", "")
    entangled = found.entangled
    add(
        ("act" if len(entangled) > 0.2 * n else "note") if entangled else "fine",
        f"{_count(len(entangled))} would lower "
        f"{'its' if len(entangled) == 1 else 'their'} own y+ even alone"
        + (": y+ and y− are too alike" if entangled else ""),
        f"Rewrite one response, or leave out {_named(entangled, places)}." if entangled else "",
        "exact, first order",
    )
    same = [i for i in range(n) if float(scores["edit_distance"][i]) < 0.1]
    if same:
        add(
            "note",
            f"y+ and y− of {_count(len(same))} differ in fewer than one token of ten",
            f"Check that the difference is meant: {_named(same, places)}.",
            "exact",
        )
    deep = int((scores["valley"] < scores["log_prob_chosen"] / _lengths(found) - 2).sum())
    if deep:
        add(
            "note",
            f"in {deep} of {_count(n)} y− is unlikely already: over 2 nats a token less than y+",
            "Pushed further down, its mass goes to what is likely already. SFT on both responses "
            "first, a smaller β, or responses that the model itself writes.",
            "exact now; what follows is paper §3.3",
        )
    mass = _mass(closeups)
    if mass is not None:
        star = mass["argmax"]
        add(  # squeezed mass alone harms no y+
            "act" if star >= 0.7 and falls > 0.05 else "note" if star >= 0.4 else "fine",
            f"the likeliest other token gains {_percent(star)} of what rejected tokens lose",
            "Watch the confidence curve of the run; stop early, lower β or the learning rate."
            if star >= 0.4
            else "",
            f"measured, {_count(len(closeups), 'response')}",
        )
    weight = (scores["weight_chosen"].abs() + scores["weight_rejected"].abs()).clamp(min=0)
    idle = int((weight < 0.05 * weight.max()).sum())
    if idle:
        add(
            "fine",
            f"{_count(idle)} ha{'s' if idle == 1 else 've'} under 1/20 of the largest "
            "weight: learnt already",
            "",
            "exact",
        )
    error = found.set_stderr()
    if error is not None:
        unsure = int((up.abs() < 2 * error[0]).sum())
        add(
            "note" if unsure > n / 10 else "fine",
            f"the sketch leaves the fate of {unsure} of {n} chosen responses open",
            "Give more memory or a larger sketch." if unsure > n / 10 else "",
            "two standard errors",
        )
    if measured is not None:
        row = _ranking(found, measured)
        good = row["low"] > 0
        add(
            "fine" if row["low"] > 0.5 else "note" if good else "act",
            f"the prediction ranks the changes that training made with ρ = {row['rho']:.2f}",
            "Trust the ranking."
            if row["low"] > 0.5
            else "Trust the direction of groups of pairs, not the order of single ones."
            if good
            else "The run did not do what a small step foretells: diagnose a later checkpoint.",
            f"95% interval: {row['low']:.2f} to {row['high']:.2f}".replace("-", "−"),
        )
    order = {"act": 0, "note": 1, "fine": 2}
    return sorted(rows, key=lambda row: order[row["state"]])


def _ranking(found: Diagnosis, measured: Tensor) -> dict[str, Any]:
    return next(r for r in found.correlations(measured) if r["score"] == "set_chosen")


def _lengths(found: Diagnosis) -> Tensor:
    return torch.tensor([len(chosen) for chosen, _ in found.pairs], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# The page


def write_diagnosis(
    found: Diagnosis,
    path: str | Path,
    *,
    closeups: Sequence[CloseUp] = (),
    dynamics: Sequence[Mapping[str, Any]] = (),
    measured: Tensor | None = None,
    places: Sequence[int] | None = None,
    faults: Mapping[int, str] | None = None,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a diagnosis as one self-contained HTML page, and its tables as JSON beside it.

    Args:
        found: The diagnosis.
        path: The file; its folder is made. diagnosis.json (`Diagnosis.save`) and, with closeups,
            tokens.json (`MassFlow.to_dict` and `Decomposition.summary` of each) go beside it.
        closeups: What `look_closer` found: token × token influence and mass flow.
        dynamics: Rows of a watched run, `read_dynamics(FOLDER)`: curves by response type.
        measured: Δ log π(y+) that training did, (N,) nats, for the correlations.
        places: The row of the data that each pair comes from.
        faults: Pair -> what an audit found, for `Diagnosis.actions`.
        tokenizer: Makes running text of token ids. None: token texts are joined.
        extra: Facts for the table at the end (model, data, seconds, …).

    Returns:
        The path written.

    Cost: well under a second for 64 pairs. About 3 kB a pair of two short responses, 500 pairs at
    most, and up to 1 MB for the token tables of three close-ups.
    """
    path = Path(path)
    title = "Why do the chosen log-probs fall?"
    if not dynamics and bool((found.scores["set_chosen"] >= 0).all()):
        title = "Do the chosen log-probs fall?"
    document = found.to_dict(places, faults)
    if measured is not None:
        document |= {
            "measured": measured.tolist(),
            "correlations": found.correlations(measured),
        }
    step = torch.stack([found.scores["set_chosen"], found.scores["set_rejected"]]) * unit(found)
    text = render(
        "diagnosis.html",
        title=title,
        subtitle=f"{_count(len(found))}, {found.objective}"
        + "".join(f", {k} = {v:g}" for k, v in found.parameters.items()),
        story=tell_diagnosis(found, closeups, dynamics=dynamics, measured=measured, places=places),
        warnings=warnings(found, closeups, measured=measured, places=places),
        lr=f"{unit(found):.3g}",
        noun="pair" if places is None else "row",
        fates=_fates(found, step, places),
        sources=_bars(found),
        curves=curves(dynamics, LABELS),
        run=explain_dynamics(dynamics, LABELS),
        table=_table(found, document["actions"], places, tokenizer),
        columns=_columns(found),
        ahead=None if found.foretold is None else _fates(found, found.foretold.change, places),
        harm=bool((_gives(found) < 0).any()),
        map=_map(found, places),
        closeups=[_closeup(i, c, places) for i, c in enumerate(closeups)],
        objectives=_objectives(found, document["objectives"]),
        correlations=_correlations(found, measured, document["meaning"]),
        validated=found.validated if measured is None else None,
        meanings=document["meaning"],
        scores=_scores(found, document["meaning"]),
        exact=found.stderr is None,
        facts={str(k): readable(str(v)) for k, v in (extra or {}).items()}
        | {"made with": versions()},
        installation=installation(env()),
        signed=signed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    tables: dict[str, Any] = {"diagnosis": document}
    if closeups:
        tables["tokens"] = [
            {"pair": c.pair, "step": c.decomposition.summary(), "mass": c.flow.to_dict()}
            for c in closeups
        ]
    for name, content in tables.items():
        text = json.dumps(plain(content), indent=1, allow_nan=False)
        replace_file(path.parent / f"{name}.json", text + "\n")
    return path


def _scores(found: Diagnosis, meanings: Mapping[str, str]) -> dict[str, Any]:
    """All scores of the pairs in the table, four digits of each."""
    pairs = found.worst(_LISTED)
    return {
        "pairs": pairs,
        "names": list(found.scores),
        "values": plain(
            [[float(f"{float(v[i]):.4g}") for v in found.scores.values()] for i in pairs]
        ),
        "meanings": dict(meanings),
    }


def _row(pair: int, places: Sequence[int] | None) -> int:
    return pair if places is None else places[pair]


def _fates(found: Diagnosis, change: Tensor, places: Sequence[int] | None) -> dict[str, Any]:
    """Each pair as a point: of its change (2, N) that of y− across, that of y+ up; the means."""
    up, down = change.tolist()
    shown = [i for i in range(len(up)) if math.isfinite(up[i]) and math.isfinite(down[i])]
    x, across = axis([down[i] for i in shown], 44, 392)
    y, upwards = axis([up[i] for i in shown], 262, 8)
    zero = [next(t["at"] for t in ticks if t["text"] == "0") for ticks in (across, upwards)]
    points = [
        {
            "x": a,
            "y": b,
            "sign": word(up[i]),
            "pair": i,
            "row": _row(i, places),
            "text": f"y+ {signed(up[i], 2)}, y− {signed(down[i], 2)} nats",
        }
        for i, a, b in zip(shown, x, y, strict=True)
    ]
    return {
        "points": points,
        "x": across,
        "y": upwards,
        "zero": zero,
        "falls": sum(v < 0 for v in up),
        "means": [
            {
                "name": name,
                "before": signed(float(found.log_probs[k].mean()), 4),
                "after": signed(float(found.log_probs[k].mean()) + sum(v) / len(v), 4),
                "change": signed(sum(v) / len(v), 2),
                "sign": word(sum(v)),
            }
            for k, (name, v) in enumerate((("y+", up), ("y−", down)))
        ],
    }


def _bars(found: Diagnosis) -> list[dict[str, Any]]:
    """Mean Δ log π of y+ and of y−, by the responses that make it."""
    n, parts = len(found), _sources(found)
    shown = []
    for name, at in (("y+", slice(0, n)), ("y−", slice(n, None))):
        means = {k: float(v[at].mean()) for k, v in parts.items()}
        largest = max([abs(v) for v in means.values()] + [1e-300])
        shown.append(
            {
                "name": name,
                "total": signed(sum(means.values()), 2),
                "rows": [
                    {
                        "name": _SOURCES[k].replace("their own", "its own"),
                        "nats": signed(v, 2),
                        "sign": word(v),
                        "share": 100 * abs(v) / largest,
                    }
                    for k, v in means.items()
                ],
            }
        )
    return shown


def _text(ids: Sequence[int], tokens: Sequence[str] | None, tokenizer: Any) -> str:
    if tokenizer is not None:
        return str(tokenizer.decode(list(ids)))
    return "".join(tokens) if tokens is not None else " ".join(map(str, ids))


def _columns(found: Diagnosis) -> dict[str, tuple[str, str]]:
    """Of the table; with a run, what it does comes second."""
    first, *rest = _COLUMNS.items()
    run = ("run Δ y+", "what the run is foretold to do to log π(y+)")
    return dict([first, *([("run_chosen", run)] if found.foretold else []), *rest])


def _table(
    found: Diagnosis,
    actions: Sequence[Mapping[str, Any]],
    places: Sequence[int] | None,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """One row a pair, the most harmful first, as `Diagnosis.actions` has them."""
    n, scale = len(found), unit(found)
    effects = _effects(found)[:n] * scale / n
    scores = dict(found.scores)
    sizes = (scores["norm_chosen"] * scores["norm_rejected"]).clamp(min=1e-300).sqrt()
    scores["cosine"] = scores["inner"] / sizes
    scores["gives"] = _gives(found)
    # The others' effect on y+ of each pair, and its on theirs: three names each.
    among = effects.clone().fill_diagonal_(0.0)
    by, on = (x.topk(min(3, n), largest=False) for x in (among, among.T))
    rows = []
    for rank, action in enumerate(actions[:_LISTED]):
        i = action["pair"]
        chosen, rejected = found.pairs[i]
        per_lr = {"set_chosen": scale, "set_rejected": scale, "own_chosen": scale / n}
        values = {k: float(scores[k][i]) * per_lr.get(k, 1.0) for k in _columns(found)}
        prompt = _text(chosen.prompt_ids, chosen.prompt_tokens, tokenizer).strip()
        if len(prompt) > _PROMPT:
            prompt = "…" + prompt[-_PROMPT:]
        changes = (values["set_chosen"], values["set_rejected"])
        tinted = _tinted(found, i)
        responses = []
        for k, (side, example) in enumerate((("chosen", chosen), ("rejected", rejected))):
            before = float(found.log_probs[k, i])
            text = _text(example.response_ids, example.tokens, tokenizer).strip()
            responses.append(
                {
                    "name": f"{side} {'y−' if k else 'y+'}",
                    "text": readable(text, _RESPONSE),
                    "tokens": tinted.get(side, []),
                    "moves": f"log π {signed(before, 4)} → {signed(before + changes[k], 4)} nats, "
                    f"{_count(len(example), 'token')}",
                }
            )
        rows.append(
            {
                "rank": rank + 1,
                "pair": i,
                "row": _row(i, places),
                "fate": [word(v) for v in changes],
                "action": action["action"],
                "share": f"{action['share']:.2f}",
                "why": action["why"],
                "values": [
                    {
                        "name": k,
                        "value": v if math.isfinite(v) else 0.0,
                        "text": signed(v, 2),
                        "sign": "" if k in ("cosine", "valley") else word(v),
                    }
                    for k, v in values.items()
                ],
                "prompt": readable(prompt),
                "responses": responses,
                "links": [
                    {
                        "name": name,
                        "to": [
                            {"pair": j, "row": _row(j, places), "nats": signed(v, 2)}
                            for j, v in zip(
                                top.indices[i].tolist(), top.values[i].tolist(), strict=True
                            )
                            if v < 0
                        ],
                    }
                    for name, top in (
                        ("y+ is pulled down most by", by),
                        ("pulls down most the y+ of", on),
                    )
                ],
            }
        )
    return rows


def _tinted(found: Diagnosis, pair: int) -> dict[str, list[dict[str, Any]]]:
    """Response -> its tokens, coloured by what they give to the chosen responses of all pairs."""
    if pair not in found.touched:
        return {}
    rows, scale = found.tokens(pair), unit(found)
    largest = max([abs(row["gives"]) for row in rows] + [1e-300])
    shown: dict[str, list[dict[str, Any]]] = {}
    for row in rows[:_TOKENS]:
        gives = row["gives"]
        shown.setdefault(row["response"], []).append(
            {
                "text": visible(row["text"]),
                "sign": word(gives),
                "shade": f"{0.6 * (abs(gives) / largest) ** 0.5:.2f}",
                "nats": signed(gives * scale, 2),
            }
        )
    return shown


def _map(found: Diagnosis, places: Sequence[int] | None) -> dict[str, Any]:
    """Two pair × pair tables in an order that puts like beside like, as bytes."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    n = len(found)
    kept = sorted(found.scores["gives"].abs().argsort(descending=True)[:_MAPPED].tolist())
    effects = _effects(found)
    up, down = found.scores["weight_chosen"], found.scores["weight_rejected"]
    inner = (effects[:n] * up[:, None] + effects[n:] * down[:, None])[kept][:, kept]
    size = inner.diagonal().clamp(min=1e-300).sqrt()
    cosine = (inner / size[:, None] / size).nan_to_num().clamp(-1, 1).fill_diagonal_(1.0)
    order = list(range(len(kept)))
    if len(kept) > 2:
        distance = squareform((1 - (cosine + cosine.T) / 2).clamp(min=0).numpy(), checks=False)
        order = leaves_list(linkage(distance, "average", optimal_ordering=True)).tolist()
    effect = (effects[:n] * (unit(found) / n))[kept][:, kept].nan_to_num()

    def strongest(values: Tensor, least: bool) -> list[dict[str, Any]]:
        flat = values.clone().fill_diagonal_(0.0).flatten()
        top = flat.topk(min(6, len(flat)), largest=not least)
        return [
            {
                "row": _row(kept[at // len(kept)], places),
                "pair": kept[at // len(kept)],
                "other": _row(kept[at % len(kept)], places),
                "text": signed(value, 2),
            }
            for at, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            if value * (-1 if least else 1) > 0
        ]

    def packed(values: Tensor, largest: float) -> dict[str, Any]:
        cells = (values[order][:, order] / largest * 127).round().clamp(-127, 127).to(torch.int8)
        return {
            "cells": base64.b64encode(cells.contiguous().numpy().tobytes()).decode(),
            "largest": largest,
        }

    largest = float(f"{float(effect.abs().max()) or 1.0:.3g}")
    return {
        "pairs": [kept[i] for i in order],
        "rows": [_row(kept[i], places) for i in order],
        "cut": n > len(kept),
        "alike": strongest(cosine.triu(), False),
        "drags": strongest(effect, True),
        "views": [
            {"name": "alike", **packed(cosine, 1.0)},
            {"name": "effect", **packed(effect, largest)},
        ],
    }


def _closeup(number: int, closeup: CloseUp, places: Sequence[int] | None) -> dict[str, Any]:
    dec, flow = closeup.decomposition, closeup.flow
    names = {"chosen": "its own y+", "rejected": "its own y−"}
    if closeup.victim is not None:
        names["victim"] = f"y+ of {_named([closeup.victim], places)}, which it lowers most"
    tokens = token_tables(dec.to_dict())
    for observed, response in zip(dec, tokens["responses"], strict=True):
        response["name"] = names[observed.name]
    real = flow.measured
    moved = {k: getattr(real, k) for k in ("label", "argmax", "top", "rest")}
    order = moved["label"].argsort(stable=True)[:11].tolist()
    return {
        "number": number,
        "row": _row(closeup.pair, places),
        "tokens": tokens,
        "names": [response["name"] for response in tokens["responses"]],
        "total": _flow_bars({k: float(v.sum()) for k, v in moved.items()}),
        "flow": [
            {
                "token": visible(flow.tokens[m], 18),
                "star": visible(flow.text_of(int(flow.argmax[m])), 18),
                "before": f"{float(flow.log_probs[m, flow.labels[m]].exp()):.2g}",
                "bars": _flow_bars({k: float(v[m]) for k, v in moved.items()}),
            }
            for m in order
        ],
        "positions": len(flow.tokens),
    }


def _flow_bars(moved: Mapping[str, float]) -> list[dict[str, Any]]:
    names = {"label": "the token", "argmax": "likeliest other", "top": "next nine", "rest": "rest"}
    largest = max([abs(v) for v in moved.values()] + [1e-300])
    return [
        {"name": names[k], "nats": signed(v, 2), "sign": word(v), "share": 100 * abs(v) / largest}
        for k, v in moved.items()
    ]


def _objectives(found: Diagnosis, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    largest = {k: max([abs(r[k]) for r in rows] + [1e-300]) for k in ("chosen", "rejected")}
    return [
        {
            **row,
            "mine": row["objective"] == found.objective,
            "bars": [
                {"sign": word(row[k]), "text": signed(row[k], 2), "share": 100 * abs(row[k]) / most}
                for k, most in largest.items()
            ],
        }
        for row in sorted(rows, key=lambda r: (r["chosen_falls"], -r["chosen"]))
    ]


def _correlations(
    found: Diagnosis, measured: Tensor | None, meanings: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Of scores with what training did, or else with what other pairs' real steps did."""
    if measured is not None:
        rows = found.correlations(measured)
    elif found.validated is not None:
        rows = [{"score": r["score"], **r["others"]} for r in found.validated["scores"]]
        rows = sorted(rows, key=lambda row: -abs(row["rho"]))
    else:
        return []

    def shown(value: float) -> str:
        return f"{value:+.2f}".replace("-", "−")

    return [
        row
        | {
            "what": meanings[row["score"]],
            "value": shown(row["rho"]),
            "sign": word(row["rho"]),
            "ends": f"{shown(row['low'])} to {shown(row['high'])}",
        }
        for row in rows
        if row["low"] < row["high"]
    ]
