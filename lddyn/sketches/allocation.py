"""Choosing a layout: how many of the k sketch dimensions each parameter gets."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import HeadFactor
from lddyn.engine.guard import undisturbed
from lddyn.errors import NonFiniteError, UnsupportedModelError
from lddyn.memory import cpu_threads
from lddyn.sketches.gradients import (
    CHUNK,
    Batching,
    Gradients,
    base_name,
    head_sides,
    visit_sequences,
    visit_tokens,
    wide,
)
from lddyn.sketches.layout import Layout, Part, by_sequence
from lddyn.sketches.projections import Stream, Term, low_rank, single, weigh
from lddyn.sketches.sketch import Sketch, best_sizes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["choose_layout", "dense_layout"]

_EXAMPLES, _TOKENS = 4, 8  # whose gradient norms decide the allocation: examples, tokens of each


@undisturbed
def choose_layout(
    model: nn.Module | Anatomy, examples: Sequence[Example], sketch: Sketch, by: str = "token"
) -> Layout:
    """A layout for `features`: which of the k sketch dimensions belong to which parameter.

    A parameter gets a share of k in proportion to its share of ‖gradient‖², which makes the sum of
    the variances least, and at least one dimension in each repeat. The shares are averages over up
    to 8 evenly spaced tokens of each of the first 4 examples. A gradient that fits into its share
    is stored without sketching: a vector, a small matrix, or an outer product, as gradients above
    the last attention are. Stored in addition to k are the head's inputs h, whose gradients are
    v ⊗ h with v sketched, and the low-rank parts of kind `"lowrank"`.

    By sequence the shares are those of the first 4 whole gradients, and the layout is linear: the
    head is sketched like other weights, and low-rank parts are not kept.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences like those that will be sketched; the first 4 are used.
        sketch: k, kind, repeats and seed.
        by: `"token"` or `"sequence"`: what a row is.

    Returns:
        Layout. Rows that were made with the same layout can be compared.

    Raises:
        ValueError: If there is no example, `by` is neither, or k is too small for the number of
            parameters.
        UnsupportedModelError: If a parameter is used in two ways at once.

    Cost: a forward pass of 4 examples; the pullback and the materialised gradients of 32 tokens.
    """
    if not examples:
        raise ValueError("at least one example is needed to divide k over the parameters, got none")
    survey = _Survey(Anatomy.of(model), sketch, by_sequence(by))
    survey.run(examples[:_EXAMPLES])
    return Layout(sketch, tuple(survey.allocate()))


def dense_layout(
    sketch: Sketch | None,
    parameters: Mapping[str, Tensor],
    squares: Mapping[str, float],
    looked_up: Collection[str] = (),
) -> Layout:
    """A linear layout of rows that are made of `Piece`s.

    Args:
        sketch: How gradients are projected; None: rows hold the gradients themselves, one parameter
            after the other.
        parameters: Name → parameter.
        squares: Name → Σ of the squared gradient norms, by which k is divided.
        looked_up: Parameters whose gradients may be given by rows: embeddings, and the head.

    Raises:
        ValueError: If k is too small for the number of parameters.
    """
    requests = []
    for name, parameter in parameters.items():
        size = parameter.numel()
        if parameter.dim() in (2, 3):
            kind = "onehot" if name in looked_up else "sketch"
            shape = int(parameter.shape[-2]), int(parameter.shape[-1])
        else:
            kind, shape = "vector", (size, 1)
        # Three digits: another device's rounding should not change an allocation.
        weight = float(f"{squares.get(name, 0.0):.3g}")
        whole = size if sketch is None or parameter.dim() != 3 else None
        requests.append(_Request(Part(name, kind, shape, (1, 1)), weight, whole=whole))
    if sketch is not None:
        return Layout(sketch, tuple(_divide(sketch, requests)))
    exact = (replace(r.part, kind="exact", sizes=(r.whole or 0, 1)) for r in requests)
    return Layout(Sketch(), tuple(exact))


def use_of(name: str, terms: Sequence[Term]) -> str:
    """How a weight is used by its terms: `"sketch"` (in products) or `"onehot"` (looked up).

    Raises:
        UnsupportedModelError: If it is used in both ways.
    """
    kinds = {term.one_hot for term in terms}
    if len(kinds) > 1:
        raise _mixed(name)
    return "onehot" if kinds.pop() else "sketch"


def _mixed(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is used in products and in some other way too; sketches cannot pair the two: use "
        "lddyn.ntk for this model, or freeze the parameter"
    )


@dataclass
class _Request:
    """Sketch dimensions requested for one parameter.

    Attributes:
        part: The part that stores its sketch, with sizes yet to be chosen.
        weight: Its share of k: Σ ‖A‖² over the surveyed gradients.
        copies: How many parts of this size it needs.
        whole: Numbers that store the gradient without sketching; None: it is always sketched.
        whole_kind: Kind of the part that stores it so: `"exact"` or `"outer"`.
    """

    part: Part
    weight: float = 0.0
    copies: int = 1
    whole: int | None = None
    whole_kind: str = "exact"

    def unsketched(self) -> Part:
        """The part that stores the gradient without sketching."""
        rows, columns = self.part.shape
        numbers = 1 if self.whole_kind == "outer" else rows * columns
        return Part(self.part.name, self.whole_kind, self.part.shape, (numbers, 1))

    def sketched(self, sketch: Sketch, size: int) -> list[Part]:
        """The parts that store its sketches of `size` numbers."""
        part = self.part
        if part.kind == "head":
            sizes = size, 1
        elif part.kind == "sketch":
            sizes = sketch.sizes(part.shape, size)
        else:
            sizes = best_sizes(*part.shape, size)
        parts = [replace(part, sizes=sizes)]
        if self.copies == 2:
            parts.append(replace(part, kind="minus", sizes=sizes))
        return parts


class _Survey:
    """Norms of a model's gradients on a few tokens, and how its parameters are used.

    Attributes:
        squares: Parameter → Σ ‖A‖² (of a low-rank form Σ ‖A‖‖A − A_ρ‖); the head's is "head".
        uses: Parameter → `"sketch"`, `"onehot"` or `"vector"`.
        dense: Weights whose gradients are not outer products.
    """

    def __init__(self, anatomy: Anatomy, sketch: Sketch, together: bool) -> None:
        self.anatomy, self.sketch, self.together = anatomy, sketch, together
        self.low_rank = sketch.kind == "lowrank" and not together
        self.squares: dict[str, float] = {}
        self.uses: dict[str, str] = {}
        self.dense: set[str] = set()

    def run(self, examples: Sequence[Example]) -> None:
        """Visits the gradients of a few tokens, or of the whole sequences."""
        anatomy = self.anatomy
        if self.together:
            with cpu_threads(1):
                anatomy.trace(examples[0])
                # Alone and without graphs: a layout must not depend on how much memory there is.
                batching = Batching(1, keep_graphs=False, least=0)
                visit_sequences(anatomy, examples, None, batching, self.visit)
        else:
            for example in examples:
                count = min(_TOKENS, len(example))
                select = torch.linspace(0, len(example) - 1, count).round().long()
                with cpu_threads(1):
                    trace = anatomy.trace(example)
                    select = select.to(trace.positions.device)
                    visit_tokens(trace, None, select, CHUNK, self.visit)
        # Three digits: another device's rounding should not change an allocation.
        self.squares = {name: float(f"{square:.3g}") for name, square in self.squares.items()}

    def visit(self, rows: Tensor, gradients: Gradients) -> None:
        """Adds the gradients of a chunk in one segment."""
        for name, terms in gradients.weights.items():
            self._weight(name, terms, len(rows))
        for name, vector in gradients.vectors.items():
            self._note(name, "vector", float(vector.square().sum()))
        if gradients.head is not None and (gradients.head.weight or gradients.head.bias):
            self._head(gradients.head)

    def _note(self, name: str, use: str, square: float) -> None:
        self.squares[name] = self.squares.get(name, 0.0) + square
        if self.uses.setdefault(name, use) != use:
            raise _mixed(name)

    def _weight(self, name: str, terms: list[Term], count: int) -> None:
        base, use = base_name(name), use_of(name, terms)
        parameter = self.anatomy.trainable[base]
        shape = int(parameter.shape[-2]), int(parameter.shape[-1])
        if self.together or name != base or not single(terms):
            self.dense.add(base)
        kept = None
        if self.low_rank and use == "sketch" and not single(terms) and self._seen_whole(base):
            stream = Stream(self.sketch.seed, base, self.sketch.repeats)
            kept = low_rank(stream, terms, shape, min(self.sketch.rank, *shape))
        for c in range(count):
            square = float(weigh(terms, c, shape[0]).square().sum())
            if kept is not None:  # ‖A_ρ‖² = ‖V‖², because U is orthonormal
                rest = max(square - float(kept[1][c].square().sum()), 0.0)
                square = (square * rest) ** 0.5
            self._note(base, use, square)

    def _head(self, head: HeadFactor) -> None:
        h, v = head_sides(head)
        if self.together and head.bias is not None:
            self._note(head.bias, "vector", float(v.sum(0).square().sum()))
            h = wide(head.hidden)
        products = (h @ h.T) * (v @ v.T)
        products = products if self.together else products.diagonal()
        self.squares["head"] = self.squares.get("head", 0.0) + float(products.sum())

    def _seen_whole(self, name: str) -> bool:
        """Whether one segment holds all of a weight's gradient: else factors cannot store it."""
        anatomy = self.anatomy
        return anatomy.trainable[name].dim() == 2 and len(anatomy.ledger[name].segments) == 1

    # ------------------------------------------------------------------ allocation

    def allocate(self) -> list[Part]:
        """The parts of a layout, with k divided among them.

        Raises:
            ValueError: If k is below one number in each repeat for every parameter.
            UnsupportedModelError: If a weight is tied to the head through a product.
        """
        anatomy = self.anatomy
        head = anatomy.head_weight, anatomy.head_bias
        beside: list[Part] = []  # stored in addition to k
        requests: list[_Request] = []
        for name in anatomy.trainable:
            tied = name == head[0] and anatomy.tied
            if name in head and not tied and not (self.together and name == head[1]):
                continue
            request = self._request(name, tied)
            requests.append(request)
            if request.part.kind == "sketch" and request.copies == 2:
                rank = min(self.sketch.rank, *request.part.shape)
                beside.append(Part(name, "outer", request.part.shape, (rank, 1)))
        if self.together and head[0] and not anatomy.tied:
            shape = anatomy.vocabulary, int(anatomy.trainable[head[0]].shape[1])
            part = Part(head[0], "summed", shape, (1, 1))
            requests.append(_Request(part, self.squares["head"], whole=shape[0] * shape[1]))
        elif head != (None, None) and not self.together:
            width = (int(anatomy.trainable[head[0]].shape[1]) if head[0] else 0) + (
                1 if head[1] else 0
            )
            name = head[0] or head[1] or ""
            part = Part(name, "head", (anatomy.vocabulary, width), (1, 1))
            requests.append(_Request(part, self.squares["head"], 1, anatomy.vocabulary, "outer"))
        return beside + _divide(self.sketch, requests)

    def _request(self, name: str, tied: bool) -> _Request:
        """What one parameter needs, the head left out; `tied`: the head uses this weight too."""
        anatomy, together = self.anatomy, self.together
        parameter = anatomy.trainable[name]
        weight, size = self.squares.get(name, 0.0), parameter.numel()
        # A parameter that no surveyed token reached may be reached by others: an expert, say.
        vector = parameter.dim() not in (2, 3) or name in anatomy.direct
        lookup = "embedding" in anatomy.ledger[name].ops
        use = self.uses.get(name, "vector" if vector else "onehot" if lookup else "sketch")
        if use == "vector":
            return _Request(Part(name, use, (size, 1), (1, 1)), weight, whole=size)
        shape = int(parameter.shape[-2]), int(parameter.shape[-1])
        request = _Request(Part(name, use, shape, (1, 1)), weight)
        product = use == "sketch" and self._seen_whole(name)
        if tied:
            if use != "onehot":
                raise _mixed(name)
            # By token the head's part is taken off the embedding's sketch and stored as v ⊗ h.
            request.copies = 1 if together else 2
            request.weight += 2 * (weight * self.squares["head"]) ** 0.5
            request.weight += self.squares["head"] if together else 0.0
        elif product and name in self.uses and name not in self.dense:
            request.whole, request.whole_kind = sum(shape), "outer"
        elif product and self.low_rank:
            request.copies = 2  # of the gradient, and of its low-rank part
        if parameter.dim() == 2 and request.copies == 1 and size <= (request.whole or size):
            request.whole, request.whole_kind = size, "exact"
        return request


