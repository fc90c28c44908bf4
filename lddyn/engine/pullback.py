"""Token gradients as factors, block by block: many cotangents are pulled back through one forward.

A cotangent v_m in R^V belongs to the logits at one response position p_m. Pulled back through the
head it is g_m = Wᵀ v_m. Pulled back through a segment, it has at every tap a factor δ_m, the
gradient at the tap's output. The gradient of a weight is Σ_t δ_m[t] ⊗ x[t]; it is never formed.
By causality δ_m[t] = 0 for t > p_m. Chunks of cotangents sorted by position are therefore pulled
back through a prefix of the sequence only.

Cost of one cotangent: 2 N (p_m + 1) FLOPs, N the block-linear parameters, plus one forward replay
of the prefix per chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn import ops
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.backward_check import check_pull
from lddyn.engine.factors import BodyRows, Factors, HeadFactor, pull
from lddyn.engine.rowwise import pull_rows
from lddyn.engine.trace import Trace
from lddyn.memory import is_out_of_memory


def reach(position: int, length: int) -> int:
    """Tokens to replay for a cotangent at a position, rounded up to 16, so that sizes repeat."""
    return min(position // 16 * 16 + 16, length)


@dataclass
class Chunk:
    """Cotangents that are pulled back together.

    Attributes:
        rows: Their indices among all rows, (c,).
        length: Tokens of the prefix that holds all of them.
        state: Cotangents of the current segment's output: (c, d) at the tokens' own positions above
            the last attention, (c, 1, t, d) below it.
    """

    rows: Tensor
    length: int
    state: Tensor


class Pullback:
    """Cotangents of one trace on their way from the head to the embeddings.

    Args:
        trace: The stored forward pass.
        rows: Cotangents on the logits, (M, V); row m belongs to trace.positions[m]. Default: the
            log-prob rows e_y − π, which are formed for the head alone and not kept. Or cotangents
            at the head's input, whose products leave out those of the head with itself.
        select: Rows to pull back (default: all).
        chunk: Cotangents per chunk; small chunks are truncated tighter, large ones share the
            replay of the segment.

    Use it top-down: `head_factors()` once, then `step(segment)` for segment = B + 1, B, …, 0; each
    step yields (row indices, Factors) per chunk and moves the states one segment down.
    """

    def __init__(
        self,
        trace: Trace,
        rows: Tensor | BodyRows | None = None,
        select: Tensor | None = None,
        chunk: int = 16,
    ):
        self.trace = trace
        self.anatomy: Anatomy = trace.anatomy
        check_pull(self.anatomy, trace.example)
        count = torch.arange(len(trace.positions), device=trace.positions.device)
        order = count if select is None else select
        order = order[trace.positions[order].argsort(stable=True)]
        self.selected = order
        if isinstance(rows, BodyRows):
            self.head = self._body_head(rows[order])
            g = rows.hidden[order].to(trace.hidden.dtype)
        else:
            self.head = logits_head(trace, rows, order)
            g = self.anatomy.head.back_project(self.head.rows).to(trace.hidden.dtype)
        self.chunks: list[Chunk] = []
        for part, state in zip(order.split(chunk), g.split(chunk), strict=True):
            length = self.anatomy.prefix(
                trace, reach(int(trace.positions[part].max()), trace.length)
            )
            self.chunks.append(Chunk(part, length, state))

    def _body_head(self, rows: BodyRows) -> HeadFactor:
        trace, order = self.trace, self.selected
        weight = self.anatomy.head_weight if self.anatomy.tied else None
        hidden, targets = self.anatomy.head.own(trace.hidden[order]), trace.targets[order]
        return HeadFactor(weight, None, hidden, rows.picked, trace.logits, targets, rows.ids)

    def head_factors(self) -> Factors:
        """Factors of the head for the selected rows, in position order."""
        return Factors(head=self.head)

    def step(self, segment: int) -> Iterator[tuple[Tensor, Factors]]:
        """Pulls every chunk through one segment; yields its rows and factors.

        A chunk that does not fit is halved, down to one cotangent, before the allocator's error is
        passed on.
        """
        pending, done = self.chunks, []
        self.chunks = []  # a state is freed when it has moved
        while pending:
            chunk = pending.pop(0)
            try:
                state, factors = self._pull(segment, chunk)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(chunk.rows) == 1:
                    raise
                half = len(chunk.rows) // 2
                pending[:0] = [
                    Chunk(chunk.rows[:half], chunk.length, chunk.state[:half].clone()),
                    Chunk(chunk.rows[half:], chunk.length, chunk.state[half:].clone()),
                ]
                del error
                continue
            done.append(Chunk(chunk.rows, chunk.length, state))
            yield chunk.rows, factors
        self.chunks = done

    def _pull(self, segment: int, chunk: Chunk) -> tuple[Tensor, Factors]:
        state = chunk.state
        pulled, routed = None, False
        by_row = not self.anatomy.joined and segment >= len(self.anatomy.blocks)
        if state.dim() == 2 and by_row:
            pulled = pull_rows(self.trace, segment, chunk.rows, chunk.length, state)
        if pulled is None:
            if state.dim() == 2:
                dense = state.new_zeros(len(state), 1, chunk.length, state.shape[-1])
                dense[torch.arange(len(state)), 0, self.trace.positions[chunk.rows]] = state
                state = dense
            replay = self.anatomy.replay(self.trace, segment, chunk.length)
            pulled, routed = pull(replay, state), replay.routed
        state, factors = pulled
        lengths = self.trace.positions[chunk.rows] + 1
        if not routed and factors.in_order(lengths, chunk.length):
            factors.lengths, factors.tokens = lengths, chunk.length
        return state, factors


def logits_head(trace: Trace, rows: Tensor | None, order: Tensor | None = None) -> HeadFactor:
    """The head's factors of cotangents on the logits.

    Args:
        trace: The stored forward pass.
        rows: Cotangents (M, V), or None for e_y − π, as of `Pullback`.
        order: Some of the response tokens; default: all in their order.

    Raises:
        ValueError: If the cotangents have another shape than the logits.
    """
    if rows is None and trace.slope is not None:
        rows = ops.residual(trace.logits, trace.targets)[0]
    if rows is not None and rows.shape != trace.logits.shape:
        raise ValueError(
            f"cotangents must be (tokens, vocabulary) = {tuple(trace.logits.shape)}, got "
            f"{tuple(rows.shape)}"
        )
    every = order is None or torch.equal(order, torch.arange(len(trace.logits)).to(order))
    at = slice(None) if every else order
    if rows is not None:
        rows = rows[at].to(trace.logits.dtype)
        rows = rows if trace.slope is None else rows * trace.slope[at]
    head = trace.anatomy.head
    names = trace.anatomy.head_weight, trace.anatomy.head_bias
    hidden = head.own(trace.hidden[at])
    return HeadFactor(*names, hidden, rows, trace.logits[at], trace.targets[at])


def segments_down(anatomy: Anatomy) -> Iterable[int]:
    """Segments from the tail to the lowest one that holds a trainable parameter."""
    return range(len(anatomy.segments) - 1, anatomy.lowest_segment() - 1, -1)
