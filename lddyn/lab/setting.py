"""What the experiments with language models start from: a model, rows to learn, a probing set.

By default both are the demo's: a tiny Llama, pretrained here, and preference pairs with every
response type. A model and a file of rows in the authors' format by flag.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lddyn import demo
from lddyn.lab.record import Lab
from lddyn.probes import TYPES, ProbeSet, build

__all__ = ["Setting", "embedded", "load", "one_thread"]

# The rephrased samples are junk of small models, and the authors do not track them either.
UNTRACKED = ("chosen_selfr",)


@dataclass(frozen=True)
class Setting:
    """A starting point.

    Attributes:
        model: theta_0, in evaluation mode.
        tokenizer: Its tokenizer.
        train: Rows that are learned; the first of them are the probes.
        test: Rows with other prompts.
        probes: All response types of some training prompts.
        title: In one line.
    """

    model: Any
    tokenizer: Any
    train: ProbeSet
    test: ProbeSet
    probes: ProbeSet
    title: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The types that are tracked."""
        return tuple(name for name in self.probes.fields if name not in UNTRACKED)

    def fresh(self) -> Any:
        """A copy of the model to train."""
        return copy.deepcopy(self.model)


def load(
    lab: Lab, model: str | None, data: str | None, *, rows: int, prompts: int, held_out: float = 0.2
) -> Setting:
    """The demo's world, or a model and a file of the user's.

    Args:
        lab: The experiment; the probing set is one of its steps.
        model: Name or folder of a causal LM of transformers. None: the demo's.
        data: A probing set in the authors' format. None: the demo's.
        rows: How many rows are read.
        prompts: How many of the training rows are probes.
        held_out: Share of the prompts that is kept for the test.

    Raises:
        ValueError: If one of model and data is given without the other, or there are too few rows.
    """
    if (model is None) != (data is None):
        raise ValueError("--model and --data belong together: give both, or neither")
    if model is None or data is None:
        base, tokenizer, all_rows, title = embedded(lab.seed, lab.progress)
        everything = ProbeSet(all_rows.rows[:rows])
    else:
        base, tokenizer = _pretrained(model)
        everything = ProbeSet.read(data, limit=rows)
        title = f"{model.rstrip('/').rpartition('/')[2]} on {data.rpartition('/')[2]}"
    train, test = everything.split(held_out, lab.seed)
    if len(train) < prompts:
        raise ValueError(f"{prompts} prompts are to be probes, but only {len(train)} rows train")

    def probes() -> list[dict[str, str]]:
        made = build(
            train.rows[:prompts], test.rows, model=base, tokenizer=tokenizer, seed=lab.seed
        )
        return [{k: v for k, v in row.items() if k in ("prompt", *TYPES)} for row in made.rows]

    with one_thread():
        return Setting(base, tokenizer, train, test, ProbeSet(lab.once("probes", probes)), title)


def embedded(seed: int, progress: bool) -> tuple[Any, Any, ProbeSet, str]:
    """The demo's model, tokenizer and rows."""
    world = demo.build_world(seed=seed, progress=progress)
    pairs = world.preference_pairs
    # A sentence that a human wrote about something else: another row's question.
    questions = [row["prompt"].removeprefix("Human: ").partition("\n")[0] for row in pairs]
    shift = len(pairs) // 2
    rows = [
        {**row, "irr_hum": f" {questions[(i + shift) % len(pairs)]}"} for i, row in enumerate(pairs)
    ]
    return world.model, world.tokenizer, ProbeSet(rows), "the demo's Llama and small talk"


def _pretrained(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small are faster on one thread, and the same bits on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
