"""Token gradients kept as factors, and the inner products of two sides' factors.

At a tap y = x Wᵀ the gradient of the weight W is Σ_t δ[t] ⊗ x[t], for each of c cotangents. Only
the pair (x, δ) is kept; the gradient itself is never formed. `ops.gram` computes inner products of
gradients from the pairs of two sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lddyn import ops
from lddyn.engine.head import project
from lddyn.engine.ledger import Tap
from lddyn.engine.trace import Replay


def batched_vjp(
    outputs: Sequence[Tensor], targets: Sequence[Any], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients (c, …) of the targets for c cotangents; None for a target that is not reached.

    Args:
        outputs: Tensors of one graph.
        targets: Leaves or edges of that graph.
        cotangents: One for each output, (c, *shape).
    """
    gradients: list[Tensor | None] = [None] * len(targets)
    reached: list[int] = []

    def vjp(*given: Tensor) -> tuple[Tensor, ...]:
        results = torch.autograd.grad(outputs, targets, given, allow_unused=True)
        reached[:] = [i for i, x in enumerate(results) if x is not None]
        return tuple(x for x in results if x is not None)

    if all(len(x) == 1 for x in cotangents):  # for small models vmap costs more than the products
        results = tuple(x[None] for x in vjp(*(x[0] for x in cotangents)))
    else:
        results = torch.func.vmap(vjp)(*cotangents)
    for i, result in zip(reached, results, strict=True):
        gradients[i] = result
    return gradients


@dataclass(frozen=True)
class BodyRows:
    """Cotangents at the head's input, in place of cotangents v on the logits.

    The caller computes the head's own part of the products in closed form. If the head is tied to
    the embedding, the product with an embedding row of the other sequence needs v at that token's
    id; `picked` holds these entries of v.

    Attributes:
        hidden: g = Wᵀ v, (R, d).
        picked: v at some ids of the vocabulary, (R, n).
        ids: These ids, sorted, (n,).
    """

    hidden: Tensor
    picked: Tensor
    ids: Tensor

    def __getitem__(self, rows: Tensor) -> BodyRows:
        return BodyRows(self.hidden[rows], self.picked[rows], self.ids)


@dataclass
class HeadFactor:
    """The head's factors, one row for each cotangent: the gradient of W for l is v_l ⊗ h_l.

    Attributes:
        weight: Name of W; None: frozen.
        bias: Name of the bias, or None.
        hidden: The head's inputs h, (L, d).
        given: Cotangents v on W h + b, (L, V). None: those of log π, e_y − π, which are computed
            when they are used.
        logits: (L, V).
        targets: Realised tokens, (L,).
        ids: Sorted ids of the columns of `given`, if it does not have all V (see `BodyRows`); then
            two heads are not paired. None: `given` has all columns.
    """

    weight: str | None
    bias: str | None
    hidden: Tensor
    given: Tensor | None
    logits: Tensor
    targets: Tensor
    ids: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Cotangents (L, V) on the raw logits."""
        assert self.ids is None, "only some columns of the cotangents are known"
        return self.given if self.given is not None else ops.residual(self.logits, self.targets)[0]

    def at(self, ids: Tensor) -> Tensor:
        """Cotangents (L, n) on the raw logits of some tokens of the vocabulary."""
        if self.ids is None:
            return self.rows[:, ids]
        assert self.given is not None
        places = torch.searchsorted(self.ids, ids)
        assert torch.equal(self.ids[places], ids), "a token's cotangent was not given"
        return self.given[:, places]


@dataclass
class Factors:
    """Token gradients of one segment for one chunk of c cotangents, as factors.

    Attributes:
        taps: Pairs (tap, δ). δ has shape (c, rows, d_out); or (c, d_out), if cotangent m belongs to
            row m of the activations only (see `rowwise`).
        direct: Gradients of directly differentiated parameters, name -> (c, *shape).
        head: The head's factors, if the segment is the head.
        lengths: Cotangent m is zero at tokens t >= lengths[m], (c,). None: unknown.
        tokens: Number of replayed tokens.
    """

    taps: list[tuple[Tap, Tensor]] = field(default_factory=list)
    direct: dict[str, Tensor] = field(default_factory=dict)
    head: HeadFactor | None = None
    lengths: Tensor | None = None
    tokens: int = 0

    def in_order(self, lengths: Tensor, tokens: int) -> bool:
        """Whether the rows of every tap are the tokens in order, with δ zero beyond the lengths.

        In a block that sends tokens to experts, or sorts them, they are not.
        """
        beyond = torch.arange(tokens, device=lengths.device)[None] >= lengths[:, None]
        for tap, delta in self.taps:
            if delta.dim() == 2:
                continue
            if "[" in f"{tap.weight}{tap.bias}" or delta.shape[1] != tokens:
                return False
            if tap.kind == "embedding":
                continue
            if bool(delta[beyond].any()):
                return False
        return True

    def reach(self, tap: Tap, delta: Tensor) -> Tensor | None:
        """Lengths of the tap's rows, or None where its rows are not the replayed tokens."""
        return self.lengths if delta.dim() == 3 and delta.shape[1] == self.tokens else None

    @classmethod
    def of(cls, replay: Replay, gradients: Sequence[Tensor | None], count: int) -> Factors:
        """The factors from the gradients (count, …) of a replay's taps and direct parameters."""
        factors = cls()
        for tap, gradient in zip(replay.taps, gradients, strict=False):
            if gradient is not None:
                factors.taps.append((tap, gradient.reshape(count, -1, tap.width)))
        for (name, _, _), gradient in zip(
            replay.direct, gradients[len(replay.taps) :], strict=True
        ):
            if gradient is not None:
                factors.direct[name] = gradient
        return factors

    def add_direct(self, name: str, gradient: Tensor) -> None:
        """Adds the gradient of one more use of a directly differentiated parameter."""
        known = self.direct.get(name)
        self.direct[name] = gradient if known is None else known + gradient

    def part(self, rows: slice) -> Factors:
        """The factors of some of the cotangents, as views."""
        taps = [
            (t if d.dim() == 3 else replace(t, activations=t.activations[rows]), d[rows])
            for t, d in self.taps
        ]
        lengths = None if self.lengths is None else self.lengths[rows]
        direct = {name: x[rows] for name, x in self.direct.items()}
        return Factors(taps, direct, lengths=lengths, tokens=self.tokens)

    def __len__(self) -> int:
        if self.head is not None:
            return self.head.hidden.shape[0]
        tensors = [d for _, d in self.taps] + list(self.direct.values())
        return tensors[0].shape[0] if tensors else 0


