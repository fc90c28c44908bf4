"""The model inside what a trainer puts around it, and parameters that are split over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["check_whole", "is_sharded", "own_forward", "reshard", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile (whose cache is for training's shapes) and inside DDP."""
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    while hasattr(model, "_orig_mod") or isinstance(model, parallel):
        model = model.module if isinstance(model, parallel) else model._orig_mod  # type: ignore[assignment]
    return model


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs without autocast, be it the loop's or accelerate's own forward."""
    wrapped = model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps only a part of some parameters in this process."""
    return any(hasattr(p, "placements") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Split FSDP2's root parameters again, which stay whole after a forward: a step needs parts."""
    for module in model.modules():
        if split := getattr(type(module), "reshard", None):
            split(module)


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are split in a way that a pass cannot undo.

    Raises:
        ValueError: If FSDP 1 or DeepSpeed ZeRO-3 splits them; the message says what to use.
    """
    for module in model.modules():
        if hasattr(module, "_fsdp_wrapped_module"):
            raise ValueError(
                "the model is sharded by FullyShardedDataParallel (FSDP 1), expected whole "
                "parameters or fully_shard: use FSDP 2 (fsdp_version: 2)"
            )
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(
                f"parameter {name} is sharded by DeepSpeed ZeRO-3, expected whole parameters: use "
                "ZeRO-2, or FSDP 2"
            )
