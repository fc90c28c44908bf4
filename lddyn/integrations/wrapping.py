"""Parameters that FSDP2 splits over processes."""

from __future__ import annotations

from torch import nn

__all__ = ["is_sharded", "reshard"]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps only a part of some parameters in this process."""
    return any(hasattr(p, "placements") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Split FSDP2's root parameters again, which stay whole after a forward: a step needs parts."""
    for module in model.modules():
        if split := getattr(type(module), "reshard", None):
            split(module)
