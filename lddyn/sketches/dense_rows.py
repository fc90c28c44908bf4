"""Rows of whole sequences that are made from `Piece`s: exact, or sketched."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from lddyn.estimate import Estimate
from lddyn.sketches.layout import Layout
from lddyn.sketches.pieces import Piece
from lddyn.sketches.projections import Stream, Term, two_sided

__all__ = ["DenseRows"]


class DenseRows:
    """Gradients of whole sequences as rows, which `add` fills.

    Args:
        layout: What a row stores (`dense_layout`).
        parameters: Name → parameter: shapes, dtype and device.
        count: Number of rows.
        split: Whether exact rows hold this process's part of split gradients alone; `parameters`
            are then these parts.

    Attributes:
        layout: The layout.
        rows: (count, layout.width), at least float32, on the device of the parameters.
    """

    def __init__(
        self, layout: Layout, parameters: Mapping[str, Tensor], count: int, *, split: bool = False
    ) -> None:
        self.layout, self._split = layout, split
        self._parts = {part.name: part for part in layout.parts}
        self._shapes = {name: p.shape for name, p in parameters.items()}
        first = next(iter(parameters.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.rows = torch.zeros(count, layout.width, device=first.device, dtype=dtype)

    def empty(self, count: int) -> DenseRows:
        """As many rows of zeros of the same layout."""
        made = copy.copy(self)
        made.rows = self.rows.new_zeros(count, self.layout.width)
        return made

    def first(self, count: int) -> DenseRows:
        """The first rows, in the same memory."""
        made = copy.copy(self)
        made.rows = self.rows[:count]
        return made

    @property
    def exact(self) -> bool:
        """Whether rows are the gradients themselves."""
        return all(part.kind == "exact" for part in self.layout.parts)

    def add(self, row: int, piece: Piece) -> None:
        """Adds a piece of one sequence's gradient to its row."""
        piece = piece if self._split else piece.whole()
        part = self._parts[piece.name]
        place = self.layout.places[part.name, part.kind]
        if part.kind == "exact":
            piece.add_to(self.rows[row, place].view(self._shapes[piece.name]))
            return
        target = self.layout.repeated(self.rows[row : row + 1])[..., place]
        target += self._projected(piece).to(target)

    def _projected(self, piece: Piece) -> Tensor:
        part, sketch = self._parts[piece.name], self.layout.sketch
        # Each packed expert has a random stream of its own and shares its parameter's numbers.
        name = piece.name if piece.expert is None else f"{piece.name}[{piece.expert}]"
        if part.kind == "onehot":
            ids = piece.ids
            if ids is None:
                ids = torch.arange(len(piece.value), device=piece.value.device)
            stream = Stream(sketch.seed, name, sketch.repeats)
            term = Term(ids[None], piece.value[None])
            return two_sided(stream, [term], part.shape, part.sizes).flatten(2)
        return sketch.project_matrix(name, piece.value.reshape(part.shape), part.sizes)

    def gram(self) -> Estimate:
        """Inner products of all rows (n, n), with standard errors where they are sketched."""
        return self.layout.estimate(self.rows, self.rows)
