"""Searching a store: which stored rows have the strongest inner products with a few query rows.

Exact: every pair is computed, block by block, and the best k of each query are kept. Ties go to the
lower row, whatever the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lddyn.cells import Grid
from lddyn.data.token_table import COLUMNS
from lddyn.estimate import Estimate
from lddyn.files import JsonObject
from lddyn.memory import parse_memory
from lddyn.results import Result
from lddyn.store.contents import Contents

__all__ = ["Hit", "Hits", "InnerProduct"]

SIGNS = ("both", "up", "down")

_QUERIES = 1024  # in one pass over the store

_ROWS = 2**32  # an index must fit into the low half of a key


@dataclass(frozen=True)
class Hit:
    """One stored token, or sequence, and its inner product with a query.

    Attributes:
        value: Inner product of features: positive values raise the query's token, negative ones
            lower it.
        stderr: Standard error of the value; 0 where the value is exact for the features.
        example_id: `Example.content_id`.
        example_index: Index of the example in the data set.
        row: Row of the store; the example's first row for a sequence.
        tokens: Number of stored rows that the value sums over; 1 for a token.
        response_index: Index of the token in the response; None for a sequence.
        position: Logit column that predicts the token; None for a sequence.
        token_id: Id of the token; None for a sequence.
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

    def explain(self) -> str:
        """One line: value ± standard error, and which token or sequence it is.

        Example:
            >>> from lddyn.store.query import Hit
            >>> Hit(-2.0, 0.25, "1f2e", 7, 40, 1, 3, 9, 5).explain()
            '-2 ± 0.25  token 3 (id 5) of example 7 (1f2e)'
        """
        error = f" ± {self.stderr:.2g}" if self.stderr else ""
        return f"{self.value:+.4g}{error}  {self.place}"

    @property
    def place(self) -> str:
        """Which token or sequence it is."""
        what = "all" if self.tokens == 1 else f"all {self.tokens} tokens"
        if self.token_id is not None:
            what = f"token {self.response_index} (id {self.token_id})"
        return f"{what} of example {self.example_index} ({self.example_id})"


@dataclass(frozen=True)
class Hits(Result):
    """The strongest stored tokens, or sequences, for each of m queries, best first.

    `hits[q]` is a list of the k `Hit`s of query q. Made by `Store.query`.

    Attributes:
        by: `"token"` or `"sequence"`.
        index: (m, k) int64: rows of the store, or numbers of its examples in stored order.
        estimate: Values and standard errors, (m, k) float32.
    """

    by: str
    index: Tensor
    estimate: Estimate
    contents: Contents = field(repr=False)
    whole: bool = field(default=False, repr=False)  # each stored row is a whole sequence

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.index)

    def __getitem__(self, query: int) -> list[Hit]:
        """The hits of one query, best first."""
        values, errors = self.estimate.value[query].tolist(), self.estimate.stderr[query].tolist()
        numbers = self.index[query].tolist()
        of = self._sequence if self.by == "sequence" else self._row
        return [of(*each) for each in zip(numbers, values, errors, strict=True)]

    def _sequence(self, number: int, value: float, stderr: float) -> Hit:
        name = self.contents.example_ids[number]
        place = self.contents.places[name]
        return Hit(value, stderr, name, place.index, place.start, place.count)

    def _row(self, row: int, value: float, stderr: float) -> Hit:
        token = self.contents.tokens(row, row + 1)
        name, index = token.example_id[0], int(token.example_index[0])
        if self.whole:
            return Hit(value, stderr, name, index, row, 1)
        columns = (int(getattr(token, column)[0]) for column in COLUMNS)
        return Hit(value, stderr, name, index, row, 1, *columns)

    def __repr__(self) -> str:
        m, k = self.index.shape
        values = self.estimate.value
        return (
            f"Hits(the {k} strongest {self.by}s for each of {m} queries, values from "
            f"{float(values.min()):.4g} to {float(values.max()):.4g})"
        )

    def summary(self) -> JsonObject:
        """What was searched for and the range of the values, JSON-safe."""
        m, k = self.index.shape
        values = self.estimate.value
        return {
            "by": self.by,
            "queries": m,
            "k": k,
            "smallest": float(values.min()),
            "largest": float(values.max()),
        }

    def explain(self) -> str:
        """One line for each hit, under a line for each query."""
        lines = []
        for query in range(len(self)):
            lines.append(f"query {query}")
            lines += [f"  {hit.explain()}" for hit in self[query]]
        return "\n".join(lines)

    def _grids(self) -> list[Grid]:
        return [
            Grid(
                f"query {query}",
                ["value", "± (standard error)"],
                [(hit.place, [hit.value, hit.stderr]) for hit in self[query]],
            )
            for query in range(min(3, len(self)))
        ]

    def _caption(self) -> str:
        return repr(self)

    def to_dict(self) -> JsonObject:
        """All hits, JSON-safe: {"by", "queries": [[fields of each `Hit`] for each query]}."""
        queries = [[asdict(hit) for hit in self[query]] for query in range(len(self))]
        return {"by": self.by, "queries": queries}


