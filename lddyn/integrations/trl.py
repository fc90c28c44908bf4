"""TRL's trainers: one line to watch a run, with probes from the data that the trainer prepared.

lddyn.integrations.trl.watch(trainer)
trainer.train()
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lddyn.data.example import Example
from lddyn.integrations.trainer import LearningDynamicsCallback
from lddyn.integrations.watcher import Probes

__all__ = ["pairs", "watch"]

# (prompt, chosen, rejected) as TRL 1.x and 0.24 name the columns of a prepared dataset.
_COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)


def pairs(
    dataset: Any,
    limit: int = 64,
    seed: int = 0,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> dict[str, list[Example]]:
    """Probes from the rows of a prepared preference set, tokens as the trainer has them.

    Args:
        dataset: `trainer.train_dataset` of a DPOTrainer.
        limit: Most rows.
        seed: Which rows, and whose chosen response stands beside whose prompt.
        max_length: Tokens of prompt and response at which the trainer's collator cuts. None: not.
        truncation_mode: What it keeps: "keep_start" or "keep_end".

    Returns:
        "chosen", "rejected", and "irr_train": the chosen response of another row. An example per
        row each, but those of which the cut leaves no prompt or no response.

    Raises:
        ValueError: If the rows have other columns, or are streamed.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError("the training set is streamed, its rows cannot be picked: give probes=...")
    if len(dataset) == 0:
        raise ValueError("the training set is empty: give probes=...")
    columns = set(dataset.column_names if hasattr(dataset, "column_names") else dataset[0])
    names = next((c for c in _COLUMNS if columns.issuperset(c)), None)
    if names is None:
        raise ValueError(
            f"expected a prepared preference set with columns {', '.join(_COLUMNS[0])}, got "
            f"{', '.join(sorted(columns))}: give probes=..."
        )
    generator = random.Random(f"lddyn pairs {seed}")
    rows: list[Mapping[str, Any]] = [
        dataset[i] for i in sorted(generator.sample(range(len(dataset)), min(limit, len(dataset))))
    ]
    prompt, chosen, rejected = names
    found: dict[str, list[Example]] = {"chosen": [], "rejected": [], "irr_train": []}
    for i, row in enumerate(rows):
        responses = {"chosen": row[chosen], "rejected": row[rejected]}
        if len(rows) > 1:
            responses["irr_train"] = rows[(i + 1) % len(rows)][chosen]
        for name, ids in responses.items():
            whole = [*row[prompt], *ids]
            kept = whole[:max_length]
            if truncation_mode == "keep_end" and max_length is not None:
                kept = whole[-max_length:]
            start = len(row[prompt])
            if truncation_mode == "keep_end":
                start -= len(whole) - len(kept)
            if 0 < start < len(kept):
                found[name].append(Example(tuple(kept[:start]), tuple(kept[start:]), name=name))
    return {name: examples for name, examples in found.items() if examples}


def watch(
    trainer: Any, probes: Probes | None = None, *, prompts: int = 64, **options: Any
) -> LearningDynamicsCallback:
    """Adds a `LearningDynamicsCallback` to a trainer, in the place of one for the same folder.

    Args:
        trainer: TRL's DPOTrainer, SFTTrainer, or transformers' Trainer.
        probes: What to watch. None: pairs of a DPOTrainer's own training set (see `pairs`).
        prompts: Most of them.
        options: Of `LearningDynamicsCallback`.

    Returns:
        The callback, already added.

    Raises:
        ValueError: If there are no probes and the trainer's data are no pairs.
    """
    if probes is None:
        probes = pairs(
            trainer.train_dataset,
            prompts,
            trainer.args.seed,
            max_length=getattr(trainer.args, "max_length", None),
            truncation_mode=getattr(trainer.args, "truncation_mode", "keep_start"),
        )
    callback = LearningDynamicsCallback(probes, prompts=prompts, trainer=trainer, **options)
    for other in list(trainer.callback_handler.callbacks):
        if isinstance(other, LearningDynamicsCallback) and other.given == callback.given:
            trainer.remove_callback(other)  # a notebook's cell run again: two would mix their rows
    trainer.add_callback(callback)
    return callback
