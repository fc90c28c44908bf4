"""Gradients of whole sequences in dense form, one parameter at a time.

Features of tokens are sketched from factors, so that no gradient is ever formed. A preconditioned
gradient √P ∘ Σ_t δ[t] ⊗ x[t] has no such factors: it is formed, one weight of one sequence at a
time, and dropped. Forming it costs 2 T FLOPs a weight, as in a plain backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lddyn.engine.factors import HeadFactor
from lddyn.engine.sharded import like_local, local, whole
from lddyn.sketches.gradients import Gradients, base_name, wide
from lddyn.sketches.projections import Term

__all__ = ["Piece", "pieces_of", "pieces_of_sum"]


@dataclass(frozen=True)
class Piece:
    """A summand of the gradient of one parameter.

    Attributes:
        name: Canonical name of the parameter.
        value: Of the parameter's shape; with `expert` of one expert's; with `ids` rows of it. It is
            split over processes where the parameter is; tensors that a piece is combined with are
            then of the shape of this process's part.
        expert: Which expert of a packed weight; None: the parameter is not packed.
        ids: The row of the parameter that each row of `value` is added to; rows may repeat. None:
            `value` has all rows.
    """

    name: str
    value: Tensor
    expert: int | None = None
    ids: Tensor | None = None

    def whole(self) -> Piece:
        """The piece with a value that is not split; all processes call this."""
        value = whole(self.value)
        return self if value is self.value else replace(self, value=value)

    def _part(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that the piece belongs to."""
        return tensor if self.expert is None else tensor[self.expert]

    def like(self, tensor: Tensor) -> Tensor:
        """The entries of a tensor of the parameter's shape that stand beside those of `value`."""
        part, value = self._part(tensor), local(self.value)
        if self.ids is None:
            return part.reshape(value.shape).to(value.device)
        return part[self.ids.to(part.device)].to(value.device)

    def scaled(self, tensor: Tensor) -> Piece:
        """The piece times a diagonal, which has the parameter's shape."""
        scaled = local(self.value) * self.like(tensor)
        return replace(self, value=like_local(self.value, scaled))

    def add_to(self, tensor: Tensor, weight: float = 1.0) -> None:
        """Adds the piece to a tensor of the parameter's shape."""
        part = self._part(tensor)
        if self.ids is None:
            part.add_(local(self.value).view(part.shape).to(part), alpha=weight)
        else:
            part.index_add_(0, self.ids.to(part.device), self.value.to(part), alpha=weight)

    def inner(self, tensor: Tensor) -> float:
        """The inner product with a tensor of the parameter's shape, summed in float32 by rows.

        Where the value is split, of this process's part.
        """
        value = local(self.value)
        product = value * self.like(tensor.detach()).to(value)
        return float(product.flatten(1 if product.dim() > 1 else 0).sum(-1).double().sum())


def pieces_of(gradients: Gradients, sequence: int) -> Iterator[Piece]:
    """The pieces of one sequence of a batch; of the head all, for it has one sequence a visit."""
    for name, terms in gradients.weights.items():
        yield from _weight(name, [Term(*(x[None] for x in t.one(sequence))) for t in terms])
    for name, vector in gradients.vectors.items():
        yield Piece(name, vector[sequence])
    if gradients.head is not None:
        yield from _head(gradients.head)


def pieces_of_sum(gradients: Gradients) -> Iterator[Piece]:
    """The pieces of the sum of all sequences of a batch: one product a weight."""
    for name, terms in gradients.weights.items():
        yield from _weight(name, terms)
    for name, vector in gradients.vectors.items():
        yield Piece(name, vector.sum(0))
    if gradients.head is not None:
        yield from _head(gradients.head)


def _weight(name: str, terms: Sequence[Term]) -> Iterator[Piece]:
    base = base_name(name)
    expert = None if base == name else int(name[len(base) + 1 : -1])
    dense: Tensor | None = None
    for term in terms:
        left, right = _rows(term)
        if term.one_hot:
            yield Piece(base, right, expert, left)
        else:
            dense = left.T @ right if dense is None else dense.addmm_(left.T, right)
    if dense is not None:
        yield Piece(base, dense, expert)


def _rows(term: Term) -> tuple[Tensor, Tensor]:
    """Both factors with the rows of all cotangents one after the other."""
    count, shared = len(term), 2 - term.one_hot
    left, right = term.left, term.right
    if left.dim() == shared:
        left = left.expand(count, *left.shape)
    if right.dim() == 2:
        right = right.expand(count, *right.shape)
    return left.flatten(0, 1), right.flatten(0, 1)


def _head(head: HeadFactor) -> Iterator[Piece]:
    v = wide(head.rows)
    if head.weight is not None:
        yield Piece(head.weight, v.T @ wide(head.hidden))
    if head.bias is not None:
        yield Piece(head.bias, v.sum(0))