class InnerProduct(Protocol):
    """How two feature rows make an inner product: what a store needs of a sketch's `Layout`.

    Two attributes are optional. `linear = True` promises that `value` and `estimate` are linear in
    each row, so that the standard error of a sum over tokens is that of the sum of their rows.
    `samples(rows_a, rows_b)` returns independent estimates (R, n, m) whose mean is `value`; the
    standard error of a sum over tokens is then the spread of the summed samples.
    """

    @property
    def width(self) -> int:
        """Numbers in a row."""

    def value(self, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        """Estimated inner products of token gradients, (n, m)."""

    def estimate(self, rows_a: Tensor, rows_b: Tensor) -> Estimate:
        """The same with standard errors, (n, m)."""

    def to_dict(self) -> JsonObject:
        """Everything that defines the inner product, as JSON."""


class Pairing:
    """Values and standard errors of (queries, rows), by a layout or as plain inner products."""

    def __init__(self, layout: InnerProduct | None) -> None:
        self.layout = layout

    def value(self, queries: Tensor, rows: Tensor) -> Tensor:
        """float32 (m, n) for (m, width) and (n, width)."""
        if self.layout is None:
            return queries @ rows.T
        return self.layout.value(queries, rows).float()

    def stderr(self, query: Tensor, rows: Tensor) -> tuple[Tensor, int | None]:
        """Standard errors (n,) of one query (1, width) with n rows, and the number of samples."""
        if self.layout is None:
            return query.new_zeros(len(rows)), None
        estimate = self.layout.estimate(query, rows)
        return estimate.stderr[0].float(), estimate.samples

    def stderr_of_sum(self, query: Tensor, rows: Tensor) -> tuple[Tensor, int | None]:
        """Standard error () of the sum of the values over the rows, and the number of samples.

        Errors of different tokens come from the same sketch and may add up. A layout without
        `samples` that is not linear cannot say by how much: the sum of the errors is then returned,
        which bounds the error of the sum.
        """
        samples_of = getattr(self.layout, "samples", None)
        if samples_of is not None:
            sums = samples_of(query, rows).double().sum((1, 2))
            return (sums.std() / len(sums) ** 0.5).float(), len(sums)
        if getattr(self.layout, "linear", False):
            rows = rows.sum(0, keepdim=True)
        stderr, samples = self.stderr(query, rows)
        return stderr.sum(), samples


def search(
    contents: Contents,
    rows: Tensor,
    k: int,
    layout: InnerProduct | None,
    *,
    sign: str,
    by: str,
    exclude: Collection[str],
    memory: int | str,
    whole: bool,
) -> Hits:
    """The k strongest stored tokens, or sequences, for each query; see `Store.query`.

    Args:
        contents: The store's rows.
        rows: Queries (m, width).
        k: Hits for each query.
        layout: How rows are compared; None: by their plain inner product.
        sign: As in `TopK`.
        by: `"token"` or `"sequence"`.
        exclude: Content ids of examples to leave out.
        memory: Bytes for a block of rows and its values.
        whole: Whether each stored row is a whole sequence.

    Raises:
        ValueError: If an argument is not of this kind, or no example is left.
    """
    width = contents.shards.width
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) < 1:
        raise ValueError(f"rows must be (m, {width}), got {tuple(rows.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, value, known in (("sign", sign, SIGNS), ("by", by, ("token", "sequence"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    places = contents.places
    excluded = torch.tensor([places[name].number for name in exclude if name in places])
    if len(excluded) == len(places):
        raise ValueError(
            f"nothing to choose from: {len(contents)} tokens of {len(places)} examples in "
            f"{contents.shards.path}, {len(excluded)} examples excluded"
        )
    queries, pairing = rows.detach().float(), Pairing(layout)
    chunk = min(len(queries), _QUERIES)
    # Bytes of a row: itself, its float32 copy, and for each query values, keys and their parts.
    step = max(1, parse_memory(memory) // (8 * width + 48 * chunk))

    def one_pass() -> Iterator[Block]:
        return blocks(contents, by, step, excluded, queries.device)

    index, values = strongest(queries, one_pass, k, pairing, sign, chunk)
    stderr, samples = torch.zeros_like(values), None
    if layout is not None:
        for query, numbers, out in zip(queries.split(1), index.tolist(), stderr, strict=True):
            if by == "token":
                hits = torch.cat([contents.rows(i, i + 1) for i in numbers]).to(query)
                out[:], samples = pairing.stderr(query, hits)
                continue
            for column, number in enumerate(numbers):
                place = places[contents.example_ids[number]]
                hits = contents.rows(place.start, place.start + place.count).to(query)
                out[column], samples = pairing.stderr_of_sum(query, hits)
    return Hits(by, index, Estimate(values, stderr, samples), contents, whole)


# Rows (n, width) float32; the group of each row (n,), counted from 0; what the groups are called
# (g,): rows of the store, or numbers of its examples.
Block = tuple[Tensor, Tensor, Tensor]


def blocks(
    contents: Contents, by: str, step: int, excluded: Tensor, device: torch.device
) -> Iterator[Block]:
    """Yields all rows that are not excluded, at most `step` at a time (more for a long sequence).

    By token each row stands for itself, and the groups are not used.
    """
    first_example = 0
    for number, record in enumerate(contents.records):
        shard = contents.shard(number)
        counts = torch.tensor([count for _, _, count in record.examples])
        examples = torch.arange(first_example, first_example + len(counts))
        owner = examples.repeat_interleave(counts)
        first_example += len(counts)
        bounds = list(range(0, record.rows, step))
        if by == "sequence":  # whole examples, as many as fit
            bounds = [0]
            ends = counts.cumsum(0).tolist()
            for before, end in pairwise(ends):
                if end - bounds[-1] > step:
                    bounds.append(before)
        for start, stop in pairwise([*bounds, record.rows]):
            keep = torch.arange(start, stop)
            if len(excluded):
                keep = keep[~torch.isin(owner[start:stop], excluded)]
                if not len(keep):
                    continue
            rows = shard.rows[start:stop] if len(keep) == stop - start else shard.rows[keep]
            called, group = torch.unique_consecutive(owner[keep], return_inverse=True)
            if by == "token":
                called = keep + shard.start
            yield rows.to(device, torch.float32), group.to(device), called.to(device)


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
    one_pass: Callable[[], Iterable[Block]],
    k: int,
    pairing: Pairing,
    sign: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Indices and values (m, k) of the strongest candidates of each query.

    Args:
        queries: (m, width) float32.
        one_pass: Starts a pass over all candidates. Values are summed within a group of a block.
        k: How many to keep.
        pairing: What a value is.
        sign: As in `TopK`.
        chunk: Queries in a pass.
    """
    results = []
    for part in queries.split(chunk):
        best = TopK(k, sign)
        for rows, group, index in one_pass():
            values = pairing.value(part, rows)
            if len(index) < len(rows):  # float64: the order of a sum then hardly matters
                sums = values.new_zeros(len(part), len(index), dtype=torch.float64)
                values = sums.index_add_(1, group, values.double()).float()
            best.add(values, index)
        results.append(best.result())
    return torch.cat([i for i, _ in results]), torch.cat([v for _, v in results])