def pull(replay: Replay, cotangents: Tensor) -> tuple[Tensor, Factors]:
    """Cotangents (c, *output.shape) of a replayed segment -> (cotangents of its input, factors)."""
    if not replay.targets or not replay.output.requires_grad:
        return cotangents, Factors()
    batch = cotangents.view(len(cotangents), *replay.output.shape)
    gradients = batched_vjp([replay.output], replay.targets, [batch])
    state = gradients.pop() if replay.input is not None else cotangents
    factors = Factors.of(replay, gradients, len(cotangents))
    return (torch.zeros_like(cotangents) if state is None else state), factors


def pair(one: Factors, other: Factors, add: Callable[[str, Tensor], None]) -> None:
    """Calls add(name, products) for each parameter, with inner products of gradients (c, c').

    Entry (m, l) is ⟨gradient of cotangent m of `one`, gradient of cotangent l of `other`⟩. `one` is
    the observed side and `other` the updated one. The order matters: an optimizer does not update
    the embedding row of a padding token, so that row is left out of the updated side only.
    """
    weights: dict[str, list[tuple[Tap, Tensor]]] = {}
    biases: dict[str, list[Tensor]] = {}
    for tap, delta in other.taps:
        if tap.weight is not None:
            weights.setdefault(tap.weight, []).append((tap, delta))
        if tap.bias is not None:
            biases.setdefault(tap.bias, []).append(summed(delta))
    for tap, delta in one.taps:
        if tap.weight is not None:
            for tap_u, delta_u in weights.get(tap.weight, ()):
                lengths = one.reach(tap, delta), other.reach(tap_u, delta_u)
                add(tap.weight, _pair_tap(tap, delta, tap_u, delta_u, *lengths))
        if tap.bias is not None:
            for other_sum in biases.get(tap.bias, ()):
                add(tap.bias, _wide(summed(delta)) @ _wide(other_sum).T)
    for name, gradient in one.direct.items():
        if name in other.direct:
            add(name, _wide(gradient.flatten(1)) @ _wide(other.direct[name].flatten(1)).T)
    pair_head(one, other, add)


