"""Products of a kernel that is never formed: with one direction, and between many cotangents.

Everything that `NTK` computes is made of these. Below the head a logit cotangent v acts only
through Uᵀ v, with U = W, or U = [W, E] where the head is tied to the embedding; see `norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lddyn.engine.factors import BodyRows
from lddyn.engine.gradient import gradient_of_logits
from lddyn.engine.gram import Side, factored_push, graph_bytes, token_gram
from lddyn.engine.pushforward import AlongDirection, Direction, Pushforward
from lddyn.engine.trace import Trace
from lddyn.entk.norms import Basis, span_basis
from lddyn.memory import parse_memory


class KernelProducts:
    """Products with K(χo, χu), from a trace of each sequence.

    Args:
        observed: Trace of χo, M tokens.
        updated: Trace of χu, L tokens.
        memory: Workspace in bytes or as "2GiB".
        progress: Show progress bars.
    """

    def __init__(self, observed: Trace, updated: Trace, memory: int | str, progress: bool):
        self.observed, self.updated = observed, updated
        self.memory, self.progress = memory, progress
        self._bases: dict[bool, Basis] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(M, V, L, V)."""
        return (*self.observed.logits.shape, *self.updated.logits.shape)

    def transposed(self) -> KernelProducts:
        """Products with K(χu, χo)."""
        return KernelProducts(self.updated, self.observed, self.memory, self.progress)

    def product(self, precondition: Direction | None = None) -> Callable[[Tensor], Tensor]:
        """G (L, V) -> K G (M, V), or K_P G: one backward pass and one push each time."""
        push, updated = self.pushforward(), self.updated

        def product(g: Tensor) -> Tensor:
            direction = gradient_of_logits(updated.anatomy, updated.example, g)
            if precondition is not None:
                direction = {n: d * precondition[n].to(d) for n, d in direction.items()}
            with push.anatomy.analysis():
                return push.logits(AlongDirection(direction))[0]

        return product

    def pushforward(self) -> Pushforward:
        """Through χo, for many products: it keeps its linearised segments where they fit."""
        fits = (
            graph_bytes(self.observed) < parse_memory(self.memory, self.updated.logits.device) // 2
        )
        return Pushforward(self.observed, keep=fits)

    def one_hot(self, ids: Tensor) -> tuple[BodyRows, Tensor | None]:
        """Cotangents e_v below the head. If there are more than d of them: a basis, and mixtures.

        Returns:
            The rows, and None or a matrix (n, rows) that mixes them.
        """
        precise, tied = self.updated.logits.dtype, self.tied_ids()
        own = self.updated.anatomy.head.matrix[ids].to(precise)
        own = torch.cat([own, (ids[:, None] == tied[None]).to(precise)], 1)
        width = own.shape[1] - len(tied)
        if len(ids) <= own.shape[1]:
            return BodyRows(own[:, :width], own[:, width:], tied), None
        eye = torch.eye(own.shape[1], dtype=precise, device=own.device)
        return BodyRows(eye[:, :width], eye[:, width:], tied), own

    @property
    def bent(self) -> bool:
        """Whether the model changes its logits after W h + b (soft-capping, scaling)."""
        return self.observed.slope is not None or self.updated.slope is not None

    @property
    def blocked(self) -> bool:
        """Whether blocks share parameters, so that factors of different segments pair."""
        anatomy = self.updated.anatomy
        return any(n != anatomy.head_weight for n in anatomy.shared())

    def basis(self, centred: bool) -> Basis:
        """Directions of the logits; their eigendecomposition is computed once."""
        if centred not in self._bases:
            weight = self.updated.anatomy.head.matrix
            self._bases[centred] = span_basis(weight, self.tied_ids(), centred)
        return self._bases[centred]

    def tied_ids(self) -> Tensor:
        """Tokens of both sequences for a head that is tied to the embedding; else none."""
        ids: Tensor = torch.cat([self.observed.ids[0], self.updated.ids[0]]).unique()
        return ids if self.updated.anatomy.tied else ids[:0]

    def head_multiples(self) -> Tensor:
        """The multiples c (M, L): the head's own part of the kernel of raw logits is c I."""
        anatomy = self.updated.anatomy
        precise = self.updated.logits.dtype
        out: Tensor = self.observed.logits.new_zeros(self.shape[0], self.shape[2])
        if anatomy.head_weight is not None:
            h, h_u = (anatomy.head.own(x.hidden).to(precise) for x in (self.observed, self.updated))
            out = out + h @ h_u.T
        return out + 1 if anatomy.head_bias is not None else out

    def blocks(self, rows_o: BodyRows, rows_u: BodyRows) -> Iterator[tuple[slice, Tensor]]:
        """Products (M, n_o, l, n_u) of cotangents below the head, some updated tokens at a time."""
        n_o, n_u, (m, _, count, _) = len(rows_o.hidden), len(rows_u.hidden), self.shape
        dtype, same = self.updated.logits.dtype, rows_o is rows_u
        rows_o, rows_u = (
            BodyRows(r.hidden.to(dtype), r.picked.to(dtype), r.ids) for r in (rows_o, rows_u)
        )
        step = self.tokens_at_once(n_o, n_u)
        tokens = torch.arange(count, device=self.updated.anatomy.device)
        for part in tokens.split(step):
            at = slice(int(part[0]), int(part[-1]) + 1)
            if self.observed is self.updated and step >= count:
                # One sequence on both sides: all its cotangents are pulled back once.
                if same:
                    side = Side.below_head(self.updated, rows_u)
                    gram = token_gram([side], [side], self.memory, self.progress)
                    yield at, gram.view(m, n_o, count, n_u)
                    continue
                both = BodyRows(
                    torch.cat([rows_o.hidden, rows_u.hidden]),
                    torch.cat([rows_o.picked, rows_u.picked]),
                    rows_u.ids,
                )
                side = Side.below_head(self.updated, both, part)
                gram = token_gram([side], [side], self.memory, self.progress)
                yield at, gram.view(m, n_o + n_u, count, n_o + n_u)[:, :n_o, :, n_o:]
                continue
            one = Side.below_head(self.observed, rows_o)
            other = Side.below_head(self.updated, rows_u, part)
            gram = token_gram([one], [other], self.memory, self.progress)
            yield at, gram.view(m, n_o, len(part), n_u)

    def tokens_at_once(self, n_o: int, n_u: int) -> int:
        """Updated tokens whose products with all observed ones fit a quarter of the memory."""
        size = self.shape[0] * n_o * n_u * self.updated.logits.element_size()
        return max(1, parse_memory(self.memory, self.updated.logits.device) // 4 // size)

    def image_squares(self, v: Tensor, centred: bool, precondition: Direction | None) -> Tensor:
        """‖K_{m,l} v‖² (M, L) for one cotangent (V,); `centred`: Π is applied to the image."""
        side = Side(self.updated, v.to(self.updated.logits).expand_as(self.updated.logits))
        out = self.observed.logits.new_zeros(self.shape[0], self.shape[2])
        for rows, (moved,) in factored_push(
            [self.observed], [side], self.memory, self.progress, precondition
        ):
            if centred:
                moved = moved - moved.mean(-1, keepdim=True)
            out[:, rows] = moved.pow(2).sum(-1).T
        return out
