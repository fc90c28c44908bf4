"""The arguments of one decomposition, checked and fixed; and the update at one parameter point."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.backward_check import check_pull, trust
from lddyn.engine.door import frozen_shared
from lddyn.engine.gradient import gradient
from lddyn.engine.logits import token_log_probs
from lddyn.engine.stream.moved import moved_model
from lddyn.engine.streamed import is_streamed
from lddyn.engine.trace import Trace
from lddyn.errors import NonFiniteError, UnsupportedModelError
from lddyn.objectives.like import Update, objective_like, row_remarks
from lddyn.objectives.objective import Objective
from lddyn.optimizers import (
    Step,
    check_rate,
    copy_optimizer,
    make_optimizer,
    optimizer_kind,
    optimizer_step,
    trainer_decays,
    unwrapped_optimizer,
)
from lddyn.settings import Like, TrainerSettings, router_remark
from lddyn.steps.budget import StepBudget
from lddyn.steps.rules import Rule, rule_named
from lddyn.steps.wide import prepared, wide_anatomy


@dataclass(frozen=True)
class Setup:
    """What one decomposition is made of; later changes of the caller's objects do not reach it.

    Attributes:
        anatomy: The opened model, at the parameters before the step.
        observed: Name → observed response.
        update: The objective, prepared: its reference log-probs are those before the step.
        optimizer: A copy of the optimizer with its state, over the model's parameters.
        lr: Learning rate of the step.
        max_grad_norm: Norm to which the gradient is clipped first, or None.
        rule: Name of the rule in `RULES`.
        budget: How `memory=` is divided.
        progress: Whether to show progress bars.
        remarks: What the trainer's settings ask for and the step leaves out, in sentences.
    """

    anatomy: Anatomy
    observed: dict[str, Example]
    update: Objective
    optimizer: torch.optim.Optimizer
    lr: float
    max_grad_norm: float | None
    rule: str
    budget: StepBudget
    progress: bool
    remarks: tuple[str, ...] = ()

    @property
    def quadrature(self) -> Rule:
        """The rule itself."""
        return rule_named(self.rule)

    @contextlib.contextmanager
    def shifted(self, at: float) -> Iterator[None]:
        """Says of an overflow that it happens after this part of the step, which is too large."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(
                f"after {at:.0%} of the step the model's numbers overflow: lower the learning rate "
                f"({self.lr:g}); {error}"
            ) from error

    def open(self, model: nn.Module) -> Anatomy:
        """Opens a copy of the model as the model itself was opened."""
        anatomy = Anatomy(model, self.anatomy.attention)
        trust(anatomy, self.anatomy)
        return anatomy

    def moved(self, anatomy: Anatomy, direction: Mapping[str, Tensor], at: float) -> Anatomy:
        """The model at θ + at · Δθ: a copy, or where memory is short one block of it at a time."""
        if not at:
            return anatomy
        if self.budget.copies or anatomy is not self.anatomy:
            return self.open(shifted_copy(anatomy.model, direction, at))
        return self.open(moved_model(anatomy, direction, at))


