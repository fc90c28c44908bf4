"""Measures what one negative step does at its own context and at the others; every step is real."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lddyn.lab.bigram.models import (
    KINDS,
    Bigram,
    count_bigrams,
    kernel,
    push_down,
    train,
    transitions,
    vocabulary,
)
from lddyn.lab.record import Lab, Row
from lddyn.lab.settings import Bigram as Settings
from lddyn.steps.flow import Flow, leading


def rare_pairs(counts: Tensor, number: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Pairs of a context that occurs at least 30 times and a word that never follows it."""
    unseen = ((counts == 0) & (counts.sum(1, keepdim=True) >= 30)).nonzero()
    chosen = torch.randperm(len(unseen), generator=generator)[:number]
    return [(int(c), int(y)) for c, y in unseen[chosen]]


def consequences(
    before: Tensor, after: Tensor, context: int, label: int, blocks: Tensor | None = None
) -> Row:
    """What one push did at its own context and at the others."""
    labels = torch.full((len(before),), label)
    flow = Flow.of(before, after - before, labels)
    here = torch.zeros(len(before), dtype=torch.bool)
    here[context] = True
    distance = flow.change.abs().sum(1) / 2  # total variation
    star = int(flow.leading[context, 0])
    change = flow.change[context].clone()
    change[label] = -torch.inf
    row = {
        "label before": float(before[context, label].exp()),
        "argmax before": float(before[context, star].exp()),
        "argmax change": float(flow.argmax[context]),
        "argmax rises": bool(flow.argmax[context] > 0),
        "argmax gains most": bool(flow.argmax[context] >= change.max()),  # equal ones may tie
        "others fall": float(flow.losers[context]) / (before.shape[1] - 1),
        "others lose": float(-flow.lost[context]),
        "label change": float(flow.label[context]),
        "entropy": float(flow.entropy[context]),
        "moved here": float(distance[context]),
        "moved elsewhere": float(distance[~here].sum()),
        "label falls elsewhere": float((flow.label[~here] < 0).double().mean()),
        "argmax rises elsewhere": float((flow.change[~here, star] > 0).double().mean()),
    }
    if blocks is not None:
        row["kernel rank correlation"] = _rank_correlation(blocks[context][~here], distance[~here])
    return row


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; NaN where one of the two does not vary."""
    if float(a.max() - a.min()) == 0 or float(b.max() - b.min()) == 0:
        return math.nan
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _average(rows: list[Row]) -> dict[str, float]:
    """Means over pairs, and half the width of their 95 % intervals for what is drawn."""
    means: dict[str, float] = {}
    numbers = (k for k, v in rows[0].items() if not isinstance(v, str) and "rank" not in k)
    for key in numbers:
        values = torch.tensor([float(r[key]) for r in rows], dtype=torch.float64)
        means[key] = float(values.mean())
        means[f"{key} ±"] = 1.96 * float(values.std()) / len(rows) ** 0.5
    return means


def measure_pushes(lab: Lab, settings: Settings) -> Row:
    """Trains the three models and pushes words down in each.

    Returns:
        "kernels": one row per model about K; "shown": the push of the picture; "pairs": one row per
        push; "longer": means by steps of training; "repeated": means by number of pushes; "context"
        and "label" of the picture's push.
    """
    chances = transitions(lab.generator("grammar"))
    counts = count_bigrams(chances, settings.length, lab.generator("text"))
    chosen = rare_pairs(counts, settings.pairs, lab.generator("pairs"))
    checkpoints = sorted({0, *(round(settings.steps * 2.0**-k) for k in range(9)), settings.steps})
    words, _ = vocabulary()
    # The picture's push: a context and a word that the grammar does not allow there.
    shown = (words.index("dog"), words.index("quiet"))
    result: Row = {"longer": [], "repeated": [], "kernels": [], "shown": {}, "pairs": []}
    result["context"], result["label"] = shown
    for kind in KINDS:
        model = Bigram(kind, len(counts), lab.generator("model", kind))
        states = train(model, counts, checkpoints)
        final = states[settings.steps]
        norms, about = _kernel_norms(kind, final)
        result["kernels"].append(about)
        result["shown"][kind] = _shown(final, shown, settings.strength, norms)
        for step in lab.bar(checkpoints, f"{kind}: pushes"):
            last = norms if step == settings.steps else None
            rows = _push_each(states[step], chosen, settings.strength, last)
            if last is not None:
                result["pairs"] += [{"model": kind, **row} for row in rows]
            loss = -float((counts / counts.sum() * states[step]().log_softmax(-1).detach()).sum())
            result["longer"].append({"model": kind, "steps": step, "loss": loss, **_average(rows)})
        some = chosen[: max(4, settings.pairs // 4)]
        pushes = lab.bar(range(settings.pushes + 1), f"{kind}: repeated pushes")
        for number, means in zip(pushes, _repeat(final, some, settings.strength), strict=False):
            result["repeated"].append({"model": kind, "pushes": number, **means})
    return result


def _kernel_norms(kind: str, model: Bigram) -> tuple[Tensor, Row]:
    """‖K‖_F between all contexts (C, C), and a row about K between different contexts."""
    full = kernel(model).permute(0, 2, 1, 3)
    norms = torch.linalg.matrix_norm(full)
    between = full[~torch.eye(len(full), dtype=torch.bool)]
    return norms, {
        "model": kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "entries between contexts": between.numel(),
        "nonzero": int((between != 0).sum()),
        "largest": float(between.abs().max()),
        "norm between / within": float(between.norm() / norms.diagonal().norm()),
    }


def _shown(
    model: Bigram, push: tuple[int, int], strength: float, norms: Tensor
) -> dict[str, list[list[float]]]:
    """What the picture shows of one push."""
    before = model().log_softmax(-1).detach()
    _, after = push_down(model, *push, strength)
    return {
        "kernel": norms.tolist(),
        "before": before.tolist(),
        "delta": (after - before).tolist(),
    }


def _push_each(
    model: Bigram, pairs: Sequence[tuple[int, int]], strength: float, norms: Tensor | None
) -> list[Row]:
    """The consequences of each push by itself, with the pushed words by name."""
    words, _ = vocabulary()
    before = model().log_softmax(-1).detach()
    rows = []
    for context, label in pairs:
        _, after = push_down(model, context, label, strength)
        row = consequences(before, after, context, label, norms)
        rows.append({"context": words[context], "label": words[label], **row})
    return rows


def _repeat(
    model: Bigram, pairs: Sequence[tuple[int, int]], strength: float
) -> Iterator[dict[str, float]]:
    """Means over pairs after 0, 1, 2, … pushes of the same word, without end."""
    before = model().log_softmax(-1).detach()
    moving = {pair: model for pair in pairs}
    while True:
        rows = []
        for (context, label), pushed in moving.items():
            now = pushed().log_softmax(-1).detach()
            star = int(leading(before[context][None], torch.tensor([label]), 1))
            moved = (now.exp() - before.exp()).abs().sum(1) / 2  # total variation
            rows.append(
                {
                    "argmax": float(now[context, star].exp()),
                    "label": float(now[context, label]),
                    "entropy": float(-(now[context].exp() * now[context]).sum()),
                    "moved elsewhere": float(
                        moved.sum() - (now[context].exp() - before[context].exp()).abs().sum() / 2
                    ),
                }
            )
        yield _average(rows)
        moving = {pair: push_down(pushed, *pair, strength)[0] for pair, pushed in moving.items()}
