"""What a diagnosis needs to know of a set, whatever its rows are: pairs, or single sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from lddyn.data.example import Example

__all__ = ["TrainingSet"]


class TrainingSet(ABC):
    """N rows that are trained on, of one or two sequences each, and M sequences that are observed.

    Wherever the S = sides · N sequences of the set are counted, the first sequences of all rows
    come first, then the second ones.

    Attributes:
        sides: Sequences of a row: 2 of pairs, else 1.
        row_numbers: Row of the data set that each row comes from, by which sentences and tables
            name it; empty: rows are named by their place in the set.
        observed: Name -> a sequence that is looked at and not trained on, M of them.
    """

    sides: int
    row_numbers: tuple[int, ...]
    observed: Mapping[str, Example]

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, N."""

    @property
    @abstractmethod
    def examples(self) -> list[Example]:
        """The S sequences that are trained on."""

    @property
    @abstractmethod
    def representatives(self) -> Tensor:
        """The sequence whose gradient stands for each sequence, (S + M,) int64."""

    @cached_property
    def sequences(self) -> list[Example]:
        """The S + M sequences: `examples`, then the observed ones."""
        return [*self.examples, *self.observed.values()]

    @property
    def watched(self) -> list[int]:
        """Sequences whose change is told row by row: the first of each row, and the observed."""
        first = self.sides * len(self)
        return [*range(len(self)), *range(first, len(self.sequences))]

    def of_rows(self, rows: Tensor) -> list[Example]:
        """The sequences of some rows, the first ones first."""
        numbers = rows.tolist()
        return [self.examples[side * len(self) + i] for side in range(self.sides) for i in numbers]

    def name(self, row: int) -> int:
        """The number that names a row: that of the data, or its place in the set."""
        return self.row_numbers[row] if self.row_numbers else row

    @cached_property
    def lengths(self) -> Tensor:
        """Counted tokens of the sequences, (sides, N) int64."""
        return torch.tensor([len(example) for example in self.examples]).view(self.sides, -1)
