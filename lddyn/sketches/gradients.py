"""Token gradients, one segment of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import Factors, HeadFactor, summed
from lddyn.engine.gram import Side
from lddyn.engine.pullback import Pullback, segments_down
from lddyn.engine.sequences import batches, pass_together, pull_sequences
from lddyn.engine.trace import Trace
from lddyn.sketches.layout import Layout
from lddyn.sketches.projections import (
    Term,
)


@dataclass
class Gradients:
    """Token gradients of one segment for c cotangents: weights as terms, all else as vectors.

    weights: (name, with "[e]" for a packed expert) -> terms in the weight's own shape.
    """

    weights: dict[str, list[Term]]
    vectors: dict[str, Tensor]  # (c, n)
    head: HeadFactor | None = None

    @classmethod
    def of(cls, factors: Factors, anatomy: Anatomy) -> Gradients:
        """From a pullback's factors. A padding token's embedding row stays zero: see `pair`."""
        found = cls({}, {}, factors.head)
        for tap, grads in factors.taps:
            delta = wide(grads)
            if tap.bias is not None:
                found.add(tap.bias, summed(delta), anatomy)
            if tap.weight is None:
                continue
            if tap.kind == "embedding":
                if tap.padding is not None:
                    delta = delta * tap.updated()[..., None]
                term = Term(tap.activations, delta)
            else:
                x = wide(tap.activations)
                if delta.dim() == 2:  # cotangent m has row m for its own
                    delta, x = delta[:, None], x[:, None]
                term = Term(delta, x) if tap.kind == "linear" else Term(x, delta)
            found.weights.setdefault(tap.weight, []).append(term)
        for name, gradient in factors.direct.items():
            found.add(name, wide(gradient), anatomy)
        return found

    def add(self, name: str, gradient: Tensor, anatomy: Anatomy) -> None:
        """One more use of a parameter that is a vector here; "[e]": a row of a packed one."""
        base = base_name(name)
        if base != name:
            packed = gradient.new_zeros(len(gradient), *anatomy.trainable[base].shape)
            packed[:, int(name[len(base) + 1 : -1])] = gradient
            gradient = packed
        flat = gradient.flatten(1)
        self.vectors[base] = self.vectors[base] + flat if base in self.vectors else flat


def base_name(name: str) -> str:
    """Canonical parameter name of a weight or of a packed expert of it."""
    return name[: name.rindex("[")] if name.endswith("]") else name


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def walk(
    trace: Trace,
    weights: Tensor | None,
    select: Tensor | None,
    chunk: int,
    visit: Callable[[Tensor, Gradients], None],
) -> None:
    """Pulls the cotangents of a trace down, and shows each chunk's gradients of each segment."""
    anatomy = trace.anatomy
    with anatomy.analysis():
        pull = Pullback(trace, _weighted(trace, weights), select, chunk)
        visit(pull.selected, Gradients.of(pull.head_factors(), anatomy))
        for segment in segments_down(anatomy):
            for selected, factors in pull.step(segment):
                visit(selected, Gradients.of(factors, anatomy))


@dataclass(frozen=True)
class Room:
    """How many sequences share a pass, and whether it keeps its segments' graphs.

    least: bytes of one sequence whose segments are replayed.
    """

    size: int
    keep: bool
    least: int

    @classmethod
    def of(
        cls, trace: Trace, tokens: int, chunk: int, free: int, layout: Layout | None = None
    ) -> Room:
        """For sequences as long as the traced one, of at most so many counted tokens."""
        element = trace.logits.element_size()
        least = sequence_bytes(
            layout, Side(trace).bytes_per_cotangent(), tokens * trace.anatomy.vocabulary, element
        )
        # Measured: twice what the products put out. Attention and activations vary.
        kept = least + 3 * element * sum(work.elements for work in trace.work.values())
        size = min(chunk, free // kept)
        return cls(max(1, size), size > 0 and not trace.anatomy.streamed, least)


def walk_sequences(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor] | None,
    room: Room,
    visit: Callable[[Tensor, Gradients], None],
    bar: tqdm | None = None,
) -> None:
    """The same for one cotangent a sequence, the sum of its tokens'; of the head, a row a token."""
    for length, index in batches(anatomy, examples, room.size):
        some = [examples[i] for i in index]
        given = [None if weights is None else weights[i] for i in index]
        with anatomy.analysis():
            batch = pass_together(anatomy, some, length, room.keep)
            rows = torch.tensor(index, device=batch.ids.device)
            for part, factors in pull_sequences(anatomy, some, given, batch):
                visit(rows[part], Gradients.of(factors, anatomy))
        if bar is not None:
            bar.update(sum(map(len, some)))


def _weighted(trace: Trace, weights: Tensor | None) -> Tensor | None:
    """Log-prob rows times weights; None: as they are."""
    if weights is None:
        return None
    return ops.residual(trace.logits, trace.targets)[0] * weights[:, None]


def head_sides(head: HeadFactor) -> tuple[Tensor, Tensor]:
    """Of gradients v ⊗ h: h (c, d), with a one where the head's bias trains, and v (c, V)."""
    v, h = wide(head.rows), wide(head.hidden)
    one = h.new_ones(len(h), 1)
    if head.weight is None:
        return one, v
    return (h if head.bias is None else torch.cat([h, one], 1)), v


def chunk_bytes(layout: Layout, per_cotangent: int, count: int, element: int) -> int:
    """Workspace of a chunk of cotangents: `per_cotangent` of the pullback, and what is formed."""
    work = per_cotangent * count
    if layout.sketch.kind in ("sjlt", "rademacher", "gaussian"):  # gradients are formed
        sizes = (p.shape[0] * p.shape[1] for p in layout.parts if p.kind == "sketch")
        work += (2 * count + 8) * max(sizes, default=0) * element
    return work


def sequence_bytes(layout: Layout | None, per_cotangent: int, logits: int, element: int) -> int:
    """Workspace of a whole sequence: of the pullback, three times its logits, what is formed."""
    work = per_cotangent + 3 * logits * element
    return work if layout is None else chunk_bytes(layout, work, 1, element)
