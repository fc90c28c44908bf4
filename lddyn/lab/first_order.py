"""What a small change of the parameters does to whole responses, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.pushforward import batched_shifts
from lddyn.optimizers import Direction

__all__ = ["first_order"]


def first_order(
    model: nn.Module, examples: Sequence[Example], directions: Mapping[str, Direction]
) -> dict[str, Tensor]:
    """⟨∇ log π(y), Δθ⟩ of every whole response for every direction.

    Args:
        model: A causal LM of transformers.
        examples: Responses, N of them.
        directions: Name → Δθ, parameter name → tensor of its shape.

    Returns:
        Name of the direction → (N,) nats, float64, on the CPU.

    Cost: see `lddyn.engine.pushforward.batched_shifts`.
    """
    sums = torch.zeros(len(directions), len(examples), dtype=torch.float64)
    for index, shift in batched_shifts(model, examples, list(directions.values())):
        sums[:, index] = shift.realised.double().sum(1).cpu()
    return dict(zip(directions, sums, strict=True))
