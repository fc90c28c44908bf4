"""Token gradients of a model, visited one segment of the model at a time.

`visit_tokens` pulls every token of one sequence back; `visit_sequences` does one backward pass for
whole sequences, many in a batch. Both hand out `Gradients`, which are sketched and then dropped:
memory holds no more than one segment and one chunk of tokens.
"""

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
from lddyn.sketches.projections import Term

CHUNK = 16  # cotangents that are pulled back together

WINDOW = 64  # whole sequences whose rows are computed before a store has them: enough for batches


@dataclass
class Gradients:
    """Gradients of c cotangents with respect to the parameters of one segment.

    Attributes:
        weights: Name of a weight (with "[e]" for expert e of a packed one) → terms of its gradient.
        vectors: Name of any other parameter → its gradients (c, numbers).
        head: Factors of the head's gradients, in the head's segment.
    """

    weights: dict[str, list[Term]]
    vectors: dict[str, Tensor]
    head: HeadFactor | None = None

    @classmethod
    def of(cls, factors: Factors, anatomy: Anatomy) -> Gradients:
        """Makes the gradients from the factors of a pullback.

        Gradients of a padding token's embedding are zero, as autograd's are.
        """
        gradients = cls({}, {}, factors.head)
        for tap, grads in factors.taps:
            delta = wide(grads)
            if tap.bias is not None:
                gradients.add_vector(tap.bias, summed(delta), anatomy)
            if tap.weight is None:
                continue
            if tap.kind == "embedding":
                if tap.padding is not None:
                    delta = delta * tap.updated()[..., None]
                term = Term(tap.activations, delta)
            else:
                x = wide(tap.activations)
                if delta.dim() == 2:  # cotangent m has only row m of the activations
                    delta, x = delta[:, None], x[:, None]
                term = Term(delta, x) if tap.kind == "linear" else Term(x, delta)
            gradients.weights.setdefault(tap.weight, []).append(term)
        for name, gradient in factors.direct.items():
            gradients.add_vector(name, wide(gradient), anatomy)
        return gradients

    def add_vector(self, name: str, gradient: Tensor, anatomy: Anatomy) -> None:
        """Adds a use of a parameter that is kept as a vector; "[e]" is a row of a packed one."""
        base = base_name(name)
        if base != name:
            packed = gradient.new_zeros(len(gradient), *anatomy.trainable[base].shape)
            packed[:, int(name[len(base) + 1 : -1])] = gradient
            gradient = packed
        flat = gradient.flatten(1)
        self.vectors[base] = self.vectors[base] + flat if base in self.vectors else flat


Visit = Callable[[Tensor, Gradients], None]  # rows (c,) of the result, their gradients


def base_name(name: str) -> str:
    """Canonical name of the parameter that a weight, or an expert of a packed weight, belongs to.

    Example:
        >>> from lddyn.sketches.gradients import base_name
        >>> base_name("mlp.experts.up_proj[3]"), base_name("lm_head.weight")
        ('mlp.experts.up_proj', 'lm_head.weight')
    """
    return name[: name.rindex("[")] if name.endswith("]") else name


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visit_tokens(
    trace: Trace, weights: Tensor | None, select: Tensor | None, chunk: int, visit: Visit
) -> None:
    """Pulls the log-prob gradients of a sequence's tokens back and visits them.

    Args:
        trace: The sequence's forward pass.
        weights: Factor of each token's gradient (tokens,); None: 1.
        select: Tokens to visit, as indices; None: all.
        chunk: Tokens that are pulled back together.
        visit: Called with (tokens, gradients) for each chunk and segment.
    """
    anatomy = trace.anatomy
    cotangents = None
    if weights is not None:
        cotangents = ops.residual(trace.logits, trace.targets)[0] * weights[:, None]
    with anatomy.analysis():
        pull = Pullback(trace, cotangents, select, chunk)
        visit(pull.selected, Gradients.of(pull.head_factors(), anatomy))
        for segment in segments_down(anatomy):
            for selected, factors in pull.step(segment):
                visit(selected, Gradients.of(factors, anatomy))


