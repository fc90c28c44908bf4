"""What the experiments with language models share: where they start from, and one watched run.

By default model and data are the demo's: a tiny Llama, pretrained here, and preference pairs with
every response type. A model and a file of rows in the authors' format by flag.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lddyn.data.example import Example
from lddyn.demo import world as demo
from lddyn.files import canonical, digest_of
from lddyn.lab.dynamics import Explained, Loss, Tracker, kernel_norms, some_tokens, train
from lddyn.lab.record import Lab
from lddyn.optimizers import make_optimizer
from lddyn.probes.build import build
from lddyn.probes.probe_set import TYPES, Encoded, ProbeSet
from lddyn.store.identity import identify

__all__ = [
    "PAPER_LR",
    "Curves",
    "Recipe",
    "Setting",
    "batches",
    "checkpoint",
    "embedded",
    "finetune",
    "load",
    "one_thread",
]

PAPER_LR = 5e-7
# The demo's 500 steps leave the model sure of every answer that it is to learn; after 100 of them
# it speaks the language, and its beliefs still move.
_PRETRAINING = 100

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

    def encode(self, rows: ProbeSet, fields: Sequence[str]) -> Encoded:
        """Rows with the setting's tokenizer, within the model's positions."""
        room = getattr(self.model.config, "max_position_embeddings", None) or 512
        most = min(512, room)
        return rows.encode(
            self.tokenizer, fields=fields, max_length=most, max_prompt_length=most // 2
        )

    def pairs(self, rows: ProbeSet, fields: Sequence[str]) -> list[dict[str, Example]]:
        """Rows that have all of these responses, encoded."""
        encoded = self.encode(rows, fields)
        found: dict[int, dict[str, Example]] = {}
        for (row, column), example in zip(encoded.cells.tolist(), encoded.examples, strict=True):
            found.setdefault(row, {})[fields[column]] = example
        return [pair for pair in found.values() if len(pair) == len(fields)]


def must_be_positive(**options: float) -> None:
    """Raises a ValueError for the first option that is not; called before anything is written."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


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
        ValueError: If one of model and data is given without the other, there are too few rows, or
            the experiment's folder was made with other weights or rows.
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
    texts = digest_of(canonical([dict(row) for row in everything.rows]))
    lab.reads(**identify(base, tokenizer, texts=texts))
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
    with one_thread():
        world = demo.build_world(seed=seed, progress=progress, steps=_PRETRAINING)
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


# ---------------------------------------------------------------------------------------------
# One run


@dataclass(frozen=True)
class Recipe:
    """How a run trains and what is watched on the way.

    Attributes:
        loss: Of dynamics.
        updates: Number of steps.
        lr: Of the optimizer.
        optimizer: "rmsprop" (the paper's) or another of torch's.
        batch: Rows per update.
        every: Updates between probe passes.
        explain: Updates that are taken apart.
        kernel: Updates before which ‖K‖_F is measured.
        keep: Updates before which the model is saved.
    """

    loss: Loss
    updates: int
    lr: float
    optimizer: str = "rmsprop"
    batch: int = 4
    every: int = 10
    explain: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Curves:
    """What a run's tracker found, from its step's JSON.

    Attributes:
        updates: When, (T,).
        fields: F types.
        log_prob: (T, P, F) nats, sums over tokens; NaN where there is no such response.
        greedy: (T, P, F), Σ log max π along the teacher-forced prefix.
        means: Per token, mean over prompts: "log_prob", "greedy", "rest", "entropy", "peakiness",
            "energy", each (T, F).
        raw: Everything that was kept.
    """

    updates: list[int]
    fields: tuple[str, ...]
    log_prob: np.ndarray
    greedy: np.ndarray
    means: dict[str, np.ndarray]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Curves:
        """From `finetune`."""
        return cls(
            list(raw["updates"]),
            tuple(raw["fields"]),
            np.array(raw["log_prob"], dtype=float),
            np.array(raw["greedy"], dtype=float),
            {k: np.array(v, dtype=float) for k, v in raw["means"].items()},
            raw,
        )

    def column(self, name: str) -> int:
        """Of a type."""
        return self.fields.index(name)

    def change(self, name: str, kind: str = "log_prob") -> np.ndarray:
        """Last minus first, per prompt (P,)."""
        values = getattr(self, kind)[:, :, self.column(name)]
        moved: np.ndarray = values[-1] - values[0]
        return moved

    def mean(self, name: str, kind: str = "log_prob") -> np.ndarray:
        """Mean over prompts, (T,)."""
        found: np.ndarray = np.nanmean(getattr(self, kind)[:, :, self.column(name)], axis=1)
        return found

    def rows(self, run: str) -> list[dict[str, Any]]:
        """For a table: one row per update and type."""
        return [
            {
                "run": run,
                "update": update,
                "type": name,
                "log_prob": round(float(np.nanmean(self.log_prob[t, :, f])), 4),
                "greedy": round(float(np.nanmean(self.greedy[t, :, f])), 4),
                **{f"{k} per token": round(float(v[t, f]), 5) for k, v in self.means.items()},
            }
            for t, update in enumerate(self.updates)
            for f, name in enumerate(self.fields)
        ]


