"""What is measured after DPO: held-out pairs, greedy answers, where the mass of y− went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from lddyn.lab.curves import Curves, unrelated
from lddyn.lab.mass import (
    mass_of_run,
    shares_of_mass,
)
from lddyn.lab.record import Row
from lddyn.lab.setting import Setting
from lddyn.probes.build import sample
from lddyn.probes.measure import measure


def examine(setting: Setting, before: nn.Module, after: nn.Module, new_tokens: int) -> Row:
    """Held-out preferences, greedy answers to held-out prompts, where the mass of y− went."""
    prompts = sorted({row["prompt"] for row in setting.test.rows})
    texts = {
        when: sample(model, setting.tokenizer, prompts, max_new_tokens=new_tokens)
        for when, model in (("before", before), ("after", after))
    }
    held_out = setting.encode(setting.test, ("chosen", "rejected"))
    grids = {
        when: held_out.grid(measure(model, held_out).log_prob).numpy()
        for when, model in (("before", before), ("after", after))
    }
    margins = grids["after"] - grids["before"]
    right = margins[:, 0] > margins[:, 1]
    usable = ~np.isnan(margins).any(1)
    return {
        "right": right[usable].astype(float).tolist(),
        "mass": mass_of_run(setting, before, after),
        "degeneration": {when: degeneration(answers) for when, answers in texts.items()},
        "examples": [
            {"prompt": p, "before": a, "after": b}
            for p, a, b in zip(prompts[:3], texts["before"], texts["after"], strict=False)
        ],
    }


def degeneration(texts: Sequence[str]) -> dict[str, float]:
    """Signs of degenerate answers.

    Returns:
        "distinct 1", "distinct 2": share of different words, and pairs of words, among all of them;
        "repeated": share of a text's three-word runs that occurred in it before, mean over texts;
        "words": mean length.

    Example:
        >>> degeneration(["a b a b a b a"])["repeated"]
        0.6
    """
    words = [text.split() for text in texts]

    def distinct(n: int) -> float:
        grams = Counter(tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1))
        return len(grams) / max(1, sum(grams.values()))

    def repeated(w: Sequence[str]) -> float:
        runs = [tuple(w[i : i + 3]) for i in range(len(w) - 2)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    return {
        "distinct 1": distinct(1),
        "distinct 2": distinct(2),
        "repeated": float(np.mean([repeated(w) for w in words])) if words else 0.0,
        "words": float(np.mean([len(w) for w in words])) if words else 0.0,
    }


def summary(curves: Mapping[str, Curves], after: Mapping[str, Row]) -> list[Row]:
    """One row per run: changes of log π by DPO, and the state after it."""
    rows = []
    for name, curve in curves.items():
        shares = shares_of_mass(after[name]["mass"])
        end = after[name]["degeneration"]
        rows.append(
            {
                "run": name,
                "y+": float(np.nanmean(curve.change("chosen"))),
                "y-": float(np.nanmean(curve.change("rejected"))),
                "unrelated": float(np.nanmean(unrelated(curve))),
                "greedy": float(np.nanmean(curve.change("chosen", "greedy"))),
                "squeeze ratio": shares["likeliest other"],
                "held-out accuracy": float(np.mean(after[name]["right"])),
                "repeated": end["after"]["repeated"],
                "repeated before": end["before"]["repeated"],
                "distinct 2": end["after"]["distinct 2"],
                "distinct 2 before": end["before"]["distinct 2"],
            }
        )
    return rows
