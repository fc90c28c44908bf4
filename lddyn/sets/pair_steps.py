"""Some pairs' own steps, taken apart: which token moves which, and where the probability goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lddyn.engine.anatomy import Anatomy
from lddyn.objectives.paired import preference
from lddyn.sets.diagnosis import Diagnosis
from lddyn.steps.decompose import decompose
from lddyn.steps.decomposition import Decomposition
from lddyn.steps.massflow import MassFlow, massflow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairStep", "take_apart"]

_COPIED = 1 << 29  # parameters of a model that is copied in float64 for a real step


@dataclass(frozen=True)
class PairStep:
    """One pair's part of a step on the set, token by token.

    Attributes:
        pair: The pair that is learnt from.
        victim: The pair whose chosen response it lowers most; None if it lowers none.
        decomposition: What its tokens do to its own responses, and to the chosen response of
            `victim`.
        flow: Where the probability goes that its rejected response loses.
    """

    pair: int
    victim: int | None
    decomposition: Decomposition
    flow: MassFlow


def take_apart(
    diagnosis: Diagnosis,
    model: nn.Module | Anatomy,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pairs: Sequence[int] | None = None,
) -> list[PairStep]:
    """The most harmful pairs token by token, and where the probability goes.

    Args:
        diagnosis: The diagnosis.
        model: The model that was diagnosed.
        tokenizer: Names tokens of the vocabulary that no response has. Default: by number.
        pairs: Which pairs. Default: `diagnosis.worst(3)`.

    Returns:
        One PairStep each, at the unit learning rate; none where no step moves anything.

    Cost: a `decompose` of three responses and a `massflow` of one for each pair, the latter with a
        real step on a copy of the model, in float64 up to half a billion parameters.
    """
    lr = diagnosis.step.unit_lr / len(diagnosis)
    if not lr:
        return []
    wanted = diagnosis.worst(3) if pairs is None else pairs
    return [_take_apart(diagnosis, model, tokenizer, pair, lr) for pair in wanted]


def _take_apart(
    diagnosis: Diagnosis,
    model: nn.Module | Anatomy,
    tokenizer: PreTrainedTokenizerBase | None,
    pair: int,
    lr: float,
) -> PairStep:
    module = Anatomy.module_of(model)
    small = sum(p.numel() for p in module.parameters()) <= _COPIED
    chosen, rejected = diagnosis.pairs[pair]
    update = preference(
        diagnosis.loss, chosen, rejected, reference=diagnosis.reference[:, pair : pair + 1]
    )
    observed = {"chosen": chosen, "rejected": rejected}
    victim = _victim(diagnosis, pair)
    if victim is not None:
        observed = {"victim": diagnosis.pairs[victim][0], **observed}
    flow = massflow(module, rejected, update, lr=lr, dtype=torch.float64 if small else None)
    if tokenizer is not None:  # running text, not a byte-level tokenizer's own spelling
        decode = tokenizer.decode
        flow.text_of = lambda token: str(decode([token]))
    return PairStep(pair, victim, decompose(module, observed, update, lr), flow)


def _victim(diagnosis: Diagnosis, pair: int) -> int | None:
    """The other pair whose chosen response this pair's step lowers most, if it lowers any."""
    effects = diagnosis.step.effects[: len(diagnosis), pair].clone()
    effects[pair] = math.inf
    return int(effects.argmin()) if float(effects.min()) < 0 else None
