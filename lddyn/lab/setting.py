"""Starting points of the experiments with a language model: a model, its data, a probing set.

Without a model and data of the user's they are the demo's, whose pretraining is stopped early.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lddyn.data.context import position_limit
from lddyn.data.example import Example
from lddyn.demo import world as demo
from lddyn.files import canonical, digest_of
from lddyn.lab.record import Lab
from lddyn.lab.settings import LanguageModel
from lddyn.probes.build import build
from lddyn.probes.probe_set import TYPES, Encoded, ProbeSet
from lddyn.store.identity import identify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The demo's 500 steps leave the model sure of every answer that it is to learn; after 100 of them
# it speaks the language, and its beliefs still move.
PRETRAINING = 100


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

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: ProbeSet
    test: ProbeSet
    probes: ProbeSet
    title: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The types that are tracked."""
        return tuple(name for name in self.probes.fields if name not in UNTRACKED)

    def fresh(self) -> PreTrainedModel:
        """A copy of the model to train."""
        return copy.deepcopy(self.model)

    def encode(self, rows: ProbeSet, fields: Sequence[str]) -> Encoded:
        """Rows with the setting's tokenizer, within the model's positions."""
        most = min(512, position_limit(self.model.config) or 512)
        return rows.encode(
            self.tokenizer, fields=fields, max_length=most, max_prompt_length=most // 2
        )

    def pairs(self, rows: ProbeSet, fields: Sequence[str]) -> list[dict[str, Example]]:
        """Rows that have all of these responses, encoded."""
        encoded = self.encode(rows, fields)
        pairs: dict[int, dict[str, Example]] = {}
        for (row, column), example in zip(encoded.cells.tolist(), encoded.examples, strict=True):
            pairs.setdefault(row, {})[fields[column]] = example
        return [pair for pair in pairs.values() if len(pair) == len(fields)]


def load(lab: Lab, settings: LanguageModel, held_out: float = 0.2) -> Setting:
    """The demo's world, or a model and a file of the user's.

    Args:
        lab: The experiment; the probing set is one of its steps.
        settings: Its model, data, limit and prompts.
        held_out: Fraction of the prompts that is kept for the test.

    Raises:
        ValueError: If one of model and data is given without the other, there are too few rows, or
            the experiment's folder was made with other weights or rows.
    """
    model, data = settings.model, settings.data
    if (model is None) != (data is None):
        raise ValueError("--model and --data belong together: give both, or neither")
    if model is None or data is None:
        base, tokenizer, all_rows, title = embedded(lab.seed, lab.progress)
        everything = ProbeSet(all_rows.rows[: settings.limit])
    else:
        base, tokenizer = _pretrained(model)
        everything = ProbeSet.read(data, limit=settings.limit)
        title = f"{model.rstrip('/').rpartition('/')[2]} on {data.rpartition('/')[2]}"
    texts = digest_of(canonical([dict(row) for row in everything.rows]))
    lab.reads(**identify(base, tokenizer, texts=texts))
    train, test = everything.split(held_out, lab.seed)
    if len(train) < settings.prompts:
        raise ValueError(
            f"prompts must be at most the {len(train)} training rows, got {settings.prompts}"
        )

    def probes() -> list[dict[str, str]]:
        made = build(
            train.rows[: settings.prompts],
            test.rows,
            model=base,
            tokenizer=tokenizer,
            seed=lab.seed,
        )
        return [{k: v for k, v in row.items() if k in ("prompt", *TYPES)} for row in made.rows]

    with one_thread():
        return Setting(base, tokenizer, train, test, ProbeSet(lab.once("probes", probes)), title)


def embedded(
    seed: int, progress: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ProbeSet, str]:
    """The demo's model, tokenizer and rows."""
    with one_thread():
        world = demo.build_world(seed=seed, progress=progress, steps=PRETRAINING)
    pairs = world.preference_pairs
    # A sentence that a human wrote about something else: another row's question.
    questions = [row["prompt"].removeprefix("Human: ").partition("\n")[0] for row in pairs]
    shift = len(pairs) // 2
    rows = [
        {**row, "irr_hum": f" {questions[(i + shift) % len(pairs)]}"} for i, row in enumerate(pairs)
    ]
    return world.model, world.tokenizer, ProbeSet(rows), "the demo's Llama and small talk"


def _pretrained(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread: small products are faster so, with the same bits on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