@dataclass(frozen=True)
class Batching:
    """How many whole sequences share a forward and a backward pass.

    Attributes:
        size: Sequences in a batch.
        keep_graphs: Whether the graphs of all segments are kept between the two passes; if not, a
            segment is computed again for the backward pass.
        least: Bytes that one sequence needs without kept graphs.
        kept: Bytes that one sequence needs with them.
    """

    size: int
    keep_graphs: bool
    least: int
    kept: int = 0

    def bytes_of(self, sequences: int) -> int:
        """Bytes of the largest batch of so many sequences."""
        return min(self.size, sequences) * (self.kept if self.keep_graphs else self.least)

    @classmethod
    def of(
        cls, trace: Trace, tokens: int, chunk: int, free: int, layout: Layout | None = None
    ) -> Batching:
        """The largest batch that memory holds.

        Args:
            trace: The longest sequence.
            tokens: Most counted tokens of a sequence.
            chunk: Most sequences in a batch.
            free: Bytes of memory.
            layout: Layout of the rows that the gradients are sketched into.
        """
        element = trace.logits.element_size()
        least = sequence_bytes(
            layout, Side(trace).bytes_per_cotangent(), tokens * trace.anatomy.vocabulary, element
        )
        # Twice the outputs of the products, as measured; attention and activations vary.
        kept = least + 3 * element * sum(work.elements for work in trace.work.values())
        size = min(chunk, free // kept)
        return cls(max(1, size), size > 0 and not trace.anatomy.streamed, least, kept)


def visit_sequences(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor] | None,
    batching: Batching,
    visit: Visit,
    bar: tqdm | None = None,
) -> None:
    """Computes the gradients of whole sequences, ∇ Σ_m w_m log π(y_m), and visits them.

    Args:
        anatomy: The model.
        examples: The sequences.
        weights: w (tokens,) of each sequence; None: 1.
        batching: How many share a pass.
        visit: Called with (indices of the sequences, gradients) for each batch and segment. In the
            head's segment the factors have one row for each token of the batch.
        bar: Advanced by the counted tokens.
    """
    for length, index in batches(anatomy, examples, batching.size):
        some = [examples[i] for i in index]
        given = [None if weights is None else weights[i] for i in index]
        with anatomy.analysis():
            batch = pass_together(anatomy, some, length, batching.keep_graphs)
            rows = torch.tensor(index, device=batch.ids.device)
            for part, factors in pull_sequences(anatomy, some, given, batch):
                visit(rows[part], Gradients.of(factors, anatomy))
        if bar is not None:
            bar.update(sum(map(len, some)))


def head_sides(head: HeadFactor) -> tuple[Tensor, Tensor]:
    """Factors h (c, d) and v (c, V) of the head's gradients v ⊗ h.

    h has a further column of ones where the head's bias trains, and is that column alone where the
    head's weight does not.
    """
    v, h = wide(head.rows), wide(head.hidden)
    one = h.new_ones(len(h), 1)
    if head.weight is None:
        return one, v
    return (h if head.bias is None else torch.cat([h, one], 1)), v


def chunk_bytes(layout: Layout, per_cotangent: int, count: int, element: int) -> int:
    """Workspace in bytes of a chunk of cotangents that is pulled back and sketched.

    Args:
        layout: Layout of the rows.
        per_cotangent: Bytes that the pullback needs for one cotangent.
        count: Cotangents in the chunk.
        element: Bytes of a number.
    """
    work = per_cotangent * count
    if layout.sketch.kind in ("sjlt", "rademacher", "gaussian"):  # these form the gradients
        sizes = (p.shape[0] * p.shape[1] for p in layout.parts if p.kind == "sketch")
        work += (2 * count + 8) * max(sizes, default=0) * element
    return work


def sequence_bytes(layout: Layout | None, per_cotangent: int, logits: int, element: int) -> int:
    """Workspace in bytes of one whole sequence, with three copies of its logits.

    Args:
        layout: Layout of the rows; None: gradients are not sketched.
        per_cotangent: Bytes that the pullback needs for one cotangent.
        logits: Logits of the sequence, tokens × V.
        element: Bytes of a number.
    """
    work = per_cotangent + 3 * logits * element
    return work if layout is None else chunk_bytes(layout, work, 1, element)
