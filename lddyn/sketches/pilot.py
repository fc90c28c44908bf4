"""Expected error of a sketch: a few tokens are sketched and their inner products compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.sketches.allocation import choose_layout
from lddyn.sketches.features import features
from lddyn.sketches.gradients import CHUNK
from lddyn.sketches.layout import Layout
from lddyn.sketches.sketch import Sketch

_EXAMPLES, _TOKENS = 8, 64  # of a side, and of all, whose products show a sketch's error

_ROUNDS = 4  # of searching for k

_Item = TypeVar("_Item")


class Pilot:
    """A few tokens of a few sequences, whose sketched products show how far off sketches are.

    Args:
        anatomy: The model.
        observed: Sequences of the table's rows.
        updated: Sequences of its columns.
        together: Whether rows and columns are whole sequences.
        workspace: Bytes of one cotangent of the longest sequence.
        budget: Bytes of memory.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        observed: tuple[Example, ...],
        updated: tuple[Example, ...],
        together: bool,
        workspace: int,
        budget: int,
    ) -> None:
        self.anatomy, self.budget = anatomy, budget
        self.by = "sequence" if together else "token"
        self.chunk = max(1, min(CHUNK, budget // 2 // workspace))
        self.examples = list(dict.fromkeys((*observed, *updated)))
        sides = [dict.fromkeys(observed), dict.fromkeys(updated)]
        picked = [_spaced(list(side), _EXAMPLES) for side in sides]
        union = list(dict.fromkeys((*picked[0], *picked[1])))
        self.thin, rows, times = union, union, Counter(updated)
        if together:
            own = sum(times[e] for e in observed)
            self.counts = own, 0, len(observed) * len(updated) - own
        else:
            self.thin = [_thinned(e, max(8, _TOKENS // len(union))) for e in union]
            rows = [e for e, thin in zip(union, self.thin, strict=True) for _ in range(len(thin))]
            self.counts = self._pairs(observed, updated, times)
        self.sides = [torch.tensor([e in side for e in rows]) for side in sides]

    @staticmethod
    def _pairs(
        observed: tuple[Example, ...], updated: tuple[Example, ...], times: Counter[Example]
    ) -> tuple[int, int, int]:
        """Numbers of token pairs: with itself, of one sequence, of two sequences."""
        tokens = sum(map(len, observed)) * sum(map(len, updated))
        own = sum(times[e] * len(e) for e in observed)
        inside = sum(times[e] * len(e) ** 2 for e in observed)
        return own, inside - own, tokens - inside

    def layout(self, sketch: Sketch) -> Layout:
        """A layout for the sequences of both sides."""
        return choose_layout(self.anatomy, self.examples, sketch, self.by)

    def size(self, sketch: Sketch, rtol: float | None) -> tuple[Layout, float]:
        """The layout of the smallest sketch of this kind that is precise enough, and its error.

        Args:
            sketch: Kind, repeats and seed; k is where the search begins.
            rtol: Wanted ‖Ĝ − G‖_F / ‖G‖_F; None: k is taken as it is.

        Returns:
            The layout and its expected error; the most precise one tried if none is within rtol.
        """
        repeats, tried = sketch.repeats, []
        # A few tokens miss part of the tail of the errors: a tenth on trained models.
        aim = math.inf if rtol is None else 0.85 * rtol
        least = 2 * repeats * (len(self.anatomy.trainable) + 1)
        parameters = sum(p.numel() for p in self.anatomy.trainable.values())
        rows = len(self.sides[0])
        most = max(least, min(parameters, self.budget // 2 // (8 * rows)))
        k, seen = min(max(sketch.k, least), most), set[int]()
        for _ in range(_ROUNDS):
            k = -(-k // repeats) * repeats
            if k in seen:
                break
            seen.add(k)
            layout = self.layout(replace(sketch, k=k))
            error = self.error(layout)
            tried.append((layout, error))
            if rtol is None or error == 0 or 0.75 * aim <= error <= aim:
                break
            # NaN: the products are smaller than the sketch's noise; try four times as many.
            growth = 4.0 if math.isnan(error) else 1.15 * (error / aim) ** 2
            k = int(min(max(k * growth, least), most))
        precise = [pair for pair in tried if pair[1] <= aim]
        if precise:
            return min(precise, key=lambda pair: pair[0].width)
        return min(tried, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])

    def error(self, layout: Layout) -> float:
        """Expected ‖Ĝ − G‖_F / ‖G‖_F over all pairs of the table; NaN if it cannot be told."""
        # Few rows and small chunks: no limit, so that a plan can say what memory it needs.
        made = features(
            self.anatomy, self.thin, by=self.by, layout=layout, memory=2**62, chunk=self.chunk
        )
        products, table = made.gram(), made.tokens
        spread = products.stderr.double() ** 2
        square = products.value.double() ** 2 - spread
        index = table.example_index.to(spread.device)
        inside = index[:, None] == index
        own = torch.eye(len(made), dtype=torch.bool, device=spread.device)
        one, other = (side.to(spread.device) for side in self.sides)
        across = (one[:, None] & other) & ~inside
        off = total = 0.0
        kinds = own, inside & ~own, across if bool(across.any()) else ~inside
        for count, kind in zip(self.counts, kinds, strict=True):
            if count and bool(kind.any()):
                off += count * float(spread[kind].mean())
                total += count * float(square[kind].mean())
        return math.sqrt(off / total) if total > 0 else math.nan


def _spaced(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _thinned(example: Example, count: int) -> Example:
    """The same sequence with at most `count` counted tokens."""
    first = len(example.prompt_ids) - 1
    kept = set(_spaced(list(example.positions), count))
    mask = tuple(first + i in kept for i in range(len(example.response_ids)))
    return replace(example, response_mask=mask)
