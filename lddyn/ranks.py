"""Processes that divide one piece of work, started by torchrun."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that do one piece of work together.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        wait: Returns once every process has called it.
        group: torch's process group; None: the default one.

    Example:
        >>> from lddyn.ranks import Ranks
        >>> with Ranks.of_torchrun() as ranks:  # one process, without torchrun
        ...     ranks.world, ranks.share([5, 6, 7])
        (1, [5, 6, 7])
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    group: Any = field(default=None, repr=False)

    @classmethod
    @contextlib.contextmanager
    def of_torchrun(cls) -> Iterator[Ranks]:
        """The ranks that torchrun's environment variables describe; one process without them.

        Joins a gloo process group on entry and leaves it on exit. Where a group exists already, it
        is kept, and used or, if it is not one of gloo, joined by one of gloo.
        """
        from torch import distributed

        # The share of a process may take hours, and shares differ by as much.
        patience = datetime.timedelta(days=7)
        if distributed.is_available() and distributed.is_initialized():
            group = None
            if distributed.get_backend() != "gloo":
                group = distributed.new_group(backend="gloo", timeout=patience)
            yield cls._of_group(group)
        elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
        else:
            distributed.init_process_group("gloo", timeout=patience)
            try:
                yield cls._of_group(None)
            finally:
                distributed.destroy_process_group()

    @classmethod
    def _of_group(cls, group: Any) -> Ranks:
        from torch import distributed

        rank, world = distributed.get_rank(), distributed.get_world_size()
        return cls(rank, world, lambda: distributed.barrier(group), group)

    def share(self, items: Sequence[Any]) -> list[Any]:
        """The items of this process: every `world`-th, from `rank` on."""
        return list(items[self.rank :: self.world])

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the processes; it is the same in all of them."""
        if self.world == 1:
            return
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor, group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """The JSON-safe value of every process, by rank; numbers arrive as they were."""
        if self.world == 1:
            return [value]
        import torch
        from torch import distributed

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self.add_up(sizes)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        distributed.all_gather(received, padded, group=self.group)
        return [
            json.loads(bytes(part[:size].tolist()))
            for part, size in zip(received, sizes.tolist(), strict=True)
        ]

    def map(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`work(item)` of every item, in order, in all processes; each makes those of its share.

        Args:
            work: Returns a JSON-safe value.
            items: The same in all processes.
        """
        parts = self.gather([work(item) for item in self.share(items)])
        return [parts[i % self.world][i // self.world] for i in range(len(items))]

    def check_alike(self, what: str, value: object) -> None:
        """Raises a RuntimeError in every process if a value is not the same in all of them."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise RuntimeError(
                f"{what} must be the same in all {self.world} processes, and differ: load the same "
                "model and the same rows in each"
            )


ALONE = Ranks()
