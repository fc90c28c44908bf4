"""Factors of low rank for a kernel below the head, by a randomised range finder.

The M d x L d matrix of everything below the head is projected on the span of R of its images. An
image is one backward pass and one push, whatever the number of tokens, so rank R costs 2 R of these
pairs (Halko, Martinsson & Tropp, 2011).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.engine.factors import BodyRows
from lddyn.engine.gradient import gradient_of_hidden
from lddyn.engine.head import back_project
from lddyn.engine.pushforward import AlongDirection, Pushforward
from lddyn.engine.trace import Trace
from lddyn.entk.lowrank import Ends, LowRank
from lddyn.entk.norms import Basis, effective_samples, root
from lddyn.entk.products import KernelProducts
from lddyn.estimate import Estimate


def body_product(push: Pushforward, updated: Trace, rows: BodyRows) -> Tensor:
    """The image (M, d + n) below the head of one cotangent per updated token, summed over them.

    It holds everything but the product of the head with itself: the move of the head's input, and
    with tied weights the move of the embedding rows that are also output rows.

    Cost: one backward pass and one push; one gradient the size of the trainable parameters.
    """
    anatomy, precise, observed = updated.anatomy, updated.logits.dtype, push.trace
    direction = gradient_of_hidden(anatomy, updated.example, rows.hidden.to(precise))
    moved_rows = observed.hidden.new_zeros(len(observed.hidden), 0).to(precise)
    if anatomy.tied and anatomy.head_weight is not None:
        embedding = direction[anatomy.head_weight]
        moved_rows = observed.hidden.to(precise) @ embedding[rows.ids].to(precise).T
        through_head = rows.picked.to(precise).T @ updated.hidden.to(precise)
        direction[anatomy.head_weight] = embedding.index_add(
            0, rows.ids, through_head.to(embedding)
        )
    with push.anatomy.analysis():
        hidden = push.hidden(AlongDirection(direction))[0].to(precise)
    return torch.cat([hidden, moved_rows], 1)


@dataclass
class _Range:
    """An orthonormal basis q_1, q_2, … of images of F (the kernel below the head), and Fᵀ q_i.

    Attributes:
        push: Through χo.
        back: Through χu.
        basis: Directions of the logits.
        coordinates: q_i (M k,), orthonormal in the metric of the logits.
        left: The same q_i as combinations of images, (M, d + n).
        right: Fᵀ q_i, as images (L, d + n).
    """

    push: Pushforward
    back: Pushforward
    basis: Basis
    coordinates: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]

    def _metric(self, image: Tensor) -> Tensor:
        return ((image.double() @ self.basis.vectors) * self.basis.values.sqrt()).flatten()

    def grow(self, rows: BodyRows) -> bool:
        """Adds the image of one more cotangent per updated token; False if it is in the span."""
        image = body_product(self.push, self.back.trace, rows).double()
        q = self._metric(image)
        size = float(q.norm())
        for _ in range(2):  # once is not enough where it nearly lies in the span
            for known, combined in zip(self.coordinates, self.left, strict=True):
                along = float(known @ q)
                q, image = q - along * known, image - along * combined
        if float(q.norm()) <= 1e-5 * size:
            return False
        image, q = image / q.norm(), q / q.norm()
        self.coordinates.append(q)
        self.left.append(image)
        rows = self.basis.rows(q.view(-1, len(self.basis)))
        self.right.append(body_product(self.back, self.push.trace, rows).double())
        return True


class _Rows:
    """The cotangents whose images span the factors, one set after another.

    "random": Gaussian combinations of all directions of the logits. "data": combinations of the
    log-prob rows of the updated tokens; one token at a time where there may be as many images as
    tokens, so that every loss of these log-probs is in the span.
    """

    def __init__(
        self, span: str, most: int, basis: Basis, ends: Ends, weight: Tensor, seed: torch.Generator
    ):
        self.basis, self.generator = basis, seed
        self.tokens = len(ends.targets)
        data = ends.cotangents(None, "G")
        self.data = BodyRows(back_project(data, weight), data[:, basis.ids], basis.ids)
        self.like = data
        self.by_token = span == "data" and most >= self.tokens
        self.mixed = span == "data" and not self.by_token
        self.drawn = 0

    @property
    def patience(self) -> int:
        """How many images in a row may bring nothing new before the span is complete.

        Random rows that bring nothing new four times have spanned everything there is. Tokens that
        are taken one by one have not.
        """
        return self.tokens if self.by_token else 4

    def next(self) -> BodyRows:
        """One more cotangent per updated token."""
        self.drawn += 1
        if self.by_token and self.drawn <= self.tokens:
            return self._scaled(torch.eye(self.tokens)[self.drawn - 1])
        if self.mixed:
            return self._scaled(torch.randn(self.tokens, 1, generator=self.generator)[:, 0])
        return self.basis.rows(torch.randn(self.tokens, len(self.basis), generator=self.generator))

    def _scaled(self, factors: Tensor) -> BodyRows:
        scale = factors.to(self.like)[:, None]
        return BodyRows(self.data.hidden * scale, self.data.picked * scale, self.data.ids)


def find_low_rank(
    kernel: KernelProducts,
    centred: bool,
    most: int,
    rtol: float | None,
    *,
    span: str,
    probes: int,
    seed: int,
) -> LowRank:
    """The factors behind `NTK.lowrank`.

    Args:
        kernel: Products with the kernel.
        centred: Whether Π is in the metric of the projection.
        most: Largest rank; with rtol None, the rank.
        rtol: Residual ‖K − K̂‖_F / ‖K̂‖_F at which to stop, the rank being doubled from 8.
        span: "random" or "data", as in `NTK.lowrank`.
        probes: Random probes of the residual.
        seed: Of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    push, back = kernel.pushforward(), kernel.transposed().pushforward()
    basis, head, product = kernel.basis(centred), kernel.head_multiples(), kernel.product()
    observed, updated = push.trace, back.trace
    ends = Ends.of(observed), Ends.of(updated)
    weight = updated.anatomy.head.matrix
    images = _Range(push, back, basis, [], [], [])
    rows = _Rows(span, most, basis, ends[1], weight, generator)

    def stacked(parts: list[Tensor], tokens: int) -> Tensor:
        dtype, width = updated.logits.dtype, weight.shape[1] + len(basis.ids)
        empty = head.new_zeros(tokens, width, 0)
        return torch.stack(parts, -1).to(dtype) if parts else empty.to(dtype)

    target = most if rtol is None else min(8, most)
    while True:
        stalled = 0
        while len(images.left) < target and stalled < rows.patience:
            stalled = 0 if images.grow(rows.next()) else stalled + 1
        form = LowRank(
            stacked(images.left, len(observed.positions)),
            stacked(images.right, len(updated.positions)),
            head,
            weight,
            basis.ids,
            ends,
            Estimate(head.new_zeros(()), head.new_zeros(())),
            centred,
        )
        form.residual = _residual(form, product, generator, probes)
        if rtol is None or target >= most or stalled:
            return form
        # ‖K‖² = ‖K̂‖² + ‖K − K̂‖² for a projection, up to the cross term of the residual with c I.
        norm = float(form.frobenius().pow(2).sum().sqrt())
        if float(form.residual.value) <= rtol * norm:
            return form
        target = min(2 * target, most)


def _residual(
    form: LowRank, product: Callable[[Tensor], Tensor], generator: torch.Generator, probes: int
) -> Estimate:
    """‖K − K̂‖_F by Hutchinson's probes over all tokens and the whole vocabulary."""

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if form.centred else x

    like = form.ends[1].logits
    rows = []
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1.0
        v = centre(signs.to(like))
        rows.append(centre(product(v) - form @ v).double().pow(2).sum(-1))
    adds = torch.stack(rows, -1)
    total = adds.sum(0)
    error = (total.var() / probes).sqrt()
    return root(Estimate(total.mean(), error, effective_samples(adds)))
