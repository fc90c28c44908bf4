"""Which of the processes that train together watch, and how they agree on a pass."""

from __future__ import annotations

from torch import distributed, nn

from lddyn.engine.sharded import is_sharded

__all__ = ["Processes"]


class Processes:
    """This process among those that train a model.

    One process watches. Where parameters are sharded (FSDP2), no process can run the model alone:
    all take part in each pass, and vote before it.

    Attributes:
        first: Whether this is the process that writes rows.
        sharded: Whether parameters are split over the processes.
    """

    def __init__(self, model: nn.Module) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.first = not together or distributed.get_rank() == 0
        self.sharded = together and is_sharded(model)

    @property
    def watches(self) -> bool:
        """Whether this process takes part in passes."""
        return self.first or self.sharded

    def vote(self, wish: bool, failed: bool) -> tuple[bool, bool]:
        """The wish of the first process, and whether any process has failed.

        Every process that watches must call it the same number of times.
        """
        votes = [(wish, failed)]
        if self.sharded:
            votes *= distributed.get_world_size()
            distributed.all_gather_object(votes, (wish, failed))
        return votes[0][0], any(has_failed for _, has_failed in votes)
