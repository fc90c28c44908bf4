"""What a user should know about a mixture of experts before reading its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_EXPERT = re.compile(r"(^|\.)(experts?|block_sparse_moe)(\.|$)")


def expert_remarks(model: nn.Module, trainable: Iterable[str]) -> list[str]:
    """One sentence where a model has experts and none of them trains; else none.

    LoRA that names its target modules easily misses them: transformers packs the experts of a
    block in one parameter, which is no linear layer.

    Args:
        model: The model.
        trainable: Names of the parameters that train.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = {name: size for name, size in sizes.items() if _EXPERT.search(name)}
    names = set(trainable)
    if not experts or names & experts.keys():
        return []
    return [
        f"no expert of the mixture trains: {sum(sizes[n] for n in names if n in sizes):,} of "
        f"{sum(sizes.values()):,} parameters do, none of them among the {sum(experts.values()):,} "
        "of the experts (with peft, target_parameters names packed experts)"
    ]
