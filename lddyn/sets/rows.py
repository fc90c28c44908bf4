"""The gradients of all sequences of a set as rows, and their Gram.

Rows are the gradients themselves where they fit into memory, and sketches of them elsewhere. Under
Adam, rows of √P ∘ ∇θ log π have the inner products J P Jᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lddyn.engine.gram import sequence_gram
from lddyn.engine.logits import Response
from lddyn.engine.sharded import WHOLE, Shards, local
from lddyn.finite import checked
from lddyn.ranks import Ranks
from lddyn.sets.access import Access
from lddyn.sets.flat import Flat
from lddyn.sets.pairs import PairSet
from lddyn.sets.passes import Passes
from lddyn.sets.readings import Readings, ResponseReading, read_pair
from lddyn.sets.training_set import TrainingSet
from lddyn.sketches.allocation import dense_layout
from lddyn.sketches.dense_rows import DenseRows
from lddyn.sketches.pieces import Piece
from lddyn.sketches.sketch import Sketch

__all__ = [
    "SURVEY",
    "Direction",
    "Gram",
    "PairReader",
    "SetReading",
    "SetRows",
    "exact_bytes",
    "new_rows",
    "read_rows",
]

_WINDOW = 8  # rows that are read together: logits of a pair are kept until both are seen
SURVEY = 4  # sequences whose gradient norms divide a sketch's numbers among the parameters


@dataclass(frozen=True)
class Gram:
    """Inner products ⟨g_i, g_j⟩ of all sequences' gradients g = ∇θ log π(y | x).

    Attributes:
        value: (S, S) float64, laid out as `TrainingSet.examples`.
        stderr: Standard errors of `value` where gradients were sketched; None where it is exact.
        observed: (M, S): those of M observed sequences' gradients with all of the set's.
        observed_stderr: Standard errors of `observed`; None where it is exact.
    """

    value: Tensor
    stderr: Tensor | None = None
    observed: Tensor = field(default_factory=lambda: torch.empty(0))
    observed_stderr: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, stderr: Tensor | None, count: int) -> Gram:
        """The parts of inner products of all S + M sequences; `count` is S."""
        own, rest = slice(count), slice(count, None)
        if stderr is None:
            return cls(value[own, own], None, value[rest, own])
        return cls(value[own, own], stderr[own, own], value[rest, own], stderr[rest, own])


class SetReading(NamedTuple):
    """What a pass over a set reads.

    Attributes:
        log_probs: log π (sides, N) float64 nats.
        observed: log π of the observed sequences (M,) float64 nats.
        along: ⟨∇θ log π, d⟩ (D, S + M) float64, of D directions.
    """

    log_probs: Tensor
    observed: Tensor
    along: Tensor


class Direction(NamedTuple):
    """A direction d that gradients are paired with as they are made.

    Attributes:
        values: d by parameter, without those where it is 0.
        root: √P; the direction is then P ∘ d.
    """

    values: Mapping[str, Tensor]
    root: Flat | None = None

    def inner(self, piece: Piece) -> float:
        """Its part of ⟨∇θ log π, d⟩."""
        if piece.name not in self.values:
            return 0.0
        if self.root is not None:
            root = self.root.views[piece.name]
            piece = piece.scaled(root).scaled(root)
        return piece.inner(local(self.values[piece.name]))


class PairReader:
    """Reads what forward passes say of each pair, as soon as both of its responses are seen."""

    def __init__(self, pairs: PairSet) -> None:
        self._pairs = pairs
        self._waiting: dict[int, ResponseReading] = {}
        self._facts: dict[str, Tensor] = {}
        self._token_facts: dict[str, list[Tensor]] = {}

    def __call__(self, sequence: int, response: Response) -> None:
        """Reads a response; sequences are numbered as in `PairSet.examples`."""
        reading, n = ResponseReading.of(response), len(self._pairs)
        mate = sequence + n if sequence < n else sequence - n
        other = self._waiting.pop(mate, None)
        if other is None:
            self._waiting[sequence] = reading
            return
        up, down = (reading, other) if sequence < n else (other, reading)
        pair = sequence % n
        facts, token_facts = read_pair(*self._pairs[pair], up, down)
        for name, value in facts.items():
            column = self._facts.setdefault(name, torch.zeros(n, dtype=torch.float64))
            column[pair] = value
        for name, values in token_facts.items():
            self._token_facts.setdefault(name, [torch.empty(0)] * n)[pair] = values

    def readings(self, reading: SetReading, ranks: Ranks) -> Readings:
        """All readings, after every response was seen by one of the processes.

        Args:
            reading: What `read_rows` returned.
            ranks: Processes that have read some pairs each.
        """
        for facts in ranks.gather({k: v.tolist() for k, v in self._facts.items()}):
            for name in facts:
                self._facts.setdefault(name, torch.zeros(len(self._pairs), dtype=torch.float64))
        ranks.add_up(*self._facts.values())
        told = {k: [x.tolist() for x in v] for k, v in self._token_facts.items()}
        for other in ranks.gather(told):
            for name, lists in other.items():
                column = self._token_facts.setdefault(name, [torch.empty(0)] * len(self._pairs))
                for pair, values in enumerate(lists):
                    if values and not len(column[pair]):
                        column[pair] = torch.tensor(values, dtype=torch.float64)
        return Readings(reading.log_probs, self._facts, self._token_facts, reading.observed)


@dataclass(frozen=True)
class SetRows:
    """Rows of some of a set's sequences under one diagonal metric.

    Attributes:
        dense: The rows; where they are exact, of the plain gradients.
        numbers: The sequences they are of, numbered as in `TrainingSet.sequences`.
        root: √P that sketched rows were multiplied by; None: ones.
        shards: How exact rows are divided among processes.
    """

    dense: DenseRows
    numbers: Sequence[int]
    root: Flat | None = None
    shards: Shards = WHOLE

    def empty(self, numbers: Sequence[int]) -> SetRows:
        """Empty rows of these sequences under the same metric."""
        return replace(self, dense=self.dense.empty(len(numbers)), numbers=numbers)

    def first(self, numbers: Sequence[int]) -> SetRows:
        """The same memory, as rows of these sequences."""
        return replace(self, dense=self.dense.first(len(numbers)), numbers=numbers)

    def gram(self, set_: TrainingSet, diagonal: Tensor | None = None) -> Gram:
        """J P Jᵀ, of rows of all sequences.

        Args:
            set_: The set; equal responses of a pair get equal entries.
            diagonal: P (P,), for exact rows.
        """
        same, count = set_.representatives, len(set_.examples)
        if self.dense.exact:
            whole = sequence_gram(self.dense.rows, diagonal)
            self.shards.add_up(whole)
            whole = whole[same][:, same]
            checked(whole, "the Gram matrix of the set", self.dense.rows.dtype)
            return Gram.of(whole, None, count)
        estimate = self.dense.gram()
        value, stderr = (x.double().cpu()[same][:, same] for x in (estimate.value, estimate.stderr))
        checked(value, "the Gram matrix of the set", self.dense.rows.dtype)
        return Gram.of(value, stderr, count)


def exact_bytes(sequences: int, size: int, number: int, run: bool) -> int:
    """Bytes of exact rows.

    Args:
        sequences: Number of sequences.
        size: Number of trainable values.
        number: Bytes of one.
        run: Whether a run is predicted, which pairs rows of two points of the run.
    """
    return (2 if run else 1) * sequences * size * number


def new_rows(
    access: Access,
    passes: Passes,
    set_: TrainingSet,
    sketch: Sketch | None,
    root: Flat | None = None,
) -> SetRows:
    """Empty rows: of whole gradients, or of sketches whose numbers go where gradients are large.

    Args:
        access: The model.
        passes: Passes over the set.
        set_: The set.
        sketch: How gradients are sketched; None: not at all.
        root: √P, by which sketched gradients are multiplied.

    Cost: with a sketch, passes over four sequences.
    """
    squares: dict[str, float] = {}
    if sketch is not None:

        def note(_: int, piece: Piece) -> None:
            scaled = piece if root is None else piece.scaled(root.views[piece.name])
            square = float(torch.linalg.vector_norm(scaled.whole().value)) ** 2
            squares[piece.name] = squares.get(piece.name, 0.0) + square

        n = len(set_)
        numbers = [i + side * n for i in range(n) for side in range(set_.sides)]
        passes.gradients(set_.sequences, numbers[:SURVEY], note)
    parameters = access.named
    split = sketch is None and access.shards.split
    if split:
        parameters = {name: local(p) for name, p in parameters.items()}
    layout = dense_layout(sketch, parameters, squares, access.looked_up)
    count = len(set_.sequences)
    dense = DenseRows(layout, parameters, count, split=split)
    return SetRows(dense, range(count), root, access.shards)


def read_rows(
    passes: Passes,
    set_: TrainingSet,
    rows: Sequence[SetRows] = (),
    *,
    reader: Callable[[int, Response], None] | None = None,
    along: Sequence[Direction] = (),
) -> SetReading:
    """One pass over the set and what is observed: fills rows, and reads the responses.

    Args:
        passes: Passes over the set.
        set_: The set.
        rows: What is filled, all of the same sequences; the other sequences are only read.
        reader: Gets every response of the set, numbered as in `TrainingSet.examples`.
        along: Directions whose inner products with all gradients are wanted.

    Cost: a forward pass a sequence; for those of the rows also a backward pass.
    """
    n, sequences, trained = len(set_), set_.sequences, len(set_.examples)
    log_probs = torch.zeros(len(sequences), dtype=torch.float64)
    inner = torch.zeros(len(along), len(sequences), dtype=torch.float64)
    place = {number: row for kept in rows[:1] for row, number in enumerate(kept.numbers)}
    for kept in rows:
        kept.dense.rows.zero_()

    def see(number: int, response: Response) -> None:
        log_probs[number] = response.log_probs.detach().double().sum()
        if reader is not None and number < trained:
            reader(number, response)

    def take(number: int, piece: Piece) -> None:
        for kept in rows:
            scaled = piece if kept.root is None else piece.scaled(kept.root.views[piece.name])
            kept.dense.add(place[number], scaled)
        for place_of, direction in enumerate(along):
            inner[place_of, number] += direction.inner(piece)

    windows = [range(start, min(n, start + _WINDOW)) for start in range(0, n, _WINDOW)]
    starts = range(trained, len(sequences), 2 * _WINDOW)
    observed = [[*range(i, min(len(sequences), i + 2 * _WINDOW))] for i in starts]
    together = [[side * n + i for side in range(set_.sides) for i in w] for w in windows]
    for part in passes.ranks.share([*together, *observed]):
        filled = [i for i in part if i in place]
        if filled:
            passes.gradients(sequences, filled, take, see)
        passes.forward(sequences, [i for i in part if i not in place], see)
    passes.ranks.add_up(log_probs, inner)
    passes.access.shards.add_up(inner)
    passes.ranks.add_up(*(kept.dense.rows for kept in rows))
    return SetReading(log_probs[:trained].view(-1, n), log_probs[trained:], inner)
