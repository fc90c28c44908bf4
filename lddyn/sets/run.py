"""A training run as transformers' Trainer makes it: its batches and its learning rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lddyn.files import naming
from lddyn.optimizers import trainer_decays
from lddyn.sets.resumed import steps_made
from lddyn.settings import Like, TrainerSettings

__all__ = ["Batch", "Run"]

OPTIMIZERS = ("adamw", "sgd")

# Schedules that read the loss of an evaluation, which nobody knows before the run.
_UNKNOWN = ("reduce_lr_on_plateau", "greedy")


class Batch(NamedTuple):
    """The pairs of one optimizer step.

    Attributes:
        pairs: Their numbers.
        weights: Weight of each pair's loss in that of the step; they sum to 1.
    """

    pairs: Tensor
    weights: Tensor


_MOST_STEPS = 10**6  # of a run


@dataclass(frozen=True, repr=False)
class Run:
    """Settings of a training run that is to be predicted.

    The order of pairs, the learning rates and the parameters that decay are those of transformers'
    Trainer, and so of TRL's trainers, on one device.

    Attributes:
        lr: Learning rate at its highest.
        epochs: Passes over the pairs; parts of a pass are rounded up to whole steps.
        batch: Pairs of one optimizer step.
        optimizer: "adamw" or "sgd".
        schedule: transformers' name of the learning rate's schedule: "constant", "linear",
            "cosine", "cosine_with_min_lr", "inverse_sqrt", "warmup_stable_decay", …
        momentum: Momentum of the gradient; Adam's β₁.
        seed: Seed of the order of pairs: `data_seed` of TrainingArguments, or else its `seed`.
        warmup: Steps over which the rate rises linearly from 0, before its schedule; below 1: the
            part of all steps. As in transformers, "constant" does not rise and
            "constant_with_warmup" does.
        max_grad_norm: Norm to which the gradient of a step is clipped; None: not clipped.
        weight_decay: Decoupled weight decay of AdamW: θ shrinks by rate · weight_decay a step.
            Biases and the weights of norms do not decay.
        accumulation: Parts of equal size into which a step's pairs are divided; the step's loss is
            the mean of the parts' means. That matters only where the last part is smaller.
        max_steps: Optimizer steps in all, instead of `epochs`.
        drop_last: Leave out a last part of an epoch that is too small.
        shuffle: Whether pairs are shuffled in each epoch.
        beta2, epsilon: Adam's β₂ and ε.
        start: Steps of the run that are made already: it is predicted from there on, with the
            batches and rates that are left.
        optimizer_state: What the optimizer remembers of steps before, see `resumed`; None: nothing.
        schedule_options: `lr_scheduler_kwargs` of TrainingArguments.

    Raises:
        ValueError: If a value is not one that training can have.

    Source: transformers 5.23, Trainer; accelerate's SeedableRandomSampler: epoch e is
    torch.randperm with the seed `seed + e`.

    Example:
        >>> import lddyn
        >>> run = lddyn.Run(lr=1e-4, epochs=2, batch=2, schedule="linear")
        >>> run
        Run(lr=0.0001, epochs=2, batch=2, schedule='linear')
        >>> [batch.pairs.tolist() for batch in run.batches(range(3))]
        [[2, 0], [1], [1, 2], [0]]
        >>> run.rates(4)
        [0.0001, 7.500000000000001e-05, 5e-05, 2.5e-05]
    """

    lr: float
    epochs: float = 1
    batch: int = 8
    optimizer: str = "adamw"
    schedule: str = "constant"
    momentum: float = 0.9
    seed: int = 0
    warmup: float = 0.0
    max_grad_norm: float | None = None
    weight_decay: float = 0.0
    accumulation: int = 1
    max_steps: int | None = None
    drop_last: bool = False
    shuffle: bool = True
    beta2: float = 0.999
    epsilon: float = 1e-8
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    optimizer_state: object = field(default=None, compare=False)

    @classmethod
    def like(cls, source: Like, seed: int | None = None) -> Run:
        """The run that a trainer with these settings makes, on one device.

        Args:
            source: A TRL config, a trainer, a file of arguments …: see `lddyn.TrainerSettings`.
            seed: Seed of the order of pairs. Default: the trainer's.

        Raises:
            ValueError: If lddyn does not follow the optimizer or the schedule.
        """
        settings = TrainerSettings.of(source)
        with naming(settings.file):
            return cls._of(settings, seed)

    @classmethod
    def _of(cls, settings: TrainerSettings, seed: int | None) -> Run:
        if settings.optimizer is None:
            why = [text for text in settings.remarks if text.startswith("optim=")]
            raise ValueError(" ".join(why) or "the optimizer is not followed")
        epochs, adam = settings.epochs, settings.optimizer == "adamw"
        return cls(
            settings.learning_rate,
            int(epochs) if epochs.is_integer() else epochs,
            settings.batch,
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            momentum=settings.betas[0] if adam else 0.0,
            seed=settings.seed if seed is None else seed,
            warmup=settings.warmup_ratio or float(settings.warmup_steps),
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            accumulation=settings.accumulation,
            max_steps=settings.max_steps,
            drop_last=settings.drop_last,
            shuffle=settings.shuffle,
            beta2=settings.betas[1],
            epsilon=settings.epsilon,
            schedule_options=settings.schedule_options,
        )

    def resumed(self, source: object, start: int | None = None) -> Run:
        """The rest of the run, from a checkpoint or a moment within it.

        The diagnosed model has the weights of that moment. Adam's moments move them even without a
        gradient, and scale every step.

        Args:
            source: A trainer or an optimizer of torch on the diagnosed model; an optimizer's
                `state_dict()`; a checkpoint's folder of transformers' Trainer, or its optimizer.pt.
            start: Steps that are made. Default: those of the trainer or the checkpoint, else of the
                optimizer.

        Raises:
            ValueError: If there is no state in `source`.
            FileNotFoundError: If there is no such file.

        Example:
            >>> import lddyn, torch
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = torch.optim.AdamW([weight])
            >>> weight.grad = torch.ones(2)
            >>> optimizer.step()
            >>> lddyn.Run(lr=1e-4, epochs=2, batch=2).resumed(optimizer)
            Run(lr=0.0001, epochs=2, batch=2, start=1)
        """
        made = steps_made(source) if start is None else start
        if made == 0 and start is None:
            raise ValueError(
                "the steps that are made are not known (SGD counts none), or there is none: give "
                "start="
            )
        return replace(self, start=made, optimizer_state=source)

    def without_state(self) -> Run:
        """The same run without what its optimizer remembers: its settings alone."""
        return replace(self, optimizer_state=None)

    def __post_init__(self) -> None:
        """Checks values."""
        for name in ("lr", "epochs", "momentum", "warmup", "weight_decay", "beta2", "epsilon"):
            self._check_kind(name, (int, float), "a number")
        for name in ("batch", "accumulation", "seed", "start"):
            self._check_kind(name, (int,), "a whole number")
        if self.max_steps is not None:
            self._check_kind("max_steps", (int,), "a whole number or None")
        if not math.isfinite(self.lr) or self.lr <= 0:
            still = ": with a learning rate of 0 nothing moves" if self.lr == 0 else ""
            raise ValueError(f"lr must be positive, got {self.lr}{still}")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        for name in ("batch", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.start < 0:
            raise ValueError(f"start must be a number of steps, 0 or more, got {self.start}")
        if self.batch % self.accumulation:
            raise ValueError(
                f"batch must be a multiple of accumulation, got {self.batch} pairs in "
                f"{self.accumulation} parts"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, got {self.max_steps}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        self._check_numbers()
        self.rates(2)

    def _check_kind(self, name: str, kinds: tuple[type, ...], words: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{name} must be {words}, got {value!r}")

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {self.max_grad_norm}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay is followed for optimizer 'adamw' alone, got {self.weight_decay} "
                f"for {self.optimizer!r}"
            )
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")

    def batches(self, pairs: Sequence[int]) -> list[Batch]:
        """The steps of the run from `start` on, drawn from these pairs.

        Raises:
            ValueError: If no step is left, because `drop_last` leaves out every pair, or all are
                made. Or if the run has more than a million steps.
        """
        index, size = torch.tensor(list(pairs)), self.batch // self.accumulation
        per_epoch = len(index) // size if self.drop_last else -(-len(index) // size)
        per_epoch = -(-per_epoch // self.accumulation)
        if not len(index):
            raise ValueError("a run needs a pair to train on, got none")
        if not per_epoch:
            raise ValueError(
                f"drop_last leaves no step: a part of a step has {size} pairs, and there are "
                f"{len(index)}"
            )
        steps = self.max_steps or math.ceil(self.epochs * per_epoch)
        if steps > _MOST_STEPS:
            raise ValueError(
                f"a run of {steps:,} steps is too long to be predicted, at most {_MOST_STEPS:,}: "
                "give fewer epochs or max_steps"
            )
        if self.start >= steps:
            raise ValueError(
                f"start={self.start} leaves no step: the whole run has {steps}; give more epochs, "
                "or start=0 for another run with this optimizer"
            )
        drawn: list[Batch] = []
        for epoch in itertools.count():
            if len(drawn) >= steps:
                return drawn[self.start : steps]
            order = torch.arange(len(index))
            if self.shuffle:
                order = torch.randperm(
                    len(index), generator=torch.Generator().manual_seed(self.seed + epoch)
                )
            parts = list(index[order].split(min(size, len(index))))
            if self.drop_last and len(parts[-1]) < size:
                parts.pop()
            for start in range(0, len(parts), self.accumulation):
                step = parts[start : start + self.accumulation]
                weights = [torch.full((len(p),), 1 / (len(p) * len(step))) for p in step]
                drawn.append(Batch(torch.cat(step), torch.cat(weights).double()))
        raise AssertionError  # itertools.count() does not end

    def rates(self, steps: int) -> list[float]:
        """The learning rate of every step from `start` on, from transformers' own schedule.

        Args:
            steps: Steps from `start` on.

        Raises:
            ValueError: If the schedule is unknown or depends on the loss of an evaluation.
        """
        from transformers import SchedulerType, get_scheduler

        if self.schedule in _UNKNOWN:
            raise ValueError(
                f"schedule {self.schedule!r} depends on losses that are not known before the run"
            )
        known = [kind.value for kind in SchedulerType if kind.value not in _UNKNOWN]
        if self.schedule not in known:
            raise ValueError(f"schedule must be one of {', '.join(known)}, got {self.schedule!r}")
        steps += self.start
        rise = math.ceil(steps * self.warmup) if self.warmup < 1 else int(self.warmup)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=self.lr)
        try:
            schedule = get_scheduler(
                self.schedule,
                optimizer,
                num_warmup_steps=rise,
                num_training_steps=steps,
                scheduler_specific_kwargs=dict(self.schedule_options) or None,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"schedule {self.schedule!r}: {error}") from error
        (part,) = schedule.lr_lambdas
        return [self.lr * float(part(step)) for step in range(self.start, steps)]

    def decaying(self, model: nn.Module) -> set[str]:
        """Names of the parameters that decay: all but biases and the weights of norms."""
        return trainer_decays(model) if self.weight_decay else set()

    def __repr__(self) -> str:
        """The settings that are not the defaults."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name == "lr"
            or (f.compare and f.name != "schedule_options" and getattr(self, f.name) != f.default)
        ]
        if self.schedule_options:
            shown.append(f"schedule_options={dict(self.schedule_options)}")
        return f"Run({', '.join(shown)})"
