"""One progress bar for all passes of a diagnosis."""

from __future__ import annotations

from tqdm.auto import tqdm  # type: ignore[import-untyped]

__all__ = ["Bar"]


class Bar:
    """A bar over the work of a whole diagnosis, in forward passes of one sequence.

    Args:
        total: Forward passes; a forward and a backward pass together count three.
        shown: Whether it is shown.
    """

    def __init__(self, total: int = 0, shown: bool = False) -> None:
        self.shown = shown
        self._bar = tqdm(
            total=total,
            disable=None if shown else True,  # None: where there is no terminal
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def say(self, phase: str) -> None:
        """Names what is being done."""
        self._bar.set_description_str(phase)

    def advance(self, work: int) -> None:
        """Counts work that is done."""
        self._bar.update(min(work, self._bar.total - self._bar.n))

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
