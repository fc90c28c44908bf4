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

from lddyn.figures import printable, signed, visible
from lddyn.report.decomposition import token_data
from lddyn.report.dynamics import curves, tell_dynamics
from lddyn.report.page import axis, plain, readable, render, versions, word
from lddyn.shards import replace_file

if TYPE_CHECKING:
    from lddyn.decompose import Decomposition
    from lddyn.diagnose import Diagnosis
    from lddyn.massflow import MassFlow

__all__ = ["CloseUp", "look_closer", "tell_diagnosis", "warnings", "write_diagnosis"]

_MAPPED = 256  # pairs in the map
_LISTED = 500  # pairs in the table
_PROMPT, _RESPONSE = 600, 1200  # characters of a text in the table

# Score -> heading of the table's column, and what it says.
_COLUMNS = {
    "gives": ("to all y+", "what this pair's share of the step does to the chosen responses of "
              "all pairs together"),
    "set_chosen": ("Δ y+", "what the step on the whole set does to log π(y+) of this pair"),
    "set_rejected": ("Δ y−", "what the step on the whole set does to log π(y−) of this pair"),
    "own_chosen": ("own Δ y+", "what this pair's own share of the step does to its log π(y+)"),
    "cosine": ("cos(g+, g−)", "how alike the gradients of y+ and y− are: 1 is the same direction"),
    "valley": ("y− a token", "mean log π of a token of y−: the lower, the deeper in a valley"),
}  # fmt: skip


@dataclass(frozen=True)
class CloseUp:
    """One pair's share of a step, token by token.

    Attributes:
        pair: The pair that is learnt from.
        decomposition: What its tokens do to its own responses, and to the chosen response that
            it lowers most.
        flow: Where the probability goes that its rejected response loses.
    """

    pair: int
    decomposition: Decomposition
    flow: MassFlow


