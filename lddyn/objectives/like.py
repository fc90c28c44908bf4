"""The objective of a run, from the trainer's settings and the rows of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.logits import token_log_probs
from lddyn.engine.reference_policy import Reference, policy_of, trainer_reference
from lddyn.files import naming
from lddyn.objectives.grouped import GRPO
from lddyn.objectives.loss import Loss
from lddyn.objectives.losses import COMMON, LOSSES
from lddyn.objectives.objective import SFT, Objective
from lddyn.objectives.paired import preference
from lddyn.objectives.unpaired import KTO
from lddyn.settings import TrainerSettings

__all__ = ["Update", "loss_like", "objective_like", "reference_like", "row_remarks"]

Pair: TypeAlias = tuple[Example, Example]
Labelled: TypeAlias = tuple[Example, bool | float]  # a label of KTO, or a reward of GRPO

# What a step learns from: an objective, or with settings the rows of one batch alone.
Update: TypeAlias = (
    Objective | Example | Pair | Labelled | Sequence[Example] | Sequence[Pair] | Sequence[Labelled]
)


def loss_like(settings: TrainerSettings) -> Loss:
    """The loss of pairs that a trainer with these settings lowers.

    Raises:
        ValueError: If lddyn has no loss of this name, or none of this trainer.
    """
    with naming(settings.file):
        return _loss(settings)


def _loss(settings: TrainerSettings) -> Loss:
    _check_known(settings)
    if settings.trainer == "grpo":
        raise ValueError(
            "GRPO learns from completions with rewards, not from pairs: give rows (example, "
            "reward), or an lddyn.GRPO"
        )
    if settings.trainer == "other":
        raise ValueError(
            "a TrainingArguments does not tell a loss of pairs: give the objective, or TRL's config"
        )
    names = ["sft" if name in ("nll", "dft") else name for name in settings.losses]
    names = ["apo_zero" if name == "apo_zero_unpaired" else name for name in names]
    known = {key for name in names if name in LOSSES for key in LOSSES[name].parameters}
    if settings.trainer == "dpo":
        known |= COMMON.keys()
    given = {key: value for key, value in settings.parameters.items() if key in known}
    return Loss(names, settings.loss_weights, **given)


def reference_like(
    settings: TrainerSettings, model: nn.Module | Anatomy, count: int, sides: int = 2
) -> Reference:
    """The reference that a trainer with these settings takes for this policy.

    Args:
        settings: Settings of the run.
        model: The policy.
        count: Pairs, or responses where `sides` is 1.
        sides: 2 for pairs, 1 for single responses.
    """
    given = settings.reference
    if isinstance(given, nn.Module | Anatomy):
        return given
    if given == "trainer":
        return trainer_reference(model)
    return torch.zeros(sides, count) if given == "free" else str(given)


def objective_like(
    settings: TrainerSettings, update: Update, model: nn.Module | Anatomy
) -> Objective:
    """The objective of one optimizer step of a run.

    Args:
        settings: Settings of the run.
        update: All rows that the step learns from: for SFT an Example or several; for preference
            losses a pair (chosen, rejected) or several; for KTO a pair (example, label) or several;
            for GRPO (example, reward), several.
            An Objective is returned as it is.
        model: The policy.

    Raises:
        ValueError: If the rows are not of the kind that the trainer learns from.
    """
    if isinstance(update, Objective):
        return update
    _check_known(settings)
    plain = settings.trainer in ("sft", "other")
    single = isinstance(update, Example) or (_is_row(update) and not plain)
    rows: list[Any] = [update] if single else list(update)  # type: ignore[arg-type]
    if plain:
        if all(isinstance(e, Example) for e in rows):
            return SFT(rows, loss_type=settings.losses[0])
        raise ValueError(_wanted(settings, "an Example, or several"))
    if not rows or not all(map(_is_row, rows)):
        raise ValueError(_wanted(settings, "pairs (chosen, rejected), or (example, label) of KTO"))
    firsts, seconds = zip(*rows, strict=True)
    if isinstance(seconds[0], bool | int | float) and settings.trainer == "grpo":
        return _grpo(settings, firsts, seconds, model)
    if settings.trainer == "grpo":
        raise ValueError(_wanted(settings, "completions with rewards (example, reward)"))
    if isinstance(seconds[0], float):
        raise ValueError(_wanted(settings, "pairs (chosen, rejected), or (example, label) of KTO"))
    if isinstance(seconds[0], bool):
        if settings.trainer != "kto":
            raise ValueError(_wanted(settings, "pairs (chosen, rejected)"))
        numbers = {k: float(v) for k, v in settings.parameters.items()}
        return KTO(
            firsts,
            seconds,
            beta=numbers.get("beta", 0.1),
            desirable_weight=numbers.get("desirable_weight", 1.0),
            undesirable_weight=numbers.get("undesirable_weight", 1.0),
            reference=reference_like(settings, model, len(rows), sides=1),
            loss_type=settings.losses[0],
        )
    return preference(
        loss_like(settings),
        firsts,
        seconds,
        reference=reference_like(settings, model, len(rows)),
    )


def _grpo(
    settings: TrainerSettings,
    examples: Sequence[Example],
    rewards: Sequence[float],
    model: nn.Module | Anatomy,
) -> GRPO:
    """GRPO on rated completions, with the reference's log-probs where it has a β."""
    given: dict[str, Any] = dict(settings.parameters)
    if given.get("beta"):
        reference = reference_like(settings, model, len(examples), sides=1)
        if reference != "self":
            with policy_of(reference, Anatomy.of(model)) as policy:
                known = token_log_probs(policy, examples)
            given["reference"] = [value.detach() for value in known]
    return GRPO(examples, [float(r) for r in rewards], loss_type=settings.losses[0], **given)


def row_remarks(settings: TrainerSettings | None, examples: Sequence[Example]) -> list[str]:
    """A sentence where the trainer reads other token ids of these rows than lddyn does.

    Args:
        settings: Settings of the run. None: no trainer.
        examples: The encoded rows.
    """
    merged = sum("boundary_merge" in dict(example.notes) for example in examples)
    if not merged or settings is None or not settings.before(1, 14):
        return []
    return [
        f"In {merged} of {len(examples)} responses tokens merge with the prompt's. TRL "
        f"{settings.trl_version} counts the prompt's tokens alone and trains on other token ids; "
        "those here are TRL 1.14's and later."
    ]


def _check_known(settings: TrainerSettings) -> None:
    """Raise a ValueError for a trainer whose loss lddyn does not have."""
    if not settings.losses:
        raise ValueError(
            f"lddyn has no loss of TRL's {settings.trainer.upper()} trainer: give the objective "
            "itself, as an lddyn.Objective of the log-probs; like= then says optimizer, learning "
            "rate and clipping"
        )


def _is_row(value: object) -> bool:
    """Whether this is one pair, or one response with its label or reward."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], Example)
        and isinstance(value[1], Example | bool | int | float)
    )


def _wanted(settings: TrainerSettings, rows: str) -> str:
    return f"a step of a {settings.trainer.upper()} trainer learns from {rows}: give these"