def make_setup(
    model: nn.Module | Anatomy,
    observed: Example | Sequence[Example] | Mapping[str, Example],
    update: Update,
    lr: float | None,
    optimizer: str | torch.optim.Optimizer | None,
    max_grad_norm: float | None,
    rule: str,
    memory: int | str,
    progress: bool,
    like: Like = None,
) -> Setup:
    """Checks the arguments of `decompose`, opens the model, and fixes optimizer and objective.

    Raises:
        TypeError: If the update is no Objective, or the optimizer none of torch's that are known.
        ValueError: If an argument is out of range; the message says which.
            Or memory is less than the step's vectors need.
        UnsupportedModelError: If the model cannot be opened, or streamed weights are trainable.
    """
    rule_named(rule)
    settings = None if like is None else TrainerSettings.of(like)
    if settings is None and not isinstance(update, Objective):
        raise TypeError(
            "update must be lddyn.SFT(...), DPO(...) or Objective(...), got "
            f"{type(update).__name__}"
        )
    lr = None if lr is None else check_rate(lr)
    named = named_examples(observed)
    anatomy = Anatomy.of(model)
    _refuse_streamed(anatomy.trainable)
    if settings is not None:
        update = objective_like(settings, update, anatomy)
        max_grad_norm = settings.max_grad_norm if max_grad_norm is None else max_grad_norm
        optimizer = optimizer or _trained_optimizer(settings, anatomy)
        lr = settings.learning_rate if lr is None and not _has_rates(optimizer) else lr
        if optimizer is None:
            optimizer = optimizer_like(settings, anatomy, lr)
    assert isinstance(update, Objective)
    fixed, rate = _fixed_optimizer(optimizer or "sgd", lr, anatomy.trainable)
    budget = StepBudget.of(anatomy, fixed, memory, named.values(), update.examples)
    fixed_update = prepared(update, anatomy, fixed)
    remarks = [] if settings is None else [*settings.remarks, *settings.step_remarks]
    remarks += row_remarks(settings, fixed_update.examples)
    routers = router_remark(anatomy.model.config, settings)
    return Setup(
        anatomy,
        named,
        fixed_update,
        fixed,
        rate,
        max_grad_norm or None,
        rule,
        budget,
        progress,
        (*remarks, *([routers] if routers else [])),
    )


def _has_rates(optimizer: str | torch.optim.Optimizer | None) -> bool:
    """Whether the optimizer is an object with learning rates of its own."""
    return optimizer is not None and not isinstance(optimizer, str)


def _trained_optimizer(settings: TrainerSettings, anatomy: Anatomy) -> torch.optim.Optimizer | None:
    """A trainer's optimizer with its state, if it has made a step on these parameters."""
    optimizer = settings.optimizer_state
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return optimizer if held & {id(p) for p in anatomy.trainable.values()} else None


