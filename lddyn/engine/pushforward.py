"""Tangents pushed through a trace: what a change of the parameters does to every logit.

The tangent enters at the taps and is never a parameter-sized object unless the caller has one:

    direction Δθ       the tangent of y = x Wᵀ is x ΔWᵀ                    (aggregate)
    factors (δ', x')   it is E = S δ', S = x x'ᵀ, one per source token     (factored product)
    preconditioned     it is (P ∘ (δ'ᵀ x')) x, formed source by source     (Adam, RMSprop)

and travels through each replayed segment by the transpose of its pullback: the gradient of
u -> pullback(u) is the Jacobian itself. Reverse mode differentiated once more has no silent gap: an
operation without a second derivative raises, where forward mode may return a zero tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.backward_check import check_push
from lddyn.engine.factors import Factors, HeadFactor, over_rows, pair_head, summed
from lddyn.engine.guard import undisturbed
from lddyn.engine.head import project
from lddyn.engine.ledger import FRONT, Tap
from lddyn.engine.linearized import HeadNames, Linearized, Source, linearize, push
from lddyn.engine.sequences import batches, pass_together
from lddyn.engine.trace import Trace
from lddyn.finite import checked
from lddyn.ops import preconditioned_push

Direction = Mapping[str, Tensor]


class AlongDirection(Source):
    """One tangent: a direction in parameter space, name -> tensor of the parameter's shape."""

    size = 1

    def __init__(self, direction: Direction):
        self.direction = direction

    def _weight(self, key: str) -> Tensor | None:
        if key.endswith("]"):
            name, index = key[:-1].rsplit("[", 1)
            packed = self.direction.get(name)
            return None if packed is None else packed[int(index)]
        return self.direction.get(key)

    def tap(self, tap: Tap) -> Tensor | None:
        """The products x ΔWᵀ + Δb, or rows of ΔW."""
        out: Tensor | None = None
        weight = None if tap.weight is None else self._weight(tap.weight)
        if weight is not None:
            if tap.kind == "embedding":
                out = weight[tap.activations]
            else:
                moved = weight.T if tap.kind == "linear" else weight
                out = tap.activations @ moved.to(tap.activations.dtype)
        if tap.bias is not None and (bias := self._weight(tap.bias)) is not None:
            out = bias.expand(tap.shape.numel() // tap.width, -1) if out is None else out + bias
        return None if out is None else out[None]

    def direct(self, name: str) -> Tensor | None:
        """Δ of the parameter itself."""
        moved = self.direction.get(name)
        return None if moved is None else moved[None]

    def head(self, hidden: Tensor, names: HeadNames) -> Tensor | None:
        """The products h ΔWᵀ + Δb."""
        weight, bias = (None if n is None else self.direction.get(n) for n in names)
        out = None if weight is None else project(hidden, weight)
        if bias is not None:
            bias = bias.to(hidden.dtype).expand(len(hidden), -1)
            out = bias if out is None else out + bias
        return None if out is None else out[None]


class AlongDirections(Source):
    """One tangent for each of several directions, which are pushed together."""

    def __init__(self, directions: Sequence[Direction]):
        self.each = [AlongDirection(direction) for direction in directions]
        self.size = len(self.each)

    def _together(self, change: Callable[[AlongDirection], Tensor | None]) -> Tensor | None:
        parts = [change(source) for source in self.each]
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        return torch.cat([torch.zeros_like(like) if part is None else part for part in parts])

    def tap(self, tap: Tap) -> Tensor | None:
        """The products x ΔWᵀ + Δb, or rows of ΔW."""
        return self._together(lambda source: source.tap(tap))

    def direct(self, name: str) -> Tensor | None:
        """Δ of the parameter itself."""
        return self._together(lambda source: source.direct(name))

    def head(self, hidden: Tensor, names: HeadNames) -> Tensor | None:
        """The products h ΔWᵀ + Δb."""
        return self._together(lambda source: source.head(hidden, names))


_TOGETHER = 8  # directions that are pushed together

_Item = TypeVar("_Item")


def _in_parts(items: Sequence[_Item]) -> list[Sequence[_Item]]:
    """Successive parts of `_TOGETHER` items."""
    return [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]


class AlongFactors(Source):
    """One tangent for each source token, from the factors of its pullback.

    Args:
        factors: Those of all segments and of the head.
        precondition: A diagonal P, parameter name -> tensor of its shape; None: P = 1.
    """

    def __init__(self, factors: list[Factors], precondition: Direction | None = None):
        self.size = max((len(f) for f in factors), default=0)
        self.factors = factors
        self.precondition = precondition
        self.by_weight: dict[str, list[tuple[Tap, Tensor]]] = {}
        self.by_bias: dict[str, Tensor] = {}
        self.by_name: dict[str, Tensor] = {}
        self.head_factor: HeadFactor | None = None
        for part in factors:
            self.head_factor = part.head or self.head_factor
            for tap, delta in part.taps:
                if tap.weight is not None:
                    self.by_weight.setdefault(tap.weight, []).append((tap, over_rows(delta)))
                if tap.bias is not None:
                    self.by_bias[tap.bias] = self.by_bias.get(tap.bias, 0) + summed(delta)
            for name, gradient in part.direct.items():
                self.by_name[name] = self.by_name.get(name, 0) + gradient

    def scale(self, name: str) -> Tensor | None:
        """P of a parameter (or of one packed expert), or None."""
        if self.precondition is None:
            return None
        if name.endswith("]"):
            base, index = name[:-1].rsplit("[", 1)
            return self.precondition[base][int(index)]
        return self.precondition[name]

    def tap(self, tap: Tap) -> Tensor | None:
        """S δ' summed over the weight's uses, or its preconditioned form."""
        out: Tensor | None = None
        if tap.weight is not None:
            scale = self.scale(tap.weight)
            for tap_u, delta in self.by_weight.get(tap.weight, ()):
                moved = _push_tap(tap, tap_u, delta, scale)
                out = moved if out is None else out + moved
            tied = self.head_factor
            if tied is not None and tied.weight == tap.weight:
                moved = _push_head_to_embedding(tap, tied, scale)
                out = moved if out is None else out + moved
        if tap.bias is not None and tap.bias in self.by_bias:
            bias = self.by_bias[tap.bias]
            scale = self.scale(tap.bias)
            bias = (bias if scale is None else bias * scale)[:, None]
            out = bias.expand(-1, tap.shape.numel() // tap.width, -1) if out is None else out + bias
        return out

    def direct(self, name: str) -> Tensor | None:
        """The gradient of every source token."""
        gradient = self.by_name.get(name)
        scale = self.scale(name)
        return gradient if gradient is None or scale is None else gradient * scale

    def head(self, hidden: Tensor, names: HeadNames) -> Tensor | None:
        """⟨h_m, h_l⟩ v_l and the cross term of tied weights."""
        weight, bias = names
        factor = self.head_factor
        out: Tensor | None = None
        if factor is not None and weight is not None:
            scale = self.scale(weight)
            rows = factor.rows.to(hidden.dtype)
            source = factor.hidden.to(hidden.dtype)
            if scale is None:
                out = (source @ hidden.T)[:, :, None] * rows[:, None, :]
            else:  # Σ_j P_vj v_l[v] h_l[j] h_m[j] = v_l[v] (P (h_l ∘ h_m))[v]
                mixed = (source[:, None] * hidden[None]).flatten(0, 1)
                out = project(mixed, scale).view(len(rows), len(hidden), -1) * rows[:, None, :]
        if factor is not None and bias is not None:
            rows = factor.rows.to(hidden.dtype)
            scale = self.scale(bias)
            rows = (rows if scale is None else rows * scale)[:, None]
            out = rows.expand(-1, len(hidden), -1) if out is None else out + rows
        if weight is None or factor is None:
            return out
        for tap, delta in self.by_weight.get(weight, ()):
            moved = self._embedding_to_head(tap, delta, hidden, factor.rows.shape[1], weight)
            out = moved if out is None else out + moved
        return out

    def _embedding_to_head(
        self, tap: Tap, delta: Tensor, hidden: Tensor, vocabulary: int, weight: str
    ) -> Tensor:
        """Tied weights: the embedding rows that token l changes are also output rows."""
        if tap.kind != "embedding":
            raise NotImplementedError(f"{weight} is tied to the head through a {tap.kind} product")
        seen = tap.updated()
        ids = tap.activations[seen]
        delta = delta[:, seen].to(hidden.dtype)
        scale = self.scale(weight)
        if scale is not None:
            delta = delta * scale[ids]
        out = hidden.new_zeros(len(delta), len(hidden), vocabulary)
        out.index_add_(2, ids, torch.einsum("ctd,md->cmt", delta, hidden))
        return out


def _push_tap(tap: Tap, source: Tap, delta: Tensor, scale: Tensor | None) -> Tensor:
    """E[c, s] = (P ∘ gradient of c) applied to the activations of row s."""
    if tap.kind != source.kind:
        raise NotImplementedError(f"{tap.weight}: {tap.kind} and {source.kind} uses mixed")
    if tap.kind == "embedding":
        same = tap.activations[:, None] == source.activations[None, :]
        same &= source.updated()[None, :]
        out = torch.matmul(same.to(delta.dtype), delta)
        return out if scale is None else out * scale[tap.activations]
    if scale is None:
        similarity = tap.activations @ source.activations.T
        return torch.matmul(similarity, delta)
    scale = scale if tap.kind == "linear" else scale.T
    moved = preconditioned_push(scale, tap.activations, source.activations, delta)
    return moved.to(delta.dtype)


def _push_head_to_embedding(tap: Tap, head: HeadFactor, scale: Tensor | None) -> Tensor:
    """Tied weights: the output rows that token l changes are also embedding rows."""
    if tap.kind != "embedding":
        raise NotImplementedError(f"{tap.weight} is tied to the head through a {tap.kind} product")
    ids = tap.activations
    picked = head.at(ids).to(head.hidden.dtype)  # (c, s)
    out = picked[:, :, None] * head.hidden[:, None, :]
    return out if scale is None else out * scale[ids]


class Pushforward:
    """Pushes sources through one trace; keeps the linearised segments while `keep` is set.

    With streamed weights it keeps none: they would hold the weights.

    Cost per tangent: 2 N T FLOPs for the block-linear parameters plus the taps' own tangents; the
    linearisation costs one forward and one backward pass and is shared by all tangents when kept.
    """

    def __init__(self, trace: Trace, keep: bool = True):
        self.trace = trace
        self.anatomy: Anatomy = trace.anatomy
        check_push(self.anatomy, trace.example)
        self.keep = keep and not self.anatomy.streamed
        self._kept: dict[int, Linearized] = {}

    def _segment(self, segment: int) -> Linearized:
        if segment in self._kept:
            return self._kept[segment]
        linear = linearize(self.anatomy.replay(self.trace, segment, self.trace.length))
        if self.keep:
            self._kept[segment] = linear
        return linear

    def hidden(self, source: Source) -> Tensor:
        """Tangent (c, M, d) of the head's input at the response positions."""
        state: Tensor | None = None
        names = self.anatomy.segments
        used = {s for e in self.anatomy.ledger.values() for s in e.segments}
        for segment, name in enumerate(names):
            if state is None and name not in used:
                continue
            if name == FRONT and FRONT not in used:
                continue
            state = push(self._segment(segment), source, state)
        hidden = self.trace.hidden
        if state is None:
            return hidden.new_zeros(source.size, *hidden.shape)
        state = state.reshape(len(state), -1, state.shape[-1])
        return state[:, self.trace.positions]

    def products(self, source: AlongFactors, head: HeadFactor, below: Tensor) -> Tensor:
        """⟨v_m, Δz_m⟩ (M, c) for one cotangent v_m per response token; Δz itself is not formed.

        Args:
            source: The tangents.
            head: The head's factors for the cotangents.
            below: The cotangents at the head's input, Wᵀ v_m, (M, d).
        """
        moved = self.hidden(source).to(below.dtype)
        total = torch.einsum("cmd,md->mc", moved, below)
        one = Factors(head=head)

        def add(name: str, products: Tensor) -> None:
            total.add_(products.to(total.dtype))

        for part in source.factors:
            pair_head(one, part, add, source.precondition)
        return total

    def logits(self, source: Source) -> Tensor:
        """Tangent (c, M, V) of the logits: Δz, exact to first order."""
        precise = self.trace.logits.dtype
        moved = self.hidden(source).to(precise)
        hidden = self.trace.hidden
        change = _through_head(self.anatomy, source, moved, hidden.to(precise), self.trace.slope)
        return checked(change, "the change of the logits", hidden.dtype)


def _through_head(
    anatomy: Anatomy, source: Source, moved: Tensor, hidden: Tensor, slope: Tensor | None
) -> Tensor:
    """Tangent (c, M, V) of the logits, from those of the head's input (c, M, d)."""
    raw = anatomy.head.project(moved.flatten(0, 1)).view(*moved.shape[:2], -1)
    own = source.head(anatomy.head.own(hidden), (anatomy.head_weight, anatomy.head_bias))
    if own is not None:
        raw = raw + own
    return raw if slope is None else raw * slope


def push_direction(trace: Trace, direction: Direction) -> Tensor:
    """J Δθ: what a change Δθ of the parameters does to the logits, Δz (M, V), to first order.

    Args:
        trace: The stored forward pass of the observed sequence.
        direction: Δθ, parameter name -> tensor of its shape; names that are left out stay.

    Cost: about four forward passes.
    """
    with trace.anatomy.analysis():
        return Pushforward(trace, keep=False).logits(AlongDirection(direction))[0]


def log_prob_shift(trace: Trace, direction: Direction) -> Tensor:
    """A J Δθ: the change of all log-probs, (M, V) in nats, to first order in Δθ."""
    return delta_log_probs(push_direction(trace, direction), trace.logits)


def log_prob_shifts(trace: Trace, directions: Sequence[Direction]) -> Tensor:
    """`log_prob_shift` for each of D directions, (D, M, V); the model is linearised once."""
    push = Pushforward(trace, keep=len(directions) > _TOGETHER)
    with trace.anatomy.analysis():
        moved = [push.logits(AlongDirections(part)) for part in _in_parts(directions)]
    return torch.cat([delta_log_probs(logits, trace.logits) for logits in moved])


def realised_shift(trace: Trace, direction: Direction) -> Tensor:
    """The change of log π(y_m) of the realised tokens, (M,) in nats, to first order in Δθ."""
    return log_prob_shift(trace, direction).gather(1, trace.targets[:, None])[:, 0]


def batched_shifts(
    model: nn.Module | Anatomy,
    examples: Sequence[Example],
    directions: Sequence[Direction],
    *,
    size: int = 32,
) -> Iterator[tuple[int, Shift]]:
    """`log_prob_shifts` of many examples, of which those of like length share each pass.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences.
        directions: D times Δθ, parameter name -> tensor of its shape.
        size: Most sequences in a pass; one, where a model does not keep sequences apart.

    Yields:
        The index of an example, and its Shift; in the order of the passes.

    Cost: two forward and one backward pass for all directions, and about two forward passes for
    each.
    """
    anatomy = Anatomy.of(model)
    if not examples:
        return
    anatomy.trace(min(examples, key=lambda example: example.length))
    sources = [AlongDirections(part) for part in _in_parts(directions)]
    for length, index in batches(anatomy, examples, size):
        shifts = _shift_together(anatomy, [examples[i] for i in index], length, sources)
        yield from zip(index, shifts, strict=True)


@undisturbed
def _shift_together(
    anatomy: Anatomy, examples: Sequence[Example], length: int, sources: Sequence[AlongDirections]
) -> list[Shift]:
    """The shifts of examples in one batch of sequences of this length."""
    states: list[Tensor | None] = [None] * len(sources)
    check_push(anatomy, examples[0])
    with anatomy.analysis():
        batch = pass_together(anatomy, examples, length, keep=False, apart=False)
        for segment in range(anatomy.lowest_segment(), len(anatomy.segments)):
            linear = linearize(anatomy.replay(batch, segment, length))
            states = [push(linear, s, state) for s, state in zip(sources, states, strict=True)]
        shifts = []
        for row, example in enumerate(examples):
            at = torch.tensor(example.positions, device=anatomy.device)
            hidden = batch.hidden[row, at]
            logits, slope = anatomy.head_logits(hidden)
            moved = []
            for source, state in zip(sources, states, strict=True):
                if state is None:
                    moving = hidden.new_zeros(source.size, *hidden.shape)
                else:
                    moving = state[:, row, at]
                change = _through_head(anatomy, source, moving.to(logits), hidden.to(logits), slope)
                moved.append(delta_log_probs(change, logits))
            targets = torch.tensor(example.targets, device=anatomy.device)
            shifts.append(Shift(logits, targets, torch.cat(moved)))
    for shift, example in zip(shifts, examples, strict=True):
        if not bool(torch.isfinite(shift.logits).all()):
            anatomy.trace(example)  # raises, and says what is not finite
    return shifts


@dataclass(frozen=True)
class Shift:
    """What D small changes of the parameters do to the log-probs of one response.

    Attributes:
        logits: Before the change, (M, V).
        targets: Realised tokens, (M,).
        change: First-order change of all log-probs, (D, M, V), in nats.
    """

    logits: Tensor
    targets: Tensor
    change: Tensor

    @property
    def realised(self) -> Tensor:
        """First-order change of log π(y_m), (D, M), in nats."""
        at = self.targets.expand(len(self.change), -1)
        return self.change.gather(2, at[:, :, None])[:, :, 0]


def pair_direction(
    one: Factors, source: AlongDirection, add: Callable[[str, Tensor], None]
) -> None:
    """Adds ⟨gradient of one's m, Δθ⟩ parameter by parameter, (c,) each."""
    for tap, delta in one.taps:
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
        for part in (replace(tap, bias=None), replace(tap, weight=None)):
            moved = source.tap(part)
            if moved is not None:
                add(
                    str(part.weight or part.bias),
                    torch.einsum(
                        "ctd,td->c" if wide.dim() == 3 else "cd,cd->c", wide, moved[0].to(wide)
                    ),
                )
    for name, gradient in one.direct.items():
        if (moved := source.direct(name)) is not None:
            add(name, gradient.flatten(1) @ moved.flatten().to(gradient.dtype))
    if one.head is not None:
        for names in ((one.head.weight, None), (None, one.head.bias)):
            moved = source.head(one.head.hidden.to(one.head.rows.dtype), names)
            if moved is not None:
                add(str(names[0] or names[1]), (one.head.rows * moved[0]).sum(1))


def delta_log_probs(delta_logits: Tensor, logits: Tensor) -> Tensor:
    """A Δz: change of all log-probs, (…, M, V) in nats, from a change of the logits.

    Computed as Σ_w π_w (Δz_v − Δz_w) around the likeliest token, so that a common shift of the
    logits and probabilities near one cancel exactly.
    """
    pivot = logits.argmax(-1, keepdim=True).expand(*delta_logits.shape[:-1], 1)
    moved = delta_logits - delta_logits.gather(-1, pivot)
    return moved - (logits.softmax(-1) * moved).sum(-1, keepdim=True)