def unit(found: Diagnosis) -> float:
    """The learning rate that moves the margins by one nat on average, to first order; 0 if none."""
    margin = found.scores["set_chosen"] - found.scores["set_rejected"]
    mean = float(margin.abs().mean())
    return 1 / mean if 0 < mean < math.inf else 0.0


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

    Cost: a `decompose` of three responses and a `massflow` of one for each pair.
    """
    from lddyn.decompose import decompose
    from lddyn.massflow import massflow
    from lddyn.objectives import preference

    lr, closeups = unit(found) / len(found), []
    effects = _effects(found)
    for pair in (found.worst(3) if pairs is None else pairs) if lr else ():
        chosen, rejected = found.pairs[pair]
        update = preference(
            found.objective, chosen, rejected, reference=tuple(found.reference[:, pair].tolist()),
            **found.parameters,
        )  # fmt: skip
        observed = {"chosen": chosen, "rejected": rejected}
        others = effects[: len(found), pair].clone()
        others[pair] = math.inf
        victim = int(others.argmin())
        if float(others[victim]) < 0:
            observed[f"y+ of pair {victim}"] = found.pairs[victim][0]
        closeups.append(
            CloseUp(
                pair,
                decompose(model, observed, update, lr),
                massflow(model, rejected, update, lr=lr, tokenizer=tokenizer),
            )
        )
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


def _nats(value: float) -> str:
    """A change in words: "rises by 0.42 nats"."""
    if abs(value) < 5e-7:
        return "stays"
    return f"{'rises' if value > 0 else 'falls'} by {signed(abs(value), 2)[1:]} nats"


def _count(number: int, of: str = "pair") -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"


def _named(pairs: Sequence[int], places: Sequence[int] | None, most: int = 5) -> str:
    """Pairs by their rows: "rows 3, 5 …"."""
    rows = [pair if places is None else places[pair] for pair in pairs]
    what = "row" if places is not None else "pair"
    shown = ", ".join(map(str, rows[:most])) + (" …" if len(rows) > most else "")
    return f"{what}{'' if len(rows) == 1 else 's'} {shown}"


def _certainty(found: Diagnosis) -> dict[str, str]:
    error = found.set_stderr()
    if error is None:
        return {
            "kind": "exact",
            "sure": "exact to first order: every gradient was compared with every other",
        }
    up = found.scores["set_chosen"].abs()
    unsure = int((up < 2 * error[0]).sum())
    return {
        "kind": "estimate",
        "sure": f"estimated from sketched gradients: {unsure} of {len(found)} could as well rise "
        "as fall (within two standard errors of 0)",
    }


def tell_diagnosis(
    found: Diagnosis, closeups: Sequence[CloseUp] = (), *,
    dynamics: Sequence[Mapping[str, Any]] = (), places: Sequence[int] | None = None,
) -> list[dict[str, str]]:  # fmt: skip
    """Why the chosen log-probs fall, or do not: the mechanism, the pairs, the tokens, the mass.

    Args:
        found: The diagnosis.
        closeups: What `look_closer` found.
        dynamics: Rows of a watched run.
        places: The row of the data that each pair comes from.

    Returns:
        Sentences: "about" (a word), "text", "sure" (how sure, and why), "kind" (exact, estimate or
        measured).
    """
    n, scale, sure = len(found), unit(found), _certainty(found)
    said = [
        {"about": "the run", "text": text, "kind": "measured", "sure": "measured on its probes"}
        for text in tell_dynamics(dynamics)[:1]
    ]
    if not scale:
        text = "No step of this objective moves any pair: all weights or gradients are zero."
        return [*said, {"about": "what happens", "text": text, **sure}]
    up, down = (found.scores[k] for k in ("set_chosen", "set_rejected"))
    falls, both = up < 0, (up < 0) & (down < 0)
    said.append({
        "about": "what happens",
        "text": f"A small {found.objective} step on all {_count(n)} lowers log π(y+) of "
        f"{int(falls.sum())}" + (f", and both responses of {int(both.sum())}" if both.any() else "")
        + f". For each nat by which it moves the margins, log π(y+) {_nats(float(up.mean()) * scale)} "
        f"on average and log π(y−) {_nats(float(down.mean()) * scale)}.",
        **sure,
    })  # fmt: skip
    parts = {k: v[:n] for k, v in _sources(found).items()}
    mean = {k: float(v.mean()) for k, v in parts.items()}
    text = (
        f"Of this, pulling chosen responses up gives y+ "
        f"{signed(mean['own chosen'] + mean['other chosen'], 2)}; pushing rejected ones down gives "
        f"{signed(mean['own rejected'] + mean['other rejected'], 2)}: "
        f"{signed(mean['own rejected'], 2)} through the pair's own y− and "
        f"{signed(mean['other rejected'], 2)} through the y− of other pairs"
    )
    if falls.any():
        cause = torch.stack([v[falls] for v in parts.values()]).argmin(0).tolist()
        name, times = Counter(list(parts)[i] for i in cause).most_common(1)[0]
        text += (
            f". Where y+ falls, what lowers it most is in {times} of {len(cause)} pairs "
            f"{_SOURCES[name]}"
        )
    said.append({"about": "the mechanism", "text": text + ".", **sure})
    gives = found.scores["gives"]
    harmful = gives[gives < 0]
    if len(harmful):
        top = found.worst(min(max(1, n // 10), len(harmful)))
        share = float(gives[top].sum() / harmful.sum())
        many = len(harmful) > 1
        said.append({
            "about": "the pairs",
            "text": f"{_count(len(harmful))} pull{'' if many else 's'} the chosen responses of all "
            f"pairs down on the whole. The worst {len(top)} ({_named(top, places)}) do "
            f"{share:.0%} of it.",
            **sure,
        })  # fmt: skip
    else:
        text = "No pair pulls the chosen responses down on the whole."
        said.append({"about": "the pairs", "text": text, **sure})
    return [*said, *_tell_closeups(closeups, places)]


def _tell_closeups(
    closeups: Sequence[CloseUp], places: Sequence[int] | None
) -> list[dict[str, str]]:
    said = []
    for closeup in closeups[:1]:
        dec = closeup.decomposition
        observed = dec[-1] if len(dec) > 2 else dec[0]
        lowering = [
            (dec.update_tokens[i], v)
            for i, v in enumerate(observed.influence.sum(0).tolist())
            if v < 0
        ]
        total = sum(v for _, v in lowering)
        if total < 0:
            shares: dict[str, float] = {}
            for token, value in lowering:
                name = visible(token.text, 24)
                shares[name] = shares.get(name, 0.0) + value / total
            top = sorted(shares, key=lambda k: -shares[k])[:4]
            quoted = ", ".join(f"‘{t}’ ({shares[t]:.0%})" for t in top)
            whose = "its own y+" if len(dec) < 3 else observed.name
            said.append({
                "about": "the tokens",
                "text": f"In {_named([closeup.pair], places)}, the most harmful, what lowers "
                f"{whose} comes through {quoted}.",
                "kind": "exact",
                "sure": "exact to first order, token by token; the rows sum to a separate push of "
                f"the step (largest difference {max(o.agreement for o in dec):.0e})",
            })  # fmt: skip
    flows = [c.flow.summary()["measured"] for c in closeups]
    lost = -sum(f["label"] for f in flows)
    if lost > 0:
        star, top, rest = (sum(f[k] for f in flows) / lost for k in ("argmax", "top", "rest"))
        receivers = Counter(
            visible(c.flow.text_of(int(i)), 24)
            for c in closeups
            for i, gain in zip(c.flow.argmax, c.flow.measured.argmax, strict=True)
            if float(gain) > 0
        )
        often = ", ".join(f"‘{t}’" for t, _ in receivers.most_common(3))
        word = "That is the squeezing effect" if star >= 0.5 else "It is spread, not squeezed"
        positions = sum(len(c.flow.labels) for c in closeups)
        said.append({
            "about": "the mass",
            "text": f"Of the probability that the rejected tokens lose, {star:.0%} goes to the one "
            f"likeliest other token of each position (most often {often or 'none'}), {top:.0%} to "
            f"the next nine and {rest:.0%} to all the rest. {word}.",
            "kind": "measured",
            "sure": f"measured: a real step on a float64 copy, {positions} positions of "
            f"{_count(len(closeups), 'response')}",
        })  # fmt: skip
    return said


def warnings(
    found: Diagnosis, closeups: Sequence[CloseUp] = (), *, measured: Tensor | None = None,
    places: Sequence[int] | None = None,
) -> list[dict[str, str]]:  # fmt: skip
    """What to look at: "state" (act, note or fine), "what", "sure", "do"; the worst first."""
    n, scores, rows = len(found), found.scores, []
    up, gives = scores["set_chosen"], scores["gives"]
    exact = found.stderr is None
    sure = "exact, first order" if exact else "estimate, first order"

    def add(state: str, what: str, do: str, how: str = sure) -> None:
        rows.append({"state": state, "what": what, "sure": how, "do": do})

    falls = float((up < 0).double().mean())
    losses = [o for o in found.objectives() if o["objective"] not in ("sft", "unlikelihood")]
    mine = next((o for o in losses if o["objective"] == found.objective), None)
    best = min(losses, key=lambda o: (o["chosen_falls"], -o["chosen"]))
    other = ""
    if mine is None or best["chosen_falls"] < mine["chosen_falls"]:
        other = f" A step of {best['objective']} lowers {best['chosen_falls']:.0%} of them."
    add(
        "act" if falls > 0.5 else "note" if falls > 0.05 else "fine",
        f"log π(y+) falls in {falls:.0%} of the pairs",
        ("Leave out or reweight the pairs below, or change the loss." + other)
        if falls > 0.05 else "Nothing.",
    )  # fmt: skip
    harmful = gives[gives < 0]
    if len(harmful):
        top = found.worst(min(max(1, n // 10), len(harmful)))
        share, against = float(gives[top].sum() / harmful.sum()), float(gives[gives > 0].sum())
        heavy = float(-harmful.sum()) > 0.25 * against
        add(
            "act" if heavy and share > 0.5 else "note",
            f"{_count(len(top))} of {n} do {share:.0%} of the harm that pairs do to all chosen "
            "responses",
            f"Read {_named(top, places)}; leave them out: "
            f"lddyn diagnose … --drop {len(top)} --write kept.jsonl",
        )  # fmt: skip
    else:
        add("fine", "no pair harms the chosen responses on the whole", "Nothing.")
    entangled = [i for i in range(n) if float(scores["own_chosen"][i]) < 0]
    add(
        ("act" if len(entangled) > 0.2 * n else "note") if entangled else "fine",
        f"{_count(len(entangled))} would lower their own y+ even alone: y+ and y− are too alike",
        f"Rewrite one response, or leave out {_named(entangled, places)}."
        if entangled else "Nothing.",
        "exact, first order",
    )  # fmt: skip
    same = [i for i in range(n) if float(scores["edit_distance"][i]) < 0.1]
    if same:
        add("note", f"{_count(len(same))} differ in fewer than one token of ten",
            f"Check that they mean a difference: {_named(same, places)}.", "exact")  # fmt: skip
    deep = scores["valley"] < scores["log_prob_chosen"] / _lengths(found) - 2
    if bool(deep.any()):
        number = int(deep.sum())
        add(
            "note",
            f"in {_count(number)} a token of y− is over 2 nats less likely than one of y+: pushed "
            "down from a valley, its mass goes to what is likely already",
            "SFT on both responses first (docs: extend), a smaller β, or responses that the model "
            "itself writes.",
            "exact now; what it leads to is the paper's §3.3",
        )  # fmt: skip
    flows = [c.flow.summary()["measured"] for c in closeups]
    lost = -sum(f["label"] for f in flows)
    if lost > 0:
        star = sum(f["argmax"] for f in flows) / lost
        add(
            "act" if star >= 0.7 else "note" if star >= 0.4 else "fine",
            f"{star:.0%} of what rejected tokens lose goes to the single likeliest other token",
            "Watch `greedy` in the run; stop early, or lower β or the learning rate."
            if star >= 0.4 else "Nothing.",
            f"measured by a real step, {_count(len(closeups), 'response')}",
        )  # fmt: skip
    weight = (scores["weight_chosen"].abs() + scores["weight_rejected"].abs()).clamp(min=0)
    idle = int((weight < 0.05 * weight.max()).sum())
    if idle:
        add("note", f"{_count(idle)} have less than a twentieth of the largest weight: learnt",
            "They no longer teach; nothing to do.", "exact")  # fmt: skip
    error = found.set_stderr()
    if error is not None:
        unsure = int((up.abs() < 2 * error[0]).sum())
        add("note" if unsure > n / 10 else "fine",
            f"the sketch leaves the fate of {unsure} of {n} chosen responses open",
            "Give more memory or a larger sketch." if unsure > n / 10 else "Nothing.",
            "two standard errors")  # fmt: skip
    if measured is not None:
        row = next(r for r in found.correlations(measured) if r["score"] == "set_chosen")
        good = row["low"] > 0
        add(
            "fine" if row["low"] > 0.5 else "note" if good else "act",
            f"the prediction ranks the measured changes with ρ = {row['rho']:+.2f}",
            "Trust the ranking." if row["low"] > 0.5 else
            "Trust the direction of groups of pairs, not the order of single ones." if good else
            "The run did not do what a small step foretells: diagnose a later checkpoint.",
            f"95 %: {row['low']:+.2f} to {row['high']:+.2f}",
        )  # fmt: skip
    order = {"act": 0, "note": 1, "fine": 2}
    return sorted(rows, key=lambda row: order[row["state"]])


def _lengths(found: Diagnosis) -> Tensor:
    return torch.tensor([len(chosen) for chosen, _ in found.pairs], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# The page


def write_diagnosis(
    found: Diagnosis, path: str | Path, *, closeups: Sequence[CloseUp] = (),
    dynamics: Sequence[Mapping[str, Any]] = (), measured: Tensor | None = None,
    places: Sequence[int] | None = None, tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes a diagnosis as one self-contained HTML page, and its tables as JSON beside it.

    Args:
        found: The diagnosis.
        path: The file; its folder is made. diagnosis.json (`Diagnosis.save`) and, with closeups,
            tokens.json (`MassFlow.to_dict` and `Decomposition.summary` of each) go beside it.
        closeups: What `look_closer` found: token × token influence and mass flow.
        dynamics: Rows of a watched run, `read_dynamics(FOLDER)`: curves by response type.
        measured: Δ log π(y+) that training did, (N,) nats, for the correlations.
        places: The row of the data that each pair comes from.
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
    text = render(
        "diagnosis.html",
        title=title,
        subtitle=f"{_count(len(found))}, {found.objective}"
        + "".join(f", {k} = {v:g}" for k, v in found.parameters.items()),
        story=tell_diagnosis(found, closeups, dynamics=dynamics, places=places),
        warnings=warnings(found, closeups, measured=measured, places=places),
        lr=f"{unit(found):.3g}",
        fates=_fates(found, places),
        sources=_bars(found),
        curves=curves(dynamics),
        run=tell_dynamics(dynamics),
        table=_table(found, places, tokenizer),
        columns=_COLUMNS,
        map=_map(found, places),
        closeups=[_closeup(i, c, places) for i, c in enumerate(closeups)],
        objectives=_objectives(found),
        correlations=[] if measured is None else found.correlations(measured),
        meanings=_meanings(),
        scores=_scores(found),
        exact=found.stderr is None,
        facts={str(k): readable(str(v)) for k, v in (extra or {}).items()}
        | {"made with": versions()},
        signed=signed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    found.save(path.parent, places)
    if closeups:
        tokens = [
            {"pair": c.pair, "step": c.decomposition.summary(), "mass": c.flow.to_dict()}
            for c in closeups
        ]
        text = json.dumps(plain(tokens), ensure_ascii=False, indent=1, allow_nan=False)
        replace_file(path.parent / "tokens.json", text + "\n")
    return path


def _meanings() -> Mapping[str, str]:
    from lddyn.diagnose import SCORES

    return SCORES


def _scores(found: Diagnosis) -> dict[str, Any]:
    """All scores of the pairs in the table, four digits of each."""
    pairs = found.worst(_LISTED)
    return {
        "pairs": pairs,
        "names": list(found.scores),
        "values": plain(
            [[float(f"{float(v[i]):.4g}") for v in found.scores.values()] for i in pairs]
        ),
        "meanings": dict(_meanings()),
    }


def _row(pair: int, places: Sequence[int] | None) -> int:
    return pair if places is None else places[pair]


def _fates(found: Diagnosis, places: Sequence[int] | None) -> dict[str, Any]:
    """Each pair as a point: Δ log π(y−) across, Δ log π(y+) up."""
    scale = unit(found)
    up = [float(v) * scale for v in found.scores["set_chosen"]]
    down = [float(v) * scale for v in found.scores["set_rejected"]]
    shown = [i for i in range(len(up)) if math.isfinite(up[i]) and math.isfinite(down[i])]
    x, across = axis([down[i] for i in shown], 44, 392)
    y, upwards = axis([up[i] for i in shown], 262, 8)
    zero = [next(t["at"] for t in ticks if t["text"] == "0") for ticks in (across, upwards)]
    points = [
        {"x": a, "y": b, "sign": word(up[i]), "pair": i, "row": _row(i, places),
         "text": f"y+ {signed(up[i], 2)}, y− {signed(down[i], 2)} nats"}
        for i, a, b in zip(shown, x, y, strict=True)
    ]  # fmt: skip
    return {
        "points": points, "x": across, "y": upwards, "zero": zero,
        "counts": dict(sorted(Counter(found.fate).items(), key=lambda item: -item[1])),
        "means": [
            {"name": name, "before": signed(float(found.log_probs[k].mean()), 4),
             "after": signed(float(found.log_probs[k].mean()) + sum(v) / len(v), 4),
             "change": signed(sum(v) / len(v), 2), "sign": word(sum(v))}
            for k, (name, v) in enumerate((("y+", up), ("y−", down)))
        ],
    }  # fmt: skip


def _bars(found: Diagnosis) -> list[dict[str, Any]]:
    """Mean Δ log π of y+ and of y−, by the responses that make it."""
    n, parts = len(found), _sources(found)
    shown = []
    for name, at in (("y+", slice(0, n)), ("y−", slice(n, None))):
        means = {k: float(v[at].mean()) for k, v in parts.items()}
        largest = max([abs(v) for v in means.values()] + [1e-300])
        shown.append({
            "name": name,
            "total": signed(sum(means.values()), 2),
            "rows": [
                {"name": _SOURCES[k].replace("their own", "its own"), "nats": signed(v, 2),
                 "sign": word(v), "share": 100 * abs(v) / largest}
                for k, v in means.items()
            ],
        })  # fmt: skip
    return shown


def _text(ids: Sequence[int], tokens: Sequence[str] | None, tokenizer: Any) -> str:
    if tokenizer is not None:
        return str(tokenizer.decode(list(ids)))
    return "".join(tokens) if tokens is not None else " ".join(map(str, ids))


def _table(found: Diagnosis, places: Sequence[int] | None, tokenizer: Any) -> list[dict[str, Any]]:
    """One row a pair, the most harmful first."""
    n, scale = len(found), unit(found)
    effects = _effects(found)[:n] * scale / n
    scores = dict(found.scores)
    sizes = (scores["norm_chosen"] * scores["norm_rejected"]).clamp(min=1e-300).sqrt()
    scores["cosine"] = scores["inner"] / sizes
    # The others' effect on y+ of each pair, and its on theirs: three names each.
    among = effects.clone().fill_diagonal_(0.0)
    by, on = (x.topk(min(3, n), largest=False) for x in (among, among.T))
    rows = []
    for rank, i in enumerate(found.worst(_LISTED)):
        chosen, rejected = found.pairs[i]
        values = {
            k: float(scores[k][i])
            * (scale if k in ("gives", "set_chosen", "set_rejected") else
               scale / n if k == "own_chosen" else 1.0)
            for k in _COLUMNS
        }  # fmt: skip
        prompt = _text(chosen.prompt_ids, chosen.prompt_tokens, tokenizer).strip()
        if len(prompt) > _PROMPT:
            prompt = "…" + prompt[-_PROMPT:]
        changes = (values["set_chosen"], values["set_rejected"])
        responses = []
        for k, (side, example) in enumerate((("chosen y+", chosen), ("rejected y−", rejected))):
            before = float(found.log_probs[k, i])
            responses.append({
                "name": side,
                "text": readable(_text(example.response_ids, example.tokens, tokenizer).strip(),
                                 _RESPONSE),
                "moves": f"log π {signed(before, 4)} → {signed(before + changes[k], 4)} nats, "
                f"{_count(len(example), 'token')}",
            })  # fmt: skip
        rows.append({
            "rank": rank + 1,
            "pair": i,
            "row": _row(i, places),
            "fate": [word(v) for v in changes],
            "values": [
                {"name": k, "value": v if math.isfinite(v) else 0.0, "text": signed(v, 2),
                 "sign": "" if k in ("cosine", "valley") else word(v)}
                for k, v in values.items()
            ],
            "prompt": readable(prompt),
            "responses": responses,
            "links": [
                {"name": name, "to": [
                    {"pair": j, "row": _row(j, places), "nats": signed(v, 2)}
                    for j, v in zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
                    if v < 0
                ]}
                for name, top in (("y+ is pulled down most by", by),
                                  ("pulls down most the y+ of", on))
            ],
        })  # fmt: skip
    return rows


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
        "views": [
            {"name": "alike", **packed(cosine, 1.0)},
            {"name": "effect", **packed(effect, largest)},
        ],
    }


def _closeup(number: int, closeup: CloseUp, places: Sequence[int] | None) -> dict[str, Any]:
    dec, flow = closeup.decomposition, closeup.flow
    positions: list[dict[str, Any]] = []
    for m, token in enumerate(flow.tokens):
        real = flow.measured
        moved = {k: float(getattr(real, k)[m]) for k in ("label", "argmax", "top", "rest")}
        positions.append({
            "token": visible(token, 18),
            "star": visible(flow.text_of(int(flow.argmax[m])), 18),
            "before": f"{float(flow.log_probs[m, flow.labels[m]].exp()):.2g}",
            **moved,
        })  # fmt: skip
    largest = max([abs(p[k]) for p in positions for k in ("label", "argmax", "top", "rest")])
    order = sorted(range(len(positions)), key=lambda m: positions[m]["label"])[:12]
    return {
        "number": number,
        "row": _row(closeup.pair, places),
        "pair": closeup.pair,
        "tokens": token_data(dec),
        "names": [printable(o.name) for o in dec],
        "flow": [
            {**positions[m], "bars": [
                {"name": name, "nats": signed(positions[m][k], 2), "sign": word(positions[m][k]),
                 "share": 100 * abs(positions[m][k]) / (largest or 1.0)}
                for k, name in (("label", "the token itself"), ("argmax", "likeliest other"),
                                ("top", "next nine"), ("rest", "all the rest"))
            ]}
            for m in order
        ],
        "positions": len(positions),
    }  # fmt: skip


def _objectives(found: Diagnosis) -> list[dict[str, Any]]:
    rows = found.objectives()
    largest = max([abs(r[k]) for r in rows for k in ("chosen", "rejected")] + [1e-300])
    return [
        {**row, "mine": row["objective"] == found.objective, "bars": [
            {"sign": word(row[k]), "text": signed(row[k], 2), "share": 100 * abs(row[k]) / largest}
            for k in ("chosen", "rejected")
        ]}
        for row in sorted(rows, key=lambda r: (r["chosen_falls"], -r["chosen"]))
    ]  # fmt: skip