class Shelf:
    """Buffers of one segment's factors, to be reused by the next segment.

    Blocks have equal shapes, and allocating memory takes longer than writing to it.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.lent: list[Tensor] = []

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """A buffer of this shape, uninitialised, with the dtype and device of another tensor."""
        size = math.prod(shape)
        fits = (
            x.numel() == size and (x.dtype, x.device) == (like.dtype, like.device)
            for x in self.free
        )
        place = next((i for i, fit in enumerate(fits) if fit), None)
        buffer = like.new_empty(size) if place is None else self.free.pop(place)
        self.lent.append(buffer)
        return buffer.view(shape)

    def turn(self) -> None:
        """Ends a segment: frees its buffers, and drops the buffers that it did not use."""
        self.free, self.lent = self.lent, []


class Merged:
    """Joined chunks of one side, so that the other side is pushed once instead of once per chunk.

    Attributes:
        rows: Numbers of the side's cotangents, chunk after chunk.
        parts: The slice of `rows` that each chunk has.
    """

    def __init__(self, rows: Tensor, first: Factors, count: int, tokens: int, shelf: Shelf):
        self.rows, self.parts, self._last = rows, [slice(0, len(rows))], first
        # No chunk follows the last one, and none can be appended unless rows are tokens in order.
        self._open = first.lengths is not None and count > len(rows)
        if not self._open:
            return
        # Earlier chunks are kept in these lists only: a chunk's taps hold the graph of its replay.
        self._names = _names(first)
        self._lengths: list[Tensor] = []
        self._direct: dict[str, list[Tensor]] = {name: [] for name in first.direct}
        self._dense: list[Tensor | None] = []
        self._thin: list[list[tuple[Tensor, Tensor]]] = []  # activations and δ, row by row
        for _, delta in first.taps:
            shape = count, tokens, delta.shape[-1]
            self._dense.append(shelf.take(delta, *shape) if delta.dim() == 3 else None)
            self._thin.append([])
        self._append(first)

    def _append(self, factors: Factors) -> None:
        """Copies a chunk's factors; dense ones get zeros beyond its prefix and are then emptied."""
        rows, self._last = self.parts[-1], factors
        assert factors.lengths is not None
        self._lengths.append(factors.lengths)
        for name, gradient in factors.direct.items():
            self._direct[name].append(gradient)
        for i, (tap, delta) in enumerate(factors.taps):
            dense = self._dense[i]
            if dense is None:
                self._thin[i].append((tap.activations, delta))
            else:
                dense[rows, : delta.shape[1]] = delta
                dense[rows, delta.shape[1] :] = 0
                factors.taps[i] = tap, delta[:0].clone()

    def take(self, rows: Tensor, factors: Factors) -> bool:
        """Appends a chunk if it has the same taps; returns whether it was appended."""
        if not self._open or factors.lengths is None or _names(factors) != self._names:
            return False
        start = len(self.rows)
        self.rows = torch.cat([self.rows, rows])
        self.parts.append(slice(start, start + len(rows)))
        self._append(factors)
        return True

    @property
    def factors(self) -> Factors:
        """The factors of all chunks. Activations are the last chunk's, whose prefix is longest."""
        last = self._last
        if not self._open:
            return last
        joined = Factors(
            direct={name: torch.cat(parts) for name, parts in self._direct.items()},
            lengths=torch.cat(self._lengths),
            tokens=last.tokens,
        )
        for (tap, _), dense, thin in zip(last.taps, self._dense, self._thin, strict=True):
            if dense is None:
                tap = replace(tap, activations=torch.cat([x for x, _ in thin]))
                joined.taps.append((tap, torch.cat([d for _, d in thin])))
            else:
                joined.taps.append((tap, dense[: len(self.rows), : last.tokens]))
        return joined


def _names(factors: Factors) -> list[Any]:
    """Kinds, names and widths of the taps: chunks can be joined if these are equal."""
    taps = [(t.kind, t.weight, t.bias, d.dim(), d.shape[-1]) for t, d in factors.taps]
    return [taps, factors.direct.keys()]


def merge(
    chunks: Iterable[tuple[Tensor, Factors]], count: int, tokens: int, shelf: Shelf
) -> list[Merged]:
    """Joins successive chunks of one side that have the same taps; others stay separate.

    Args:
        chunks: (rows, factors) by ascending length of prefix; their taps are emptied.
        count: Number of rows of all chunks.
        tokens: Tokens of the longest prefix.
        shelf: Where buffers are taken from.
    """
    merged: list[Merged] = []
    for rows, factors in chunks:
        if not merged or not merged[-1].take(rows, factors):
            left = count - sum(len(m.rows) for m in merged)
            merged.append(Merged(rows, factors, left, tokens, shelf))
    return merged


