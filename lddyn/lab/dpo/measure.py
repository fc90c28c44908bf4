"""Measurements beside the DPO runs: sampled pairs, and the mass of y− in single steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from lddyn import encode
from lddyn.data.example import Example
from lddyn.errors import EmptyResponseError
from lddyn.lab.finetune import batches
from lddyn.lab.mass import (
    mass_by_place,
    measured_flows,
    predicted_flows,
)
from lddyn.lab.record import Lab, Row
from lddyn.lab.setting import Setting
from lddyn.lab.training import Batch, Explained, Explanations, Preferring, train
from lddyn.objectives.loss import Loss
from lddyn.optimizers import Direction, make_optimizer
from lddyn.probes.build import sample
from lddyn.probes.probe_set import Encoded

LOSS = Preferring(Loss("dpo", beta=0.1))


def sampled_pairs(lab: Lab, setting: Setting, model: nn.Module, most: int) -> list[dict[str, str]]:
    """Two samples per prompt; preferred is the one with more words of the data's answer."""
    prompts = [row["prompt"] for row in setting.train.rows]
    both = [
        sample(
            model,
            setting.tokenizer,
            prompts,
            max_new_tokens=most,
            generator=lab.generator("sample", k),
        )
        for k in range(2)
    ]
    made = []
    for row, one, two in zip(setting.train.rows, *both, strict=True):
        scores = [_overlap(text, row["chosen"]) for text in (one, two)]
        if scores[0] != scores[1] and one.strip() and two.strip():
            better, worse = (one, two) if scores[0] > scores[1] else (two, one)
            made.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return made


def _overlap(text: str, truth: str) -> float:
    """F1 of the two sets of words."""
    one, two = set(text.split()), set(truth.split())
    return 2 * len(one & two) / max(1, len(one) + len(two))


def encoded_pairs(setting: Setting, rows: Sequence[Mapping[str, str]]) -> list[dict[str, Example]]:
    """The sampled pairs as token sequences; pairs with an empty response are left out.

    Raises:
        ValueError: If fewer than four are left.
    """
    made = []
    for row in rows:
        try:
            made.append(
                {
                    term: encode(
                        setting.tokenizer,
                        row["prompt"],
                        row[term],
                        name=term,
                        max_length=512,
                        max_prompt_length=256,
                    )
                    for term in ("chosen", "rejected")
                }
            )
        except EmptyResponseError:
            continue
    if len(made) < 4:
        raise ValueError(f"only {len(made)} sampled pairs differ: use more rows")
    return made


def mass_of_steps(
    lab: Lab,
    setting: Setting,
    model: nn.Module,
    pairs: Sequence[Mapping[str, Example]],
    steps: int = 6,
    lr: float = 1e-3,
    positions: int = 16,
) -> list[Row]:
    """Single SGD steps on 4 pairs: where the mass of their y− went, by position and in all.

    Predicted to first order, by the y+ and the y− term, and measured; position −1 is the sum.
    """
    probes = setting.encode(setting.probes, ("rejected",)).select(range(1))
    sums: dict[tuple[str, int], list[dict[str, float]]] = {}
    for batch in batches(pairs, steps, 4, lab.generator("mass")):
        stepped, directions = one_step(model, batch, lr, probes)
        examples = list(batch["rejected"])
        flows = predicted_flows(model, examples, directions)
        flows["measured"] = measured_flows(model, stepped, examples)
        for name, each in flows.items():
            for flow in each:
                sums.setdefault((name, -1), []).append(mass_by_place(flow))
                for k in range(min(positions, len(flow.label))):
                    place = mass_by_place(flow, slice(k, k + 1))
                    sums.setdefault((name, k), []).append(place)
    return [
        {
            "kind": name,
            "position": k,
            "responses": len(group),
            **{key: float(np.mean([g[key] for g in group])) for key in group[0]},
        }
        for (name, k), group in sums.items()
    ]


def one_step(
    model: nn.Module, batch: Batch, lr: float, probes: Encoded
) -> tuple[nn.Module, dict[str, Direction]]:
    """One SGD step of DPO on a copy of the model: the copy, and Δθ in all and by term."""
    explained: list[Explained] = []
    stepped = copy.deepcopy(model)
    train(
        stepped,
        [batch],
        LOSS,
        make_optimizer("sgd", stepped.parameters(), lr),
        reference=model,
        explanations=Explanations({0}, probes, explained.append),
    )
    terms = explained[0].directions
    whole = {name: terms["chosen"][name] + terms["rejected"][name] for name in terms["chosen"]}
    return stepped, {
        "predicted": whole,
        "predicted, y+ term": terms["chosen"],
        "predicted, y− term": terms["rejected"],
    }