def optimizer_like(
    settings: TrainerSettings, anatomy: Anatomy, lr: float | None
) -> torch.optim.Optimizer:
    """A fresh optimizer as a trainer with these settings makes it, decaying what it decays.

    Raises:
        ValueError: If lddyn does not follow the trainer's optimizer.
    """
    if settings.optimizer is None:
        raise ValueError(
            f"{settings.remarks[-1] if settings.remarks else 'the optimizer is not followed'} Give "
            "optimizer= one that lddyn follows, to see what its step would do"
        )
    rate = settings.learning_rate if lr is None else lr
    trainable = anatomy.trainable
    decayed = trainer_decays(anatomy.model) if settings.weight_decay else set(trainable)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trainable.items() if n in decayed]},
        {"params": [p for n, p in trainable.items() if n not in decayed], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            used,
            lr=rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(used, lr=rate, weight_decay=settings.weight_decay)
    return torch.optim.RMSprop(used, lr=rate, weight_decay=settings.weight_decay)


def named_examples(
    observed: Example | Sequence[Example] | Mapping[str, Example],
) -> dict[str, Example]:
    """Observed responses by unique names."""
    if isinstance(observed, Example):
        observed = [observed]
    for example in observed.values() if isinstance(observed, Mapping) else observed:
        if not isinstance(example, Example):
            raise ValueError(
                f"what is observed must be lddyn.Examples, got {type(example).__name__}"
            )
    if isinstance(observed, Mapping):
        named = dict(observed)
    else:
        named = {}
        for i, example in enumerate(observed):
            named[unused(example.name or f"observed {i}", named)] = example
    if not named:
        raise ValueError("observed must hold at least one Example, got none")
    return named


def unused(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is taken."""
    candidates = (f"{name} ({i})" for i in itertools.count(1))
    return name if name not in taken else next(c for c in candidates if c not in taken)


def _refuse_streamed(trainable: Mapping[str, Tensor]) -> None:
    streamed = {n: p for n, p in trainable.items() if is_streamed(p)}
    if streamed:
        size = sum(p.nbytes for p in streamed.values())
        raise UnsupportedModelError(
            f"{len(streamed)} streamed weights are trainable, {next(iter(streamed))} first: a "
            "decomposition holds their gradient, the step and a shifted copy, "
            f"{3 * size:,} bytes; train an adapter instead, or use lddyn.ntk, which holds none"
        )


def _fixed_optimizer(
    optimizer: str | torch.optim.Optimizer, lr: float | None, trainable: Mapping[str, Tensor]
) -> tuple[torch.optim.Optimizer, float]:
    """A copy of the optimizer at this learning rate, which later steps do not change; and lr."""
    if isinstance(optimizer, str):
        if lr is None:
            raise ValueError(f"lr is needed with optimizer={optimizer!r}")
        return make_optimizer(optimizer, list(trainable.values()), lr), lr
    optimizer = unwrapped_optimizer(optimizer)
    optimizer_kind(optimizer)
    name = "the learning rate of the optimizer"
    rates = {check_rate(g["lr"], name) for g in optimizer.param_groups}
    if lr is None or rates == {lr}:
        return copy_optimizer(optimizer, trainable, trainable), max(rates) if lr is None else lr
    if len(rates) > 1:
        raise ValueError(
            f"the optimizer's groups have several learning rates {sorted(rates)}: leave lr out to "
            "use them"
        )
    if not max(rates) > 0:
        raise ValueError(
            "the optimizer's learning rate is 0, so lr cannot rescale it: set the group's lr, or "
            "leave lr out"
        )
    return copy_optimizer(optimizer, trainable, trainable, lr / max(rates)), lr


# ---------------------------------------------------------------------------------------------
# The update at one parameter point


@dataclass(frozen=True)
class UpdateState:
    """The update at one parameter point.

    Attributes:
        anatomy: The model at that point.
        traces: A trace of each update sequence.
        log_probs: log π(y_l), one (L_i,) tensor per sequence, as the loss saw it.
        loss: The loss.
        weights: w_l = ∂L/∂log π(y_l), one (L_i,) tensor per sequence.
        step: The optimizer's step on the gradient, not taken.
    """

    anatomy: Anatomy
    traces: list[Trace]
    log_probs: list[Tensor]
    loss: float
    weights: list[Tensor]
    step: Step

    @classmethod
    def at(cls, setup: Setup, anatomy: Anatomy, optimizer: torch.optim.Optimizer) -> UpdateState:
        """Forward and backward of the update at the parameters of `anatomy`.

        Cost: a forward and a backward pass per update sequence, and one gradient in memory; see
        `wide_anatomy` for 16-bit weights.
        """
        update = setup.update
        traces = [anatomy.trace(example) for example in update.examples]
        budget = setup.budget
        if traces:
            check_pull(anatomy, traces[0].example)  # with a gradient of its own, before this one
        wide = wide_anatomy(anatomy, optimizer)
        if wide is anatomy:
            log_probs = [trace.log_probs() for trace in traces]
        else:
            log_probs = token_log_probs(wide, update.examples)
        loss, weights = update.weights(log_probs)
        total = gradient(
            wide,
            update.examples,
            weights,
            most=budget.group(),
            recompute=budget.recomputes(traces),
        )
        del wide
        step = optimizer_step(optimizer, anatomy.trainable, total, setup.max_grad_norm)
        return cls(anatomy, traces, log_probs, loss, weights, step)

    def locate(self, token: int) -> tuple[int, int]:
        """Sequence, and index in it, of an update token counted over all sequences."""
        for sequence, weights in enumerate(self.weights):
            if token < len(weights):
                return sequence, token
            token -= len(weights)
        raise IndexError(f"there are only {sum(map(len, self.weights))} update tokens")


def shifted_copy(
    model: nn.Module, shift: Mapping[str, Tensor] | None, scale: float = 1.0
) -> nn.Module:
    """A copy of the model at θ + scale · Δθ that shares frozen parameters and buffers.

    Args:
        model: Any module. Not changed.
        shift: Δθ, parameter name → tensor of its shape; None: the parameters as they are.
        scale: Factor on it.

    Raises:
        UnsupportedModelError: If a module's forward was replaced by a plain function, which in the
            copy would still use the original's weights.
    """
    moved = frozen_shared(model)
    if shift:
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in shift:
                    parameter.add_(shift[name], alpha=scale)
    return moved
