"""The weights of a streamed model's blocks: which of them are in memory, and where.

There are fewer slots than blocks. A block is read into a slot when its forward pass begins, in
place of the block that was used longest ago.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lddyn.engine.stream.pieces import Origin, absent_tensor, aligned
from lddyn.errors import UnsupportedModelError


@dataclass
class Block:
    """The streamed weights of one block, and their places in a slot."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    origins: list[Origin] = field(default_factory=list)
    places: dict[str, tuple[slice, torch.dtype]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)  # of the parameters when they were read
    size: int = 0

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """One more weight."""
        self.parameters[name] = parameter
        size = parameter.numel() * parameter.dtype.itemsize
        self.places[name] = slice(self.size, self.size + size), parameter.dtype
        self.size += aligned(size)

    def room(self) -> int:
        """Bytes of memory that reading takes besides the slot."""
        return max((o.room(self.parameters) for o in self.origins), default=0)

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The weights' places in a slot."""
        return {
            name: slot[at].view(dtype).view(self.parameters[name].shape)
            for name, (at, dtype) in self.places.items()
        }


class Weights:
    """The weights of a model's blocks: those of a few are in memory.

    Attributes:
        slots: How many blocks can be in memory at once.
        slot_bytes: Bytes of each.
        resident_bytes: Bytes of the weights outside the blocks, which stay in memory.
        reads: Blocks read so far.
    """

    def __init__(self, blocks: Sequence[Block], slots: int, resident: int, device: torch.device):
        self.blocks = list(blocks)
        self.slots, self.resident_bytes = slots, resident
        self.slot_bytes = max(b.size for b in blocks)
        self.reads = 0
        # Weights in slots, not allocated anew: a graph that outlives a block's turn (the taps of a
        # pullback hold theirs) must not keep its weights alive.
        self._free = [
            torch.empty(self.slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots)
        ]
        self._held: OrderedDict[int, Tensor] = OrderedDict()  # longest unused first
        for index, block in enumerate(blocks):
            for parameter in block.parameters.values():
                parameter.data = absent_tensor(parameter, device)
                # `is_streamed` and `present` look for this attribute. A strong reference would make
                # a circle, and the weights of a copy would stay until Python's next collection.
                fetch = partial(_load, weakref.ref(self), index)
                parameter.fetch = fetch  # type: ignore[attr-defined]

    def load(self, index: int) -> None:
        """Reads a block's weights into memory, unless they are there."""
        if index in self._held:
            self._held.move_to_end(index)
            return
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            slot = self._free.pop() if self._free else self._evict(next(iter(self._held)))
            block = self.blocks[index]
            places = block.views(slot)
            try:
                for origin in block.origins:
                    origin.fill(places)
                self._install(block, places)
            except BaseException:
                self._free.append(slot)
                raise
            self._held[index] = slot
            self.reads += 1

    def _install(self, block: Block, places: Mapping[str, Tensor]) -> None:
        for name, parameter in block.parameters.items():
            place = places[name]
            if (parameter.dtype, parameter.device) != (place.dtype, place.device):
                raise RuntimeError(
                    f"{name} was converted to {parameter.dtype} on {parameter.device}, expected "
                    f"{place.dtype} on {place.device}: a streamed model cannot be converted; "
                    "give lddyn.stream the dtype and device"
                )
        for name, parameter in block.parameters.items():
            parameter.data = places[name]
            block.versions[name] = parameter._version

    def _evict(self, index: int) -> Tensor:
        block = self.blocks[index]
        for name, parameter in block.parameters.items():
            if parameter._version != block.versions[name]:
                raise RuntimeError(
                    f"{name} was changed in place, and the change would be lost: streamed weights "
                    "are read-only; train an adapter, or load the model into memory"
                )
        for parameter in block.parameters.values():
            parameter.data = absent_tensor(parameter, parameter.device)
            increment_version(parameter)  # a graph that still needs the values raises
        return self._held.pop(index)


def _load(weights: weakref.ref[Weights], index: int) -> None:
    """Reads a block's weights, for as long as their model exists."""
    own = weights()
    if own is None:
        raise RuntimeError("the model of this streamed weight no longer exists: keep the model")
    own.load(index)


class OnDemand:
    """A block's forward that reads the block's weights first.

    The module holds this object, so a method of the module is held by a weak reference: a copy of a
    model is then freed with its last user.
    """

    def __init__(self, weights: Weights, index: int, forward: Any):
        self.weights, self.index = weights, index
        weak = isinstance(forward, MethodType)
        self._forward = weakref.WeakMethod(forward) if weak else lambda: forward

    @property
    def forward(self) -> Any:
        """The block's own forward."""
        return self._forward()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the weights of this block, then runs its own forward."""
        self.weights.load(self.index)
        return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDemand:
        for name, parameter in self.weights.blocks[self.index].parameters.items():
            if memo.get(id(parameter)) is not parameter:  # the copy is to have one of its own
                raise UnsupportedModelError(
                    f"a streamed model cannot be copied, and {name} would be: open it once more "
                    "with lddyn.stream"
                )
        return OnDemand(self.weights, self.index, copy.deepcopy(self.forward, memo))
