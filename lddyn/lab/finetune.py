"""A finetuning run of an experiment: its recipe, its batches, its measurements, its states."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from lddyn.data.example import Example
from lddyn.lab.curves import Curves
from lddyn.lab.kernel_norms import kernel_norms, some_tokens
from lddyn.lab.record import Lab, Row
from lddyn.lab.setting import Setting, one_thread
from lddyn.lab.tracker import Tracker
from lddyn.lab.training import Explained, Explanations, TrainingLoss, train
from lddyn.optimizers import make_optimizer
from lddyn.probes.probe_set import Encoded

KERNEL_RTOL = 0.15  # relative standard error of ‖K‖_F
M = TypeVar("M", bound=nn.Module)
PAPER_LR = 5e-7


@dataclass(frozen=True)
class Recipe:
    """How a run trains and what is watched on the way.

    Attributes:
        loss: What is minimised.
        updates: Number of steps.
        lr: Of the optimizer.
        optimizer: "rmsprop" (the paper's) or another of torch's.
        batch: Rows per update.
        every: Updates between probe passes.
        explain: Updates that are explained.
        kernel: Updates before which ‖K‖_F is measured.
        keep: Updates before which the model is saved.
    """

    loss: TrainingLoss
    updates: int
    lr: float
    optimizer: str = "rmsprop"
    batch: int = 4
    every: int = 10
    explain: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()


def spread(last: int, count: int) -> tuple[int, ...]:
    """`count` whole numbers, evenly spaced from 0 to `last`, each once."""
    return tuple(np.unique(np.linspace(0, last, count).round().astype(int)).tolist())


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


@dataclass
class _Watch:
    """What is recorded while a run trains; its methods are called by `train`."""

    lab: Lab
    name: str
    recipe: Recipe
    probes: Encoded
    tracker: Tracker
    kernel_prompts: int
    kernel_tokens: int
    explained: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)
    kernel_seconds: float = 0.0

    def observe(self, update: int, model: nn.Module) -> None:
        """Measures probes and K and saves the model, where this update is due."""
        self.tracker(update, model)
        last = update == self.recipe.updates
        if update in self.recipe.keep or last:
            _save(self.lab, self.name, update, model, last)
        if update in self.recipe.kernel:
            start = time.process_time()
            for prompt in range(self.kernel_prompts):
                rows = _kernels(model, self.probes, prompt, self.kernel_tokens, self.lab.seed)
                self.kernels.extend({"update": update, "prompt": prompt, **row} for row in rows)
            self.kernel_seconds += time.process_time() - start

    def receive(self, step: Explained) -> None:
        """Keeps an explained update."""
        self.explained.append(
            {
                "update": step.update,
                "predicted": {k: v.tolist() for k, v in step.predicted.items()},
                "measured": step.measured.tolist(),
            }
        )

    def results(self, losses: Sequence[float], seconds: float) -> Row:
        """All of it, as JSON can hold it."""
        means = {
            key: np.nanmean(self.tracker.grids(key, per_token=True), axis=1)
            for key in ("log_prob", "greedy", "rest", "entropy", "peakiness", "energy")
        }
        return {
            "updates": self.tracker.updates,
            "fields": self.probes.fields,
            "log_prob": self.tracker.grids("log_prob").round(5).tolist(),
            "greedy": self.tracker.grids("greedy").round(5).tolist(),
            "means": {k: v.round(6).tolist() for k, v in means.items()},
            "losses": list(losses),
            "explained": self.explained,
            "kernel": self.kernels,
            "seconds": {
                "all": seconds,
                "probes": self.tracker.seconds,
                "kernel": self.kernel_seconds,
                "passes": len(self.tracker.updates),
            },
        }


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
    """Trains the model and measures it; a step of the experiment, with its last state saved.

    Args:
        lab: Keeps the result as train-NAME, and states in checkpoints/.
        name: Of the run.
        setting: Its probing set is measured.
        model: Changed in place, unless the run was made before.
        rows: What is learned, by term.
        recipe: How.
        reference: π_ref.
        order: Runs with the same word see the rows in the same order.
        explained_prompts: Probing prompts for which updates are explained.
        kernel_prompts: Probing prompts for which K is measured, learning y+.
        kernel_tokens: Evenly spaced tokens of each response between which K is measured.
    """
    probes = setting.encode(setting.probes, setting.fields)
    some = probes.select(range(min(explained_prompts, len(setting.probes))))

    def make() -> Row:
        tracker = Tracker(probes, recipe.every, recipe.updates)
        watch = _Watch(lab, name, recipe, probes, tracker, kernel_prompts, kernel_tokens)
        start = time.process_time()
        losses = train(
            model,
            batches(rows, recipe.updates, recipe.batch, lab.generator(order)),
            recipe.loss,
            make_optimizer(recipe.optimizer, model.parameters(), recipe.lr),
            reference=reference,
            warmup=min(10, recipe.updates // 4),
            observe=watch.observe,
            explanations=Explanations(recipe.explain, some, watch.receive),
            bar=lambda items: lab.bar(items, name, recipe.updates),
        )
        results = watch.results(losses, time.process_time() - start)
        types = [some.fields[column] for column in some.cells[:, 1].tolist()]
        return {**results, "explained types": types}

    with one_thread():
        raw = lab.once(f"train-{name}", make)
        checkpoint(lab, name, model)
    return Curves.of(raw)


def _kernels(model: nn.Module, probes: Encoded, prompt: int, tokens: int, seed: int) -> list[Row]:
    """‖K‖_F from the chosen response of one prompt to all its response types."""
    own = probes.select([prompt])
    observed = {e.name: some_tokens(e, tokens) for e in own.examples}
    rows = kernel_norms(model, observed["chosen"], observed, rtol=KERNEL_RTOL, seed=seed)
    return [{k: v if isinstance(v, str) else float(f"{v:.6g}") for k, v in r.items()} for r in rows]


def _save(lab: Lab, name: str, update: int, model: nn.Module, last: bool) -> None:
    weights = dict(model.named_parameters())  # a tied weight once
    weights |= {n: x for n, x in model.state_dict().items() if n in dict(model.named_buffers())}
    lab.keep_tensors("checkpoints", f"{name}-{update}", weights)
    if last:
        lab.keep_tensors("checkpoints", name, weights)


def checkpoint(lab: Lab, name: str, model: M) -> M:
    """The model with the weights that a run ended with ("NAME") or passed ("NAME-UPDATE")."""
    tensors = lab.tensors("checkpoints", name)
    absent = {n for n, _ in model.named_parameters()} - tensors.keys()
    if absent:
        raise ValueError(f"checkpoint {name}: no weights for {sorted(absent)[:3]}")
    model.load_state_dict(tensors, strict=False)
    return model.eval()
