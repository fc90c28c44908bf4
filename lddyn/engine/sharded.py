"""Models whose parameters are split over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Such a parameter is a DTensor, of which every process holds a part. No process can run the model
alone: all of them make the same passes at the same time, in which FSDP2 gathers one block's weights
after the other, and each is left with its part of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lddyn.errors import UnsupportedModelError

__all__ = ["WHOLE", "Shards", "gradient_in_place", "is_sharded", "local", "reshard", "whole"]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps only a part of some parameters in this process."""
    return any(hasattr(p, "placements") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Split FSDP2's root parameters again, which stay whole after a forward: a step needs parts."""
    for module in model.modules():
        if split := getattr(type(module), "reshard", None):
            split(module)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory; a plain one as it is."""
    if not hasattr(tensor, "placements"):
        return tensor
    with torch.no_grad():  # so that it is the memory itself
        return cast(Tensor, cast(Any, tensor).to_local())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the processes, which all call this; a plain one as it is."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "placements") else tensor


def like_local(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor split as another one, of which this process holds `part`; or `part` itself."""
    if not hasattr(tensor, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    split: Any = tensor
    return DTensor.from_local(
        part,
        split.device_mesh,
        split.placements,
        run_check=False,
        shape=split.shape,
        stride=split.stride(),
    )


@dataclass(frozen=True)
class Shards:
    """How the trainable parameters of a model are divided among processes.

    Attributes:
        group: The processes that hold parts; None: this one holds all, or all hold all.
        split: Whether parameters are split.
    """

    group: Any = field(default=None, repr=False)
    split: bool = False

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Shards:
        """The division of these parameters.

        Raises:
            UnsupportedModelError: If some are split and some are not, or they are split in several
                ways; the message names one of them.
        """
        if not any(hasattr(p, "placements") for p in parameters.values()):
            return WHOLE
        ways = {}
        for name, parameter in parameters.items():
            placements = getattr(parameter, "placements", ())
            split = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
            if len(split) != 1:
                raise UnsupportedModelError(
                    f"the trainable parameter {name} is "
                    f"{f'split along {len(split)} dimensions of its mesh' if split else 'whole'}, "
                    "expected all trainable parameters to be split along one: call "
                    "fully_shard(model) on the whole model, with its blocks before it, without "
                    "ignored_params and without tensor parallelism"
                )
            ways[cast(Any, parameter).device_mesh, split[0]] = name
        if len(ways) > 1:
            one, other = [*ways.values()][:2]
            raise UnsupportedModelError(
                f"the trainable parameters {one} and {other} are split over different processes, "
                "expected one mesh for all: give fully_shard the same mesh each time"
            )
        (mesh, dim), *_ = ways
        return cls(mesh.get_group(dim), True)

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the parts; does nothing where nothing is split."""
        if not self.split:
            return
        from torch import distributed

        device = "cuda" if distributed.get_backend(self.group) == "nccl" else "cpu"
        for tensor in tensors:
            there = tensor.to(device)
            distributed.all_reduce(there, group=self.group)
            tensor.copy_(there)


WHOLE = Shards()


def gradient_in_place(
    value: Tensor, model: nn.Module, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradient of a scalar by the name of split parameters; each is split as its parameter.

    FSDP2 leaves gradients in `grad` alone; what was there is there again afterwards. They are means
    over the processes, which all have the same scalar.
    """
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        value.backward()
        reshard(model)
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
            for name, p in parameters.items()
        }
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]
