"""Watching a trainer of TRL with one line; the probes come from its own prepared data.

lddyn.integrations.trl.watch(trainer)
trainer.train()

`weighted` lets a trainer of preferences, rewards or SFT read a column of row weights.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.data.columns import PREPARED_PAIRS
from lddyn.data.encode import cut_to_length
from lddyn.data.example import Example
from lddyn.data.options import DEFAULT, RowOptions
from lddyn.errors import ExampleError
from lddyn.integrations.trainer import LearningDynamicsCallback
from lddyn.integrations.watcher import Probes
from lddyn.integrations.weights import weighted

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["pairs", "watch", "weighted"]


def watch(
    trainer: Trainer,
    probes: Probes | None = None,
    *,
    every: int | None = None,
    budget: float | str = "5%",
    predict: int = 0,
    prompts: int = 64,
    folder: str | Path | None = None,
) -> LearningDynamicsCallback:
    """Add a `LearningDynamicsCallback` to a trainer; it replaces one for the same folder.

    Args:
        trainer: TRL's DPOTrainer or SFTTrainer, or transformers' Trainer.
        probes: What to watch. None: pairs of a DPOTrainer's own training set (see `pairs`).
        every: As in `LearningDynamicsCallback`.
        budget: As in `LearningDynamicsCallback`.
        predict: As in `LearningDynamicsCallback`.
        prompts: Most prompts, of the training set or of a `ProbeSet`.
        folder: As in `LearningDynamicsCallback`.

    Returns:
        The callback, already added.

    Raises:
        ValueError: If `probes` is None and the training set does not hold prepared pairs.
    """
    if probes is None:
        probes = pairs(
            trainer.train_dataset,
            prompts,
            trainer.args.seed,
            RowOptions(
                max_length=getattr(trainer.args, "max_length", None),
                truncation_mode=getattr(trainer.args, "truncation_mode", "keep_start"),
            ),
        )
    callback = LearningDynamicsCallback(
        probes,
        every=every,
        budget=budget,
        predict=predict,
        prompts=prompts,
        folder=folder,
        trainer=trainer,
    )
    for other in list(trainer.callback_handler.callbacks):
        is_ours = isinstance(other, LearningDynamicsCallback)
        if is_ours and other.fixed_folder == callback.fixed_folder:
            trainer.remove_callback(other)  # a notebook's cell run again: two would mix their rows
    trainer.add_callback(callback)
    return callback


def pairs(
    dataset: Sequence[Mapping[str, Any]],
    limit: int = 64,
    seed: int = 0,
    options: RowOptions = DEFAULT,
) -> dict[str, list[Example]]:
    """Probes from the rows of a prepared preference set, with the token ids that TRL trains on.

    Args:
        dataset: `trainer.train_dataset` of a DPOTrainer.
        limit: Most rows.
        seed: Seed of the choice of rows.
        options: How long sequences are cut, as the trainer's collator does.

    Returns:
        Examples by type: "chosen", "rejected", and "irr_train", the chosen response of another
        row. A row whose prompt or response is cut away has no example.

    Raises:
        ValueError: If the rows have other columns, are streamed, or there is none.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError("the training set is streamed, its rows cannot be picked: give probes=...")
    if len(dataset) == 0:
        raise ValueError("the training set is empty: give probes=...")
    columns = set(dataset.column_names if hasattr(dataset, "column_names") else dataset[0])
    names = next((c for c in PREPARED_PAIRS if columns.issuperset(c)), None)
    if names is None:
        raise ValueError(
            f"expected a prepared preference set with columns {', '.join(PREPARED_PAIRS[0])}, got "
            f"{', '.join(sorted(columns))}: give probes=..."
        )
    generator = random.Random(f"lddyn pairs {seed}")
    picked = sorted(generator.sample(range(len(dataset)), min(limit, len(dataset))))
    rows = [dataset[i] for i in picked]
    prompt, chosen, rejected = names
    probes: dict[str, list[Example]] = {"chosen": [], "rejected": [], "irr_train": []}
    for i, row in enumerate(rows):
        responses = {"chosen": row[chosen], "rejected": row[rejected]}
        if len(rows) > 1:
            responses["irr_train"] = rows[(i + 1) % len(rows)][chosen]
        for name, ids in responses.items():
            try:
                left, right = cut_to_length(row[prompt], ids, options, name)
            except ExampleError:
                continue  # no prompt or no response is left
            if left and right:
                probes[name].append(Example(tuple(left), tuple(right), name=name))
    return {name: examples for name, examples in probes.items() if examples}
