"""Batched passes over the sequences of a set, on the model's device; nothing grows with the set.

Sequences of nearly one length share a forward and a backward pass. A gradient is handed out one
parameter at a time and dropped. Where a model has no Anatomy, sequences pass one by one through
the model itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import Response, own_response
from lddyn.engine.sequences import batches, pass_together, pull_sequences
from lddyn.engine.sharded import reshard
from lddyn.engine.trace import Batch
from lddyn.ranks import ALONE, Ranks
from lddyn.sets.access import Access
from lddyn.sets.bar import Bar
from lddyn.sets.flat import Flat
from lddyn.sketches.gradients import CHUNK, Batching, Gradients, wide
from lddyn.sketches.pieces import Piece, pieces_of, pieces_of_sum

__all__ = ["BACKWARD", "FORWARD", "Passes", "batching_of"]

FORWARD, BACKWARD = 1, 3  # costs of a sequence's pass: forward alone, forward and backward

See = Callable[[int, Response], None]  # a sequence's number and the outputs of its forward pass
Take = Callable[[int, Piece], None]  # a sequence's number and a piece of its gradient


def batching_of(access: Access, longest: Example, memory: int) -> Batching:
    """How many sequences share a pass.

    Args:
        access: The model.
        longest: The longest sequence; a batch of such sequences fits into memory.
        memory: Workspace in bytes for a batch.

    Cost: a forward pass.
    """
    if access.unavailable:
        return Batching(1, keep_graphs=False, least=0)
    return Batching.of(access.anatomy.trace(longest), len(longest), CHUNK, memory)


class Passes:
    """Passes over sequences: forward alone, one gradient a sequence, or a weighted sum of them.

    Args:
        access: The model.
        batching: How many sequences share a pass, by `batching_of`.
        bar: Advanced by the cost of each sequence's pass, in all processes.
        ranks: Processes that divide the sequences.
    """

    def __init__(
        self,
        access: Access,
        batching: Batching,
        bar: Bar,
        ranks: Ranks = ALONE,
    ) -> None:
        self.access, self.bar, self.ranks = access, bar, ranks
        self._batching = batching

    def advance(self, work: int) -> None:
        """Counts work of this process, and as much of each other one."""
        self.bar.advance(work * self.ranks.world)

    def forward(self, examples: Sequence[Example], numbers: Sequence[int], see: See) -> None:
        """`see(number, response)` for the examples of these numbers.

        Cost: a forward pass a sequence.
        """
        if self.access.unavailable:
            with evaluating(self.access.model), torch.no_grad():
                for i in numbers:
                    see(i, own_response(self.access.model, examples[i]))
                    self.advance(FORWARD)
            reshard(self.access.model)
            return
        some = [examples[i] for i in numbers]
        for length, index in batches(self.access.anatomy, some, CHUNK):
            with self._pass(some, index, length, keep=False) as batch:
                for place, i in enumerate(index):
                    positions = torch.tensor(some[i].positions, device=batch.hidden.device)
                    hidden = batch.hidden[place, positions]
                    targets = torch.tensor(some[i].targets, device=hidden.device)
                    logits, _ = self.access.anatomy.head_logits(hidden)
                    see(
                        numbers[i],
                        Response(logits, self.access.anatomy.head.plain(hidden), targets),
                    )
            self.advance(FORWARD * len(index))

    def gradients(
        self,
        examples: Sequence[Example],
        numbers: Sequence[int],
        take: Take,
        see: See | None = None,
    ) -> None:
        """∇θ log π of the examples of these numbers, piece by piece: `take(number, piece)`.

        Args:
            examples: All sequences.
            numbers: Those whose gradients are taken.
            take: Gets each piece; the gradient of a sequence is the sum of its pieces.
            see: Gets every response, before its gradient.

        Cost: a forward and a backward pass a sequence.
        """
        if self.access.unavailable:
            self._own_gradients(examples, numbers, take, see)
            return

        def visit(index: Sequence[int], part: Sequence[int], gradients: Gradients) -> None:
            for place, sequence in enumerate(part):
                for piece in pieces_of(gradients, place):
                    take(numbers[index[sequence]], piece)

        some = [examples[i] for i in numbers]
        self._pull(some, None, visit, see and (lambda i, response: see(numbers[i], response)))

    def sum_gradients(self, examples: Sequence[Example], weights: Tensor, into: Flat) -> None:
        """Sets a vector of all trainable values to Σ_i w_i ∇θ log π(y_i).

        The processes divide the sequences, and the sum is the same in all of them.

        Args:
            examples: The sequences; those of weight 0 are left out.
            weights: w (n,).
            into: The vector.

        Cost: a forward and a backward pass a sequence.
        """
        into.vector.zero_()
        wanted = [i for i, w in enumerate(weights.tolist()) if w]
        self.bar.advance(BACKWARD * (len(examples) - len(wanted)))
        self._add_share(examples, weights, self.ranks.share(wanted), into.views)
        self.ranks.add_up(into.vector)

    def _add_share(
        self,
        examples: Sequence[Example],
        weights: Tensor,
        wanted: Sequence[int],
        into: Mapping[str, Tensor],
    ) -> None:
        """Adds the part of one process to a sum of gradients."""
        examples, factors = [examples[i] for i in wanted], [float(weights[i]) for i in wanted]
        if self.access.unavailable:
            numbers = range(len(examples))
            self._own_gradients(
                examples, numbers, lambda i, piece: piece.add_to(into[piece.name], factors[i])
            )
            return

        def visit(index: Sequence[int], part: Sequence[int], gradients: Gradients) -> None:
            for piece in pieces_of_sum(gradients):
                piece.add_to(into[piece.name])

        self._pull(examples, factors, visit)

    # ----- one batch

    @contextlib.contextmanager
    def _pass(
        self, examples: Sequence[Example], index: Sequence[int], length: int, keep: bool
    ) -> Iterator[Batch]:
        """The forward pass of some of the examples, within an analysis of the model."""
        anatomy = self.access.anatomy
        with anatomy.analysis():
            yield pass_together(anatomy, [examples[i] for i in index], length, keep)

    def _pull(
        self,
        examples: Sequence[Example],
        weights: Sequence[float] | None,
        visit: Callable[[Sequence[int], Sequence[int], Gradients], None],
        see: See | None = None,
    ) -> None:
        """`visit(numbers of the batch, places of the sequences in it, gradients)`, by segments."""
        anatomy, batching = self.access.anatomy, self._batching
        for length, index in batches(anatomy, examples, batching.size):
            with self._pass(examples, index, length, batching.keep_graphs) as batch:
                some = [examples[i] for i in index]
                given = [
                    None if weights is None else batch.hidden.new_full((len(e),), weights[i])
                    for i, e in zip(index, some, strict=True)
                ]
                for part, factors in pull_sequences(anatomy, some, given, batch):
                    head = factors.head  # of one sequence
                    if see is not None and head is not None:
                        i = int(part)
                        at = torch.tensor(some[i].positions, device=batch.hidden.device)
                        hidden = anatomy.head.plain(batch.hidden[i, at])
                        see(index[i], Response(head.logits, hidden, head.targets))
                    visit(index, part.tolist(), Gradients.of(factors, anatomy))
            self.advance(BACKWARD * len(index))

    def _own_gradients(
        self,
        examples: Sequence[Example],
        numbers: Sequence[int],
        take: Take,
        see: See | None = None,
    ) -> None:
        """Gradients by plain backward passes of the model itself."""
        with evaluating(self.access.model), torch.enable_grad():
            for i in numbers:
                response = own_response(self.access.model, examples[i])
                if see is not None:
                    see(i, response)
                gradient = self.access.own_gradient(response.log_probs.sum())
                for name, value in gradient.items():
                    take(i, Piece(name, wide(value)))
                self.advance(BACKWARD)