def pair_head(
    one: Factors,
    other: Factors,
    add: Callable[[str, Tensor], None],
    precondition: Mapping[str, Tensor] | None = None,
) -> None:
    """As `pair`, for the head, and for a head tied to the embedding.

    Args:
        one: The observed side.
        other: The updated side.
        add: As of `pair`.
        precondition: A diagonal P between the two, parameter name -> tensor of its shape; None: 1.
    """

    def scale(name: str) -> Tensor | None:
        return None if precondition is None else precondition[name]

    if one.head is not None and other.head is not None:
        weight, bias = one.head.weight, one.head.bias
        partial = one.head.ids is not None or other.head.ids is not None
        if partial or weight is bias is None:
            return
        if precondition is None:
            products = _pair_cotangents(one.head, other.head)
            if weight is not None:
                add(weight, products * (_wide(one.head.hidden) @ _wide(other.head.hidden).T))
            if bias is not None:
                add(bias, products)
            return
        if weight is not None:
            add(weight, _pair_preconditioned(one.head, other.head, precondition[weight]))
        if bias is not None:
            add(bias, (one.head.rows * precondition[bias]) @ other.head.rows.T)
    elif other.head is not None and other.head.weight is not None:
        name = other.head.weight
        for tap, delta in one.taps:
            if tap.weight == name:
                add(name, _pair_embedding_head(tap, delta, other.head, scale(name)))
    elif one.head is not None and one.head.weight is not None:
        name = one.head.weight
        for tap, delta in other.taps:
            if tap.weight == name:
                delta = delta * tap.updated()[:, None]
                add(name, _pair_embedding_head(tap, delta, one.head, scale(name)).T)


def _pair_cotangents(one: HeadFactor, other: HeadFactor) -> Tensor:
    """⟨v_m, v_l⟩ of the cotangents of two heads, (M, L)."""
    if one.given is other.given is None:
        products: Tensor = ops.residual_gram(one.logits, one.targets, other.logits, other.targets)
        return products
    return one.rows @ other.rows.T


def _pair_preconditioned(one: HeadFactor, other: HeadFactor, scale: Tensor) -> Tensor:
    """⟨v_m ⊗ h_m, P ∘ (v_l ⊗ h_l)⟩ of the gradients of W, (M, L), with P (V, d).

    Σ_v v_m[v] v_l[v] (P (h_m ∘ h_l))[v] is summed over parts of the vocabulary.
    """
    hidden, source = _wide(one.hidden), _wide(other.hidden)
    rows, source_rows = one.rows.to(hidden.dtype), other.rows.to(hidden.dtype)
    mixed = (source[:, None] * hidden[None]).flatten(0, 1)
    total = hidden.new_zeros(len(source), len(hidden))
    size = max(1, _PART // (len(mixed) * mixed.element_size()))
    for start in range(0, len(scale), size):
        part = slice(start, start + size)
        products = project(mixed, scale[part]).view(*total.shape, -1)
        products *= source_rows[:, None, part]
        total += (products * rows[None, :, part]).sum(-1)
    return total.T


_PART = 1 << 24  # bytes of products with the preconditioner of a head that are held together


def _pair_embedding_head(tap: Tap, delta: Tensor, head: HeadFactor, scale: Tensor | None) -> Tensor:
    """Σ_t v_l[x_t] ⟨δ_m[t], P ∘ h_l⟩ for the embedding of one side and the head of the other."""
    if tap.kind != "embedding":
        raise NotImplementedError(f"{tap.weight} is tied to the head through a {tap.kind} product")
    if scale is not None:
        delta = _wide(delta) * scale[tap.activations]
    picked = head.at(tap.activations)  # (L, t)
    projected = _wide(delta) @ _wide(head.hidden).T  # (c, t, L)
    return torch.einsum("mtl,lt->ml", projected, picked)


def summed(delta: Tensor) -> Tensor:
    """The gradient of a bias, Σ_t δ[t], (c, d_out)."""
    return delta.sum(1) if delta.dim() == 3 else delta


def over_rows(delta: Tensor) -> Tensor:
    """δ over all rows, (c, rows, d_out): from a δ (c, d_out) by zeros in all rows but m."""
    return delta if delta.dim() == 3 else torch.diag_embed(delta.T).movedim(0, -1)


def _pair_tap(
    tap_o: Tap,
    delta_o: Tensor,
    tap_u: Tap,
    delta_u: Tensor,
    lengths_o: Tensor | None,
    lengths_u: Tensor | None,
) -> Tensor:
    if tap_o.kind == tap_u.kind == "embedding":
        same = tap_o.activations[:, None] == tap_u.activations[None, :]
        same &= tap_u.updated()[None, :]
        pushed = torch.matmul(same.to(delta_o.dtype).T, delta_o)
        return _wide(pushed.flatten(1)) @ _wide(delta_u.flatten(1)).T
    if tap_o.kind != tap_u.kind:
        raise NotImplementedError(f"{tap_o.weight}: {tap_o.kind} and {tap_u.kind} uses mixed")
    if delta_o.dim() == delta_u.dim() == 2:
        similarity = _wide(tap_o.activations) @ _wide(tap_u.activations).T
        return similarity * (_wide(delta_o) @ _wide(delta_u).T)
    delta_o, delta_u = over_rows(delta_o), over_rows(delta_u)
    return ops.gram(tap_o.activations, delta_o, tap_u.activations, delta_u, lengths_o, lengths_u)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
