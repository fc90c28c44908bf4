"""A preference set: its pairs, how they are named, and what an audit says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.sets.training_set import TrainingSet

__all__ = ["Pair", "PairSet"]

Pair = tuple[Example, Example]


@dataclass(frozen=True)
class PairSet(TrainingSet):
    """N (chosen, rejected) pairs: all chosen responses come first, then all rejected ones.

    Attributes:
        pairs: The pairs.
        row_numbers: Row of the data set that each pair comes from, by which sentences and tables
            name it; empty: pairs are named by their place in `pairs`.
        faults: Pair -> the problem that an audit of the data found in it.
        observed: Name -> a sequence that is looked at and not trained on, M of them.
    """

    pairs: tuple[Pair, ...]
    row_numbers: tuple[int, ...] = ()
    faults: Mapping[int, str] = field(default_factory=dict)
    observed: Mapping[str, Example] = field(default_factory=dict)
    sides = 2

    @classmethod
    def of(
        cls,
        pairs: Iterable[Pair],
        row_numbers: Sequence[int] | None = None,
        faults: Mapping[int, str] | None = None,
        observed: Mapping[str, Example] | None = None,
    ) -> PairSet:
        """Checks pairs, row numbers and faults.

        Raises:
            ValueError: If there is no pair, row numbers are not one per pair, or a fault is that
                of a pair that does not exist.
        """
        made = tuple((chosen, rejected) for chosen, rejected in pairs)
        if not made:
            raise ValueError("pairs must hold at least one (chosen, rejected), got none")
        if row_numbers is not None and len(row_numbers) != len(made):
            raise ValueError(
                f"row_numbers must be one per pair, {len(made)}, got {len(row_numbers)}"
            )
        wrong = [i for i in faults or {} if not 0 <= i < len(made)]
        if wrong:
            raise ValueError(f"faults must name pairs from 0 to {len(made) - 1}, got {wrong}")
        return cls(made, tuple(row_numbers or ()), dict(faults or {}), dict(observed or {}))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @property
    def noun(self) -> str:
        """What a pair is called: "row" where the data's row numbers are known, else "pair"."""
        return "row" if self.row_numbers else "pair"

    @cached_property
    def examples(self) -> list[Example]:
        """The 2N sequences: all chosen responses, then all rejected ones."""
        return [pair[side] for side in (0, 1) for pair in self.pairs]

    def equal(self, pair: int) -> bool:
        """Whether the chosen and the rejected response of a pair are the same."""
        chosen, rejected = self.pairs[pair]
        return bool(chosen.content_id == rejected.content_id)

    @cached_property
    def representatives(self) -> Tensor:
        """The sequence whose gradient stands for each sequence, (2N + M,) int64.

        Equal responses of a pair share one: their gradients cancel in a step, and the rounding
        error that is left of them would be read as an effect.
        """
        n = len(self)
        rows = torch.arange(len(self.sequences))
        for pair in range(n):
            if self.equal(pair):
                rows[n + pair] = pair
        return rows
