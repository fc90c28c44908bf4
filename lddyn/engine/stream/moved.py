"""A model at other weights, θ + s · Δθ, of which memory holds one block at a time.

The copy shares what does not move with the model. The moved weights of a block are computed when
the block runs, into one slot that all blocks share; those outside the blocks are copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lddyn.engine.anatomy import Anatomy
from lddyn.engine.door import frozen_shared
from lddyn.engine.stream.pieces import Origin, absent_tensor
from lddyn.engine.stream.weights import Block, OnDemand, Weights


class Moved(Origin):
    """A weight of a model plus a multiple of its change."""

    def __init__(self, name: str, value: Tensor, change: Tensor, scale: float):
        self.name, self.value, self.change, self.scale = name, value, change, scale
        self.shapes = {name: value.shape}

    def room(self, out: Mapping[str, Tensor]) -> int:
        """0: it is computed in place."""
        return 0

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Computes the values, as `Tensor.add_` does in a copy."""
        out[self.name].copy_(self.value).add_(self.change, alpha=self.scale)


def inside_blocks(anatomy: Anatomy) -> dict[str, int]:
    """Trainable parameters that one block alone uses, by name → index of the block.

    Empty where the model is one segment, or streamed already.
    """
    if anatomy.joined or anatomy.streamed:
        return {}
    users: dict[int, set[int]] = {}
    inside: dict[int, int] = {}
    for i, block in enumerate(anatomy.blocks):
        inside |= {id(module): i for module in block.modules()}
    for module in anatomy.model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(inside.get(id(module), -1))
    places = {name: users[id(p)] for name, p in anatomy.trainable.items()}
    return {name: min(of) for name, of in places.items() if len(of) == 1 and -1 not in of}


def moved_bytes(anatomy: Anatomy) -> int:
    """Bytes of a `moved_model`: the largest block's moved weights, and those outside the blocks."""
    home = inside_blocks(anatomy)
    sizes = [0] * len(anatomy.blocks)
    for name, index in home.items():
        sizes[index] += anatomy.trainable[name].nbytes
    outside = sum(p.nbytes for name, p in anatomy.trainable.items() if name not in home)
    return outside + max(sizes, default=0)


def moved_model(anatomy: Anatomy, change: Mapping[str, Tensor], scale: float) -> nn.Module:
    """A copy of a model at θ + scale · Δθ that computes a block's weights when the block runs.

    Args:
        anatomy: The model; its trainable parameters move, and must stay as they are while the copy
            is used.
        change: Δθ, parameter name → tensor of its shape; held, not copied.
        scale: Factor on it.

    Cost: for each pass over the model one addition of its weights.
    """
    model, home = anatomy.model, inside_blocks(anatomy)
    memo: dict[int, object] = {}
    blocks = {index: Block() for index in sorted(set(home.values()))}
    for name, index in home.items():
        own = anatomy.trainable[name]
        shell = nn.Parameter(absent_tensor(own, own.device))
        memo[id(own)] = shell
        blocks[index].add(name, shell)
        blocks[index].origins.append(Moved(name, own.detach(), change[name], scale))
    moved = frozen_shared(model, memo)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in change and name not in home:
                parameter.add_(change[name], alpha=scale)
    if blocks:
        weights = Weights(list(blocks.values()), 1, 0, anatomy.device)
        names = {id(module): name for name, module in model.named_modules()}
        for place, index in enumerate(blocks):
            module = moved.get_submodule(names[id(anatomy.blocks[index])])
            module.forward = OnDemand(weights, place, module.forward)
    return moved
