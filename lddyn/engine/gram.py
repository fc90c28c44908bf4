"""Inner products of gradients.

`token_gram` pulls the tokens of two sides back in step, and pairs their factors in every segment.
`factored_gram` pushes the factors of one side through the other. `sequence_gram` multiplies flat
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import BodyRows, Factors, HeadFactor, Shelf, merge, pair
from lddyn.engine.pullback import Pullback, logits_head, reach, segments_down
from lddyn.engine.pushforward import (
    AlongFactors,
    Direction,
    Pushforward,
)
from lddyn.engine.trace import Trace
from lddyn.finite import checked
from lddyn.memory import DEFAULT_MEMORY, is_out_of_memory, parse_memory, tidied

_Made = TypeVar("_Made")

_Group = list[tuple[int, Tensor]]  # numbers of sides, and rows of each

Sink = Callable[[str, Tensor, Tensor, Tensor], None]  # parameter, rows o, rows u, block (c, c')

CHUNK = 32

_ROWS = 4096

_ROWS_GPU = 2**20


@dataclass
class Side:
    """Cotangents on the logits of one traced sequence: rows (M, V).

    Attributes:
        trace: The forward pass of the sequence.
        given: The cotangents. None: the log-prob rows e_y − π, the gradients of log π(y_m) with
            respect to the logits, which are formed when they are used. `BodyRows`: cotangents at
            the head's input, any number for each token (`at_tokens`); their products leave out
            those of the head with itself.
    """

    trace: Trace
    given: Tensor | BodyRows | None = None

    @classmethod
    def log_probs(cls, trace: Trace) -> Side:
        """The rows e_y − π."""
        return cls(trace)

    @classmethod
    def below_head(cls, trace: Trace, rows: BodyRows, tokens: Tensor | None = None) -> Side:
        """The same n cotangents at the head's input for every token; row m n + i is token m's i-th.

        Args:
            trace: The forward pass of the sequence.
            rows: The n cotangents, of W h + b.
            tokens: Some of the response tokens; default: all of them.
        """
        n, device = len(rows.hidden), trace.ids.device
        if tokens is None:
            tokens = torch.arange(len(trace.positions), device=device)
        repeated = rows[torch.arange(n, device=device).repeat(len(tokens))]
        return cls(trace.at_tokens(tokens.repeat_interleave(n)), repeated)

    @property
    def rows(self) -> Tensor:
        """Cotangents (M, V)."""
        assert not isinstance(self.given, BodyRows), "no logit cotangents were given"
        if self.given is not None:
            return self.given
        return ops.residual(self.trace.logits, self.trace.targets)[0]

    def __len__(self) -> int:
        return len(self.trace.positions)

    def bytes_per_cotangent(self) -> int:
        """Workspace of one cotangent in the widest segment: factors, and the pullback's buffers."""
        trace = self.trace
        # The pullback of a product holds its output's cotangent and, for attention, the softmax's.
        parts = [work.elements for work in trace.work.values()]
        elements = sum(parts) if trace.anatomy.joined else max(parts, default=0)
        return 4 * elements * trace.hidden.element_size()

    def chunk(self, budget: int) -> int:
        """Cotangents to pull back together."""
        length = reach(int(self.trace.positions.max()), self.trace.length)
        return chunk_size(length, self.bytes_per_cotangent(), budget, self.trace.hidden.device)