def _divide(sketch: Sketch, requests: list[_Request]) -> list[Part]:
    """Sizes in proportion to the weights.

    A gradient that fits into its share without sketching leaves the rest of it to the others.
    """
    for request in requests:
        if not math.isfinite(request.weight):
            raise NonFiniteError(
                f"the squared gradients of {request.part.name} sum to {request.weight} although "
                "the model's weights and logits are finite: they overflow; use a wider dtype"
            )
    unsketched: dict[int, Part] = {}
    while True:
        others = {i: request for i, request in enumerate(requests) if i not in unsketched}
        taken = sum(requests[i].whole or 0 for i in unsketched)
        free = (sketch.k - taken) // sketch.repeats - sum(r.copies for r in others.values())
        if free < 0:
            least = sketch.repeats * sum(r.copies for r in requests)
            raise ValueError(
                f"k must be at least {least}, a number for each of {sketch.repeats} repeats of "
                f"{len(requests)} parameters, got {sketch.k}: raise k, lower repeats, or freeze "
                "parameters"
            )
        total = sum(r.weight for r in others.values()) or 1.0
        sizes = {i: 1 + int(free * r.weight / total / r.copies) for i, r in others.items()}
        fits = {
            i: request.unsketched()
            for i, request in others.items()
            if request.whole is not None and request.whole <= sketch.repeats * sizes[i]
        }
        if not fits:
            break
        unsketched |= fits
    parts: list[Part] = []
    for i, request in enumerate(requests):
        parts += [unsketched[i]] if i in unsketched else request.sketched(sketch, sizes[i])
    return parts