def batches(
    rows: Sequence[Mapping[str, Example]], updates: int, size: int, generator: torch.Generator
) -> list[dict[str, list[Example]]]:
    """Rows in a random order, epoch after epoch."""
    order: list[int] = []
    made = []
    for _ in range(updates):
        if len(order) < size:
            order = [*torch.randperm(len(rows), generator=generator).tolist(), *order]
        at = [order.pop() for _ in range(size)]
        made.append({name: [rows[i][name] for i in at] for name in rows[0]})
    return made


def finetune(
    lab: Lab,
    name: str,
    setting: Setting,
    model: nn.Module,
    rows: Sequence[Mapping[str, Example]],
    recipe: Recipe,
    *,
    reference: nn.Module | None = None,
    order: str = "order",
    explained_prompts: int = 6,
    kernel_prompts: int = 2,
    kernel_tokens: int = 6,
) -> Curves:
    """Trains the model, watched; a step of the experiment, with its last state saved.

    Args:
        lab: Keeps the result as train-NAME, and states in checkpoints/.
        name: Of the run.
        setting: Whose probes are watched.
        model: Changed in place, unless the run was made before.
        rows: What is learned, by term.
        recipe: How.
        reference: π_ref.
        order: Runs with the same word see the rows in the same order.
        explained_prompts: Probing prompts for which updates are taken apart.
        kernel_prompts: Probing prompts for which K is measured, learning y+.
        kernel_tokens: Evenly spaced tokens of each response that K is taken between.
    """
    probes = setting.encode(setting.probes, setting.fields)
    some = probes.select(range(min(explained_prompts, len(setting.probes))))

    def make() -> dict[str, Any]:
        tracker = Tracker(probes, recipe.every, recipe.updates)
        parts: list[dict[str, Any]] = []
        kernels: list[dict[str, Any]] = []
        seconds = {"kernel": 0.0, "explained": 0.0}

        def observe(update: int, now: nn.Module) -> None:
            tracker(update, now)
            if update in recipe.keep or update == recipe.updates:
                _save(lab, name, update, now, last=update == recipe.updates)
            if update in recipe.kernel:
                start = time.process_time()
                for prompt in range(kernel_prompts):
                    found = _kernels(now, probes, prompt, kernel_tokens, lab.seed)
                    kernels.extend({"update": update, "prompt": prompt, **row} for row in found)
                seconds["kernel"] += time.process_time() - start

        def explained(step: Explained) -> None:
            parts.append(
                {
                    "update": step.update,
                    "predicted": {k: v.tolist() for k, v in step.predicted.items()},
                    "measured": step.measured.tolist(),
                }
            )

        generator = lab.generator(order)
        start = time.process_time()
        losses = train(
            model,
            batches(rows, recipe.updates, recipe.batch, generator),
            recipe.loss,
            make_optimizer(recipe.optimizer, model.parameters(), recipe.lr),
            reference=reference,
            warmup=min(10, recipe.updates // 4),
            observe=observe,
            explain=recipe.explain,
            probes=some,
            explained=explained,
            bar=lambda items: lab.bar(items, name, recipe.updates),
        )
        whole = time.process_time() - start
        means = {
            key: np.nanmean(tracker.grids(key, per_token=True), axis=1)
            for key in ("log_prob", "greedy", "rest", "entropy", "peakiness", "energy")
        }
        return {
            "updates": tracker.updates,
            "fields": probes.fields,
            "log_prob": tracker.grids("log_prob").round(5).tolist(),
            "greedy": tracker.grids("greedy").round(5).tolist(),
            "means": {k: v.round(6).tolist() for k, v in means.items()},
            "losses": losses,
            "explained": parts,
            "explained types": [some.fields[j] for j in some.cells[:, 1].tolist()],
            "kernel": kernels,
            "seconds": {
                "all": whole,
                "probes": tracker.seconds,
                "kernel": seconds["kernel"],
                "passes": len(tracker.updates),
            },
        }

    with one_thread():
        raw = lab.once(f"train-{name}", make)
        checkpoint(lab, name, model)
    return Curves.of(raw)


def _kernels(
    model: nn.Module, probes: Encoded, prompt: int, tokens: int, seed: int
) -> list[dict[str, Any]]:
    """‖K‖_F from the chosen response of one prompt to all its response types."""
    own = probes.select([prompt])
    observed = {e.name: some_tokens(e, tokens) for e in own.examples}
    rows = kernel_norms(model, observed["chosen"], observed, rtol=0.15, seed=seed)
    return [{k: v if isinstance(v, str) else float(f"{v:.6g}") for k, v in r.items()} for r in rows]


def _save(lab: Lab, name: str, update: int, model: nn.Module, last: bool) -> None:
    from safetensors.torch import save_model

    save_model(model, str(lab.path("checkpoints", f"{name}-{update}.safetensors")))
    if last:
        save_model(model, str(lab.path("checkpoints", f"{name}.safetensors")))


def checkpoint(lab: Lab, name: str, model: nn.Module) -> nn.Module:
    """The model with the weights that a run ended with ("NAME") or passed ("NAME-UPDATE")."""
    from safetensors.torch import load_model

    load_model(model, str(lab.path("checkpoints", f"{name}.safetensors")))
    return model.eval()
