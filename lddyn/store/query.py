"""Many against many: which of many token features have the strongest inner products with a few.

Exact: every pair is computed, block by block, and the best k are kept. Ties go to the lower index,
whatever the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lddyn.data.token_table import COLUMNS
from lddyn.estimate import Estimate

if TYPE_CHECKING:
    from lddyn.store.store import Store

__all__ = ["SIGNS", "Hit", "Hits", "Layout", "Pairing", "TopK"]


@dataclass(frozen=True)
class Hit:
    """One stored token, or sequence, and how it pairs with a query.

    Attributes:
        value: Inner product of features; positive pulls up, negative pushes down.
        stderr: Its standard error; zero where values are exact for the features.
        example_id: `Example.content_id`.
        example_index: Place of the example in the data set.
        row: Row of the store; the example's first row for a sequence.
        tokens: How many tokens the value sums over; 1 for a token.
        response_index: Place of the token in the response; None for a sequence.
        position: Logit column that predicts it; None for a sequence.
        token_id: The token; None for a sequence.
    """

    value: float
    stderr: float
    example_id: str
    example_index: int
    row: int
    tokens: int
    response_index: int | None = None
    position: int | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class Hits:
    """The strongest of a store for each of m queries, best first.

    Attributes:
        by: `"token"` or `"sequence"`.
        index: (m, k) int64; rows of the store, or numbers of its examples in stored order.
        estimate: Values and standard errors, (m, k) float32.
        store: Where they come from.
    """

    by: str
    index: Tensor
    estimate: Estimate
    store: Store

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.index)

    def __getitem__(self, query: int) -> list[Hit]:
        """The hits of one query with the tokens they are."""
        hits = []
        values, errors = self.estimate.value[query].tolist(), self.estimate.stderr[query].tolist()
        for found, value, stderr in zip(self.index[query].tolist(), values, errors, strict=True):
            if self.by == "sequence":
                name = self.store.example_ids[found]
                place = self.store._places[name]
                hits.append(Hit(value, stderr, name, place.index, place.start, place.count))
                continue
            token = self.store.tokens(found, found + 1)
            numbers = (int(getattr(token, column)[0]) for column in COLUMNS)
            index = int(token.example_index[0])
            hits.append(Hit(value, stderr, token.example_id[0], index, found, 1, *numbers))
        return hits


SIGNS = ("both", "up", "down")

_ROWS = 2**32  # an index must fit into the low half of a key


class Layout(Protocol):
    """How features are to be read: what a sketch knows of the rows that it made.

    A layout with an attribute `linear` that is true promises that `value` and `estimate` are linear
    in each row; the standard error of a sum over tokens then comes from the sum of their rows. One
    with `samples(rows_a, rows_b)`, independent estimates (R, n, m) whose mean is `value`, has it
    from the spread of the summed samples.
    """

    @property
    def width(self) -> int:
        """Numbers in a row."""

    def value(self, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        """Estimated inner products of token gradients, (n, m)."""

    def estimate(self, rows_a: Tensor, rows_b: Tensor) -> Estimate:
        """The same with standard errors, (n, m)."""

    def to_json(self) -> dict[str, Any]:
        """Everything that defines the layout, as JSON."""


class Pairing:
    """Values and standard errors of (queries, rows) under a layout, or as plain inner products."""

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout

    def value(self, queries: Tensor, rows: Tensor) -> Tensor:
        """float32 (m, n) for (m, width) and (n, width)."""
        if self.layout is None:
            return queries @ rows.T
        return self.layout.value(queries, rows).float()

    def stderr(self, query: Tensor, rows: Tensor) -> tuple[Tensor, int | None]:
        """Standard errors (n,) of one query (1, width) with n rows, and how many samples say so."""
        if self.layout is None:
            return query.new_zeros(len(rows)), None
        estimate = self.layout.estimate(query, rows)
        return estimate.stderr[0].float(), estimate.samples

    def stderr_of_sum(self, query: Tensor, rows: Tensor) -> tuple[Tensor, int | None]:
        """Standard error () of the sum of the values over the rows.

        Errors of different tokens share the sketch and may add up: where the layout cannot say, the
        sum of the errors bounds that of the sum.
        """
        samples_of = getattr(self.layout, "samples", None)
        if samples_of is not None:
            sums = samples_of(query, rows).double().sum((1, 2))
            return (sums.std() / len(sums) ** 0.5).float(), len(sums)
        if getattr(self.layout, "linear", False):
            rows = rows.sum(0, keepdim=True)
        stderr, samples = self.stderr(query, rows)
        return stderr.sum(), samples


class TopK:
    """The best k of each query so far; blocks of values are added in any order.

    Args:
        k: How many to keep.
        sign: `"up"`: the largest values; `"down"`: the smallest; `"both"`: the largest in size.
    """

    def __init__(self, k: int, sign: str) -> None:
        self.k, self.sign = k, sign
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def add(self, values: Tensor, index: Tensor) -> None:
        """Values (m, n) float32 of the candidates with these indices (n,)."""
        keys = _keys(values, index, self.sign)
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 1)
            values = torch.cat([self.values, values], 1)
        self.keys, order = keys.topk(min(self.k, keys.shape[1]), dim=1)
        self.values = values.gather(1, order)

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices and values, (m, k) each, best first."""
        if self.keys is None or self.values is None:
            raise ValueError("nothing to choose from: no block was added")
        return (_ROWS - 1) - (self.keys & (_ROWS - 1)), self.values


def _keys(values: Tensor, index: Tensor, sign: str) -> Tensor:
    """int64 keys without ties: the order of the values in the high half, the index in the low."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError("an inner product is not finite: the features are too large for float32")
    score = {"up": values, "down": -values, "both": values.abs()}[sign]
    score = score + 0.0  # −0.0 and 0.0 are a tie
    bits = score.contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats sort as sign and magnitude
    return (ordered << 32) | ((_ROWS - 1) - index)


def strongest(
    queries: Tensor,
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]],
    k: int,
    pairing: Pairing,
    sign: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Indices and values (m, k) of the strongest candidates of each query.

    Args:
        queries: (m, width) float32.
        blocks: Makes a pass over the candidates: (rows (n, width), group (n,) int64 counted from 0,
            index (g,) int64). Values are summed within a group; index names the groups.
        k: How many to keep.
        pairing: What a value is.
        sign: As in `TopK`.
        chunk: Queries in a pass.
    """
    found = []
    for part in queries.split(chunk):
        best = TopK(k, sign)
        for rows, group, index in blocks():
            values = pairing.value(part, rows)
            if len(index) < len(rows):  # float64: the order of a sum then hardly matters
                sums = values.new_zeros(len(part), len(index), dtype=torch.float64)
                values = sums.index_add_(1, group, values.double()).float()
            best.add(values, index)
        found.append(best.result())
    return torch.cat([i for i, _ in found]), torch.cat([v for _, v in found])