def token_gram(
    observed: Sequence[Side],
    updated: Sequence[Side],
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    sink: Sink | None = None,
) -> Tensor:
    """⟨J_mᵀ v_m, J_lᵀ v_l⟩ for all observed rows m and updated rows l, both sides pulled back.

    Args:
        observed: Sides whose rows are concatenated into M. May be traces of another copy of the
            model (a shifted one) than the updated sides: parameters are matched by name.
        updated: Sides whose rows are concatenated into L.
        memory: Workspace in bytes or as "2GiB", beyond models, traces and the result.
        progress: Show a bar over segments.
        sink: Called with (parameter, rows of o, rows of u, block) for each contribution.

    Returns:
        (M, L), float32 (float64 for float64 models).

    Cost: 2 N (Σ_m (p_m + 1) + Σ_l (p_l + 1)) FLOPs for pulling, plus (T + L)/(2 d) of that for
    pairing. A side that is both observed and updated is pulled back once.
    """
    budget = parse_memory(memory, updated[0].trace.anatomy.device)
    observed, updated = _distinct(observed), _distinct(updated)
    anatomy = updated[0].trace.anatomy
    shared = [n for n in anatomy.shared() if n != anatomy.head_weight]
    if shared:
        raise NotImplementedError(
            f"{shared[0]} is used by {sorted(anatomy.ledger[shared[0]].segments)}: "
            "use factored_gram"
        )
    starts_o, starts_u = _offsets(observed), _offsets(updated)
    dtype = updated[0].trace.logits.dtype
    total = torch.zeros(starts_o[-1], starts_u[-1], dtype=dtype, device=anatomy.device)

    def adder(rows_o: Tensor, rows_u: Tensor) -> Callable[[str, Tensor], None]:
        def add(name: str, block: Tensor) -> None:
            total[rows_o[:, None], rows_u[None, :]] += block.to(dtype)
            if sink is not None:
                sink(name, rows_o, rows_u, block.to(dtype))

        return add

    # The factors of a segment are kept for all updated rows of a group; groups are as large as half
    # the budget allows, and observed rows are pulled again for each further group that they need.
    groups = _groups(updated, budget // 2)
    steps = tqdm(
        total=len(groups) * len(list(segments_down(anatomy))),
        desc="token Gram",
        unit="segment",
        disable=None if progress else True,
        leave=False,
    )
    turns = _turns(updated, groups)
    for number, group in enumerate(groups):
        pulls = _descents(observed, updated, group, number, turns, budget)
        heads = [pull.down.head_factors() for pull in pulls]
        for pull_o, head_o in zip(pulls, heads, strict=True):
            for pull_u, head_u in zip(pulls, heads, strict=True):
                if pull_o.meets(pull_u):
                    pair(head_o, head_u, adder(pull_o.among_o(), pull_u.among_u()))
        shelf = Shelf()
        for segment in segments_down(anatomy):
            _pair_segment(segment, pulls, heads, anatomy, adder, shelf, budget)
            shelf.turn()
            steps.update()
    steps.close()
    return checked(total, "the Gram matrix", observed[0].trace.hidden.dtype)


@dataclass
class _Descent:
    """Some rows of one side on their way down, for one group of updated rows.

    The Gram of sides that are observed and updated is symmetric: the products of two of their rows
    are computed once, in the first group that holds one of them.

    Attributes:
        down: Their pullback.
        at_o: Number of observed rows before this side's; None: it is not observed.
        at_u: Number of updated rows before this side's; None: its products as updated rows are not
            wanted in this group.
        kept: Whether they are the group's rows, whose factors are kept for each segment.
        earlier: Whether they have met the rows of sides that are both, in an earlier group.
    """

    down: Pullback
    at_o: int | None
    at_u: int | None
    kept: bool = False
    earlier: bool = False

    def meets(self, other: _Descent) -> bool:
        """Whether products of these rows as observed with others as updated rows are wanted."""
        if self.at_o is None or other.at_u is None:
            return False
        return not (self.earlier and other.at_o is not None) if other.kept else self.kept

    def among_o(self, rows: Tensor | None = None) -> Tensor:
        """Numbers of rows of this side, by default of its own, among all observed rows."""
        assert self.at_o is not None
        return (self.down.selected if rows is None else rows) + self.at_o

    def among_u(self, rows: Tensor | None = None) -> Tensor:
        """Numbers of rows of this side, by default of its own, among all updated rows."""
        assert self.at_u is not None
        return (self.down.selected if rows is None else rows) + self.at_u


def _descents(
    observed: Sequence[Side],
    updated: Sequence[Side],
    group: _Group,
    number: int,
    turns: Sequence[Tensor],
    budget: int,
) -> list[_Descent]:
    """The rows that go down together for one group: its own, and the observed ones they need.

    Args:
        observed: All observed sides.
        updated: All updated sides.
        group: Updated sides, by number, and rows of each.
        number: Number of this group.
        turns: As of `_turns`.
        budget: Bytes.
    """
    starts_o, starts_u = _offsets(observed), _offsets(updated)

    def down(side: Side, rows: Tensor) -> Pullback:
        with side.trace.anatomy.analysis():
            return Pullback(side.trace, side.given, rows, side.chunk(budget))

    pulls, alone = [], False  # whether a side of the group is not observed
    for index, rows in group:
        twin = _find(observed, updated[index])
        alone |= twin is None
        at_o = None if twin is None else starts_o[twin]
        pulls.append(_Descent(down(updated[index], rows), at_o, starts_u[index], kept=True))
    for side, at_o in zip(observed, starts_o, strict=False):
        twin = _find(updated, side)
        if twin is None:
            every = torch.arange(len(side), device=side.trace.positions.device)
            pulls.append(_Descent(down(side, every), at_o, None))
            continue
        turn = turns[twin]
        later, earlier = (mask.nonzero()[:, 0] for mask in (turn > number, turn < number))
        if len(later):
            pulls.append(_Descent(down(side, later), at_o, starts_u[twin]))
        if len(earlier) and alone:
            pulls.append(_Descent(down(side, earlier), at_o, None, earlier=True))
    return pulls


def _pair_segment(
    segment: int,
    pulls: list[_Descent],
    heads: list[Factors],
    anatomy: Anatomy,
    adder: Callable[[Tensor, Tensor], Callable[[str, Tensor], None]],
    shelf: Shelf,
    budget: int,
) -> None:
    """Pulls every chunk of every side through one segment and pairs its factors."""
    kept: list[tuple[_Descent, Tensor, Factors]] = []
    tied = segment == 0 and anatomy.tied

    def observe(pull: _Descent, rows: Tensor, factors: Factors, own: int | None = None) -> None:
        for i, (other, rows_u, other_factors) in enumerate(kept):
            if i == own or not pull.meets(other):
                continue
            add = adder(pull.among_o(rows), other.among_u(rows_u))
            if not pull.kept and other.meets(pull):
                turned = adder(other.among_o(rows_u), pull.among_u(rows))
                add = _mirrored(add, turned, len(rows_u))
            pair(factors, other_factors, add)
        for other, head in zip(pulls, heads, strict=True) if tied else ():
            if pull.meets(other):
                pair(factors, head, adder(pull.among_o(rows), other.among_u()))
            if not pull.kept and other.meets(pull):
                pair(head, factors, adder(other.among_o(), pull.among_u(rows)))

    both: list[tuple[int, slice]] = []  # place in `kept` of rows on both sides, a chunk of them
    for pull in pulls:
        if not pull.kept:
            continue
        longest = max((chunk.length for chunk in pull.down.chunks), default=0)
        with pull.down.anatomy.analysis():
            chunks = tidied(pull.down.step(segment), budget)
            joined = merge(chunks, len(pull.down.selected), longest, shelf)
        for merged in joined:
            if pull.at_o is not None:
                both += [(len(kept), part) for part in merged.parts]
            kept.append((pull, merged.rows, merged.factors))
    for pull, rows, factors in kept if tied else ():
        for other, head in zip(pulls, heads, strict=True):
            if other.meets(pull):
                pair(head, factors, adder(other.among_o(), pull.among_u(rows)))
    for place, part in both:
        pull, rows, factors = kept[place]
        observe(pull, rows[part], factors.part(part), place)
        # The Gram of a side with itself is symmetric: a chunk is paired with those up to it.
        upto, before = slice(0, part.stop), slice(0, part.start)
        add = _mirrored(
            adder(pull.among_o(rows[part]), pull.among_u(rows[upto])),
            adder(pull.among_o(rows[before]), pull.among_u(rows[part])),
            part.start,
        )
        pair(factors.part(part), factors.part(upto), add)
    for pull in pulls:
        if not pull.kept:
            with pull.down.anatomy.analysis():
                for rows, factors in tidied(pull.down.step(segment), budget):
                    observe(pull, rows, factors)


def _mirrored(
    add: Callable[[str, Tensor], None], transposed: Callable[[str, Tensor], None], count: int
) -> Callable[[str, Tensor], None]:
    """Adds a block, and its first columns once more on the other side of the diagonal."""

    def both(name: str, block: Tensor) -> None:
        add(name, block)
        if count:
            transposed(name, block[:, :count].T)

    return both


def factored_push(
    observed: Sequence[Trace],
    updated: Sequence[Side],
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    precondition: Direction | None = None,
    select: Tensor | None = None,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Pushes the factors of every updated row through every observed trace.

    Yields (rows of u (c,), [Δz (c, M, V) per observed trace]) for K_{m,l} v_l, chunk by chunk, with
    the diagonal P of `precondition` between the two sides when given; `select` restricts the rows
    of each updated side.

    Cost: L (2 N T_u + 2 N T_o + 2 T_o T_u Σd_out) FLOPs; with P, 2 N (T_u + T_o) per row more.
    """
    anatomy = updated[0].trace.anatomy
    budget = parse_memory(memory, anatomy.device)
    pushes = _pushes(observed, budget)
    vocabulary = 8 * anatomy.vocabulary * max(len(t.positions) for t in observed)

    def push(side: Side, part: Tensor) -> tuple[Tensor, list[Tensor]]:
        rows, source = _source(side, part, precondition)
        return rows, _through(pushes, lambda one: one.logits(source))

    for start, (rows, moved) in _chunks(updated, budget, vocabulary, push, progress, select):
        yield rows + start, moved


def factored_gram(
    observed: Sequence[Side],
    updated: Sequence[Side],
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    precondition: Direction | None = None,
) -> Tensor:
    """The same M x L products as `token_gram`, by pushing the updated side's factors forward.

    With `precondition`, ⟨J_mᵀ v_m, P ∘ J_lᵀ v_l⟩ for a diagonal P (name -> tensor). The pushed
    states meet the cotangents at the head's input, so no change of the logits is formed.

    Cost: as of `factored_push`.
    """
    starts = _offsets(observed)
    first = updated[0].trace.logits
    budget = parse_memory(memory, first.device)
    total = torch.zeros(starts[-1], _offsets(updated)[-1], dtype=first.dtype, device=first.device)
    pushes = _pushes([side.trace for side in observed], budget)
    ends = [_at_head(side) for side in observed]

    def push(side: Side, part: Tensor) -> tuple[Tensor, list[Tensor]]:
        rows, source = _source(side, part, precondition)
        pairs = iter(ends)
        return rows, _through(pushes, lambda one: one.products(source, *next(pairs)))

    for at, (rows, blocks) in _chunks(updated, budget, 0, push, progress):
        for start, block in zip(starts, blocks, strict=False):
            total[start : start + len(block), rows + at] = block.to(total.dtype)
    return checked(total, "the Gram matrix", observed[0].trace.hidden.dtype)


def _pushes(observed: Sequence[Trace], budget: int) -> list[Pushforward]:
    """A push through each observed trace; linearised segments are kept where all of them fit."""
    return [Pushforward(t, keep=graph_bytes(t) * len(observed) < budget // 2) for t in observed]


def _at_head(side: Side) -> tuple[HeadFactor, Tensor]:
    """The head's factors of a side, and its cotangents at the head's input, (M, d)."""
    assert not isinstance(side.given, BodyRows), "no logit cotangents were given"
    with side.trace.anatomy.analysis():
        head = logits_head(side.trace, side.given)
        return head, side.trace.anatomy.head.back_project(head.rows)


def _through(pushes: Sequence[Pushforward], push: Callable[[Pushforward], Tensor]) -> list[Tensor]:
    """What a push through each observed trace gives."""
    out = []
    for one in pushes:
        with one.anatomy.analysis():
            out.append(push(one))
    return out


def _source(
    side: Side, select: Tensor, precondition: Direction | None
) -> tuple[Tensor, AlongFactors]:
    """Rows of one side pulled back through the whole model, and the tangents along them."""
    anatomy = side.trace.anatomy
    with anatomy.analysis():
        down = Pullback(side.trace, side.given, select, len(select))
        factors = [down.head_factors()]
        for segment in segments_down(anatomy):
            pieces = [part for _, part in down.step(segment)]
            if len(pieces) != 1:  # the pullback had to halve its chunk: so must the push
                raise torch.OutOfMemoryError(f"pulling back {len(select)} tokens does not fit")
            factors += pieces
    return down.selected, AlongFactors(factors, precondition)


def _chunks(
    updated: Sequence[Side],
    budget: int,
    extra: int,
    run: Callable[[Side, Tensor], _Made],
    progress: bool,
    select: Tensor | None = None,
) -> Iterator[tuple[int, _Made]]:
    """Runs chunks of the updated rows, as many at a time as fit; one that does not is halved.

    Args:
        updated: The sides.
        budget: Bytes.
        extra: Bytes that a row needs besides its factors.
        run: Gets a side and some of its rows.
        progress: Show a bar over rows.
        select: Some rows of each side.

    Yields:
        The number of rows of the sides before this one, and what `run` returned.
    """
    starts = _offsets(updated)
    anatomy = updated[0].trace.anatomy
    widest = _ROWS_GPU if anatomy.device.type == "cuda" else CHUNK
    steps = tqdm(
        total=starts[-1],
        desc="pushing",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    for start, side in zip(starts, updated, strict=False):
        per_row = side.bytes_per_cotangent() * (1 + len(anatomy.blocks) // 2) + extra
        size = max(1, min(widest, budget // 2 // per_row))
        order = side.trace.positions.argsort(stable=True) if select is None else select
        pending = list(order.split(size))
        while pending:
            part = pending.pop(0)
            try:
                made = run(side, part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                pending[:0] = part.split((len(part) + 1) // 2)
                continue
            steps.update(len(part))
            yield start, made
    steps.close()


def sequence_gram(
    gradients: Tensor | Sequence[Tensor],
    precondition: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor:
    """⟨g_i, P ∘ g_j⟩ of flat gradients g (N vectors of P numbers), (N, N) in float64 on the CPU.

    Args:
        gradients: A tensor (N, P), or N tensors (P,), as `flat_gradient` returns them.
        precondition: The diagonal P (P,); None: ones.
        others: Gradients (N', P) in the place of g_j; the result is then (N, N').

    Cost: 2 N² P FLOPs; products are summed over blocks of 2^18 columns in float64.
    """
    count = len(gradients if others is None else others)
    total = torch.zeros(len(gradients), count, dtype=torch.float64)
    for start in range(0, len(gradients[0]), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        if isinstance(gradients, Tensor):
            part = gradients[:, columns]
        else:
            part = torch.stack([gradient[columns] for gradient in gradients])
        weighted = part if precondition is None else part * precondition[columns]
        other = part if others is None else others[:, columns]
        total += (weighted @ other.T).double().cpu()
    return total


_COLUMNS = 1 << 18  # of flat gradients in one product


def graph_bytes(trace: Trace) -> int:
    """Rough size of all linearised segments: products and attention, values and two graphs."""
    elements = sum(w.elements for w in trace.work.values())
    return 8 * elements * trace.hidden.element_size()


def _offsets(sides: Sequence[Side]) -> list[int]:
    offsets = [0]
    for side in sides:
        offsets.append(offsets[-1] + len(side))
    return offsets


def _distinct(sides: Sequence[Side]) -> list[Side]:
    """The sides, with a copy in place of a side that is listed twice: code compares their ids."""
    return [
        Side(side.trace, side.given) if any(side is s for s in sides[:i]) else side
        for i, side in enumerate(sides)
    ]


def _find(sides: Sequence[Side], wanted: Side) -> int | None:
    return next((i for i, side in enumerate(sides) if side is wanted), None)


def chunk_size(
    length: int, bytes_per_cotangent: int, budget: int, device: torch.device | None = None
) -> int:
    """How many cotangents are pulled back together.

    On a CPU, as many as make some thousands of rows, which stay in its cache. On a GPU, where a
    chunk costs the launches of a replay, as many as fit.
    """
    best = max(CHUNK // 2, min(CHUNK, _ROWS // length))
    if device is not None and device.type == "cuda":
        best = max(best, _ROWS_GPU // length)
    return int(max(1, min(best, budget // 4 // max(1, bytes_per_cotangent))))


def _turns(sides: Sequence[Side], groups: Sequence[_Group]) -> list[Tensor]:
    """The number of the group that each row of each side is in, one tensor (L,) a side."""
    turns = [torch.empty_like(side.trace.positions) for side in sides]
    for number, group in enumerate(groups):
        for index, rows in group:
            turns[index][rows] = number
    return turns


def _groups(sides: Sequence[Side], budget: int) -> list[_Group]:
    """Rows of the updated sides in groups whose factors of one segment fit the budget."""
    groups: list[_Group] = [[]]
    left = budget
    for index, side in enumerate(sides):
        width = max((w.width for w in side.trace.work.values()), default=0)
        cost = max(1, width * side.trace.hidden.element_size())
        order = side.trace.positions.argsort(stable=True)
        while len(order):
            fit = left // cost
            if fit <= 0 and groups[-1]:
                groups.append([])
                left = budget
                continue
            take = max(1, min(len(order), fit))
            groups[-1].append((index, order[:take]))
            order, left = order[take:], left - take * cost
    return groups
