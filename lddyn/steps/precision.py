"""What rounding to the weights' own number type leaves of a step.

A step is predicted, and by default verified, as if weights were real numbers. A weight in bfloat16
has 8 bits: a step that is smaller than half a unit of its last bit leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.gram import Side
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import own_response
from lddyn.engine.trace import Trace
from lddyn.optimizers import Direction
from lddyn.steps.setup import Setup
from lddyn.steps.wide import coarse

__all__ = [
    "describe_precision",
    "has_dropout",
    "moved_share",
    "noise_remarks",
    "rounding_error",
    "weight_change",
]

_PIECE = 1 << 20  # weights that are compared at a time


def moved_share(parameters: Mapping[str, Tensor], direction: Direction) -> float | None:
    """Of the weights that a step should move, the part that rounding lets move.

    Args:
        parameters: Name → weights before the step, in their own number type.
        direction: Δθ.

    Returns:
        A part between 0 and 1; None: the step should move none.
    """
    moved, wanted = 0, 0
    for name, whole in direction.items():
        pieces = (whole.flatten().split(_PIECE), parameters[name].detach().flatten().split(_PIECE))
        for change, weights in zip(*pieces, strict=True):
            # In at least float32, so that the sum with a weight is rounded once.
            change = change.to(torch.promote_types(change.dtype, torch.float32))
            asked = change != 0
            after = (weights.to(change.dtype) + change).to(weights.dtype)
            wanted += int(asked.sum())
            moved += int(((after != weights) & asked).sum())
    return moved / wanted if wanted else None


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The part of all weights that differ between two models."""
    count = sum(p.numel() for p in before.values())
    return sum(int((after[n] != p).sum()) for n, p in before.items()) / max(count, 1)


@torch.no_grad()
def rounding_error(trace: Trace, example: Example) -> float:
    """The size of the rounding error of a response's log π, in nats; within `evaluating`.

    How far the log-probs of the model's own forward pass are from those of the analysis, as
    independent errors of its tokens.
    """
    own = own_response(trace.anatomy, example).log_probs.double()
    return float((own - trace.log_probs().detach().to(own)).norm())


def describe_precision(setup: Setup, direction: Direction, sides: Sequence[Side]) -> dict[str, Any]:
    """Facts of a step on 16-bit weights, for settings; empty for other number types.

    "weights_moved" is `moved_share`; "rounding" maps every observed response to its
    `rounding_error`.

    Cost: one forward pass per observed response.
    """
    trainable = setup.anatomy.trainable
    if coarse(trainable) is None:
        return {}
    with evaluating(setup.anatomy.model):
        rounding = {
            name: rounding_error(side.trace, example)
            for (name, example), side in zip(setup.observed.items(), sides, strict=True)
        }
    share = moved_share(trainable, direction)
    return {"weights_moved": share, "rounding": rounding}


def has_dropout(model: nn.Module) -> bool:
    """Whether training would drop activations, which the analysis does not: p > 0 somewhere."""
    config: Any = getattr(model, "config", None)
    named = ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop")
    inside = any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in model.modules())
    return inside or (
        model.training and any(float(getattr(config, n, 0.0) or 0.0) > 0 for n in named)
    )


def noise_remarks(model: nn.Module) -> list[str]:
    """A sentence on NEFTune's noise, which training adds to the embeddings and the analysis not."""
    find: Any = getattr(model, "get_input_embeddings", None)
    alpha = None if find is None else getattr(find(), "neftune_noise_alpha", None)
    if not alpha or not model.training:
        return []
    return [f"NEFTune's noise on the embeddings (neftune_noise_alpha={alpha:g}) is left out."]
