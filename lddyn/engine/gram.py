"""Inner products of gradients.

`token_gram` pulls the tokens of two sides back in step, and pairs their factors in every segment.
`factored_gram` pushes the factors of one side through the other. `sequence_gram` multiplies flat
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import BodyRows, Factors, Shelf, merge, pair
from lddyn.engine.pullback import Pullback, reach, segments_down
from lddyn.engine.pushforward import (
    AlongFactors,
    Direction,
    Pushforward,
)
from lddyn.engine.trace import Trace
from lddyn.finite import checked
from lddyn.memory import DEFAULT_MEMORY, is_out_of_memory, parse_memory

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
    # the budget allows, and the observed side is pulled again for each further group.
    groups = _groups(updated, budget // 2)
    steps = tqdm(
        total=len(groups) * len(list(segments_down(anatomy))),
        desc="token Gram",
        unit="segment",
        disable=None if progress else True,
        leave=False,
    )
    for group in groups:
        pulls: list[tuple[Pullback, int | None, int | None]] = []  # with offsets in o and in u
        with anatomy.analysis():
            for index, select in group:
                side = updated[index]
                twin = _find(observed, side)
                pulls.append(
                    (
                        Pullback(side.trace, side.given, select, side.chunk(budget)),
                        None if twin is None else starts_o[twin],
                        starts_u[index],
                    )
                )
        chosen = {id(updated[i]): s for i, s in group}
        for index, side in enumerate(observed):
            with side.trace.anatomy.analysis():
                rest = torch.arange(len(side), device=anatomy.device)
                twin = _find(updated, side)
                if twin is not None and id(updated[twin]) in chosen:
                    mask = torch.ones(len(side), dtype=torch.bool, device=anatomy.device)
                    mask[chosen[id(updated[twin])]] = False
                    rest = rest[mask]
                if len(rest):
                    pull = Pullback(side.trace, side.given, rest, side.chunk(budget))
                    pulls.append((pull, starts_o[index], None))

        heads = [pull.head_factors() for pull, _, _ in pulls]
        for (pull_o, at_o, _), head_o in zip(pulls, heads, strict=True):
            for (pull_u, _, at_u), head_u in zip(pulls, heads, strict=True):
                if at_o is not None and at_u is not None:
                    pair(head_o, head_u, adder(pull_o.selected + at_o, pull_u.selected + at_u))
        shelf = Shelf()
        for segment in segments_down(anatomy):
            _pair_segment(segment, pulls, heads, anatomy, adder, shelf)
            shelf.turn()
            steps.update()
    steps.close()
    return checked(total, "the Gram matrix", observed[0].trace.hidden.dtype)


def _pair_segment(
    segment: int,
    pulls: list[tuple[Pullback, int | None, int | None]],
    heads: list[Factors],
    anatomy: Anatomy,
    adder: Callable[[Tensor, Tensor], Callable[[str, Tensor], None]],
    shelf: Shelf,
) -> None:
    """Pulls every chunk of every side through one segment and pairs its factors."""
    kept: list[tuple[Tensor, Factors]] = []
    tied = segment == 0 and anatomy.tied

    def observe(rows_o: Tensor, factors: Factors, own: int | None = None) -> None:
        for i, (rows_u, other) in enumerate(kept):
            if i != own:
                pair(factors, other, adder(rows_o, rows_u))
        if tied:
            for (pull, _, at_u), head in zip(pulls, heads, strict=True):
                if at_u is not None:
                    pair(factors, head, adder(rows_o, pull.selected + at_u))

    both: list[tuple[int, Tensor, slice]] = []  # place in `kept`, rows in o, a chunk of them
    for pull, at_o, at_u in pulls:
        if at_u is None:
            continue
        longest = max((chunk.length for chunk in pull.chunks), default=0)
        with pull.anatomy.analysis():
            joined = merge(pull.step(segment), len(pull.selected), longest, shelf)
        for merged in joined:
            if at_o is not None:
                both += [(len(kept), merged.rows + at_o, part) for part in merged.parts]
            kept.append((merged.rows + at_u, merged.factors))
    if tied:
        for (pull_o, at_o, _), head in zip(pulls, heads, strict=True):
            for rows_u, factors in kept if at_o is not None else ():
                assert at_o is not None
                pair(head, factors, adder(pull_o.selected + at_o, rows_u))
    for place, rows, part in both:
        observe(rows[part], kept[place][1].part(part), place)
        # The Gram of a side with itself is symmetric: a chunk is paired with those up to it.
        rows_u, factors = kept[place]
        upto, before = slice(0, part.stop), slice(0, part.start)
        add = _mirrored(
            adder(rows[part], rows_u[upto]), adder(rows[before], rows_u[part]), part.start
        )
        pair(factors.part(part), factors.part(upto), add)
    for pull, at_o, at_u in pulls:
        if at_u is None and at_o is not None:
            with pull.anatomy.analysis():
                for rows, factors in pull.step(segment):
                    observe(rows + at_o, factors)


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
    widest = _ROWS_GPU if anatomy.device.type == "cuda" else CHUNK
    starts = _offsets(updated)
    vocabulary = 8 * anatomy.vocabulary * max(len(t.positions) for t in observed)
    pushes = [Pushforward(t, keep=graph_bytes(t) * len(observed) < budget // 2) for t in observed]
    steps = tqdm(
        total=starts[-1],
        desc="pushing",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    for start, side in zip(starts, updated, strict=False):
        per_row = side.bytes_per_cotangent() * (1 + len(anatomy.blocks) // 2) + vocabulary
        size = max(1, min(widest, budget // 2 // per_row))
        order = side.trace.positions.argsort(stable=True) if select is None else select
        pending = list(order.split(size))
        while pending:
            part = pending.pop(0)
            try:
                rows, moved = _push_rows(pushes, side, part, precondition)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                pending[:0] = part.split((len(part) + 1) // 2)
                continue
            steps.update(len(part))
            yield rows + start, moved
    steps.close()


def _push_rows(
    pushes: Sequence[Pushforward], side: Side, select: Tensor, precondition: Direction | None
) -> tuple[Tensor, list[Tensor]]:
    """Rows of one side pulled back and pushed through every observed trace: (rows, [Δz])."""
    anatomy = side.trace.anatomy
    with anatomy.analysis():
        down = Pullback(side.trace, side.given, select, len(select))
        factors = [down.head_factors()]
        for segment in segments_down(anatomy):
            pieces = [part for _, part in down.step(segment)]
            if len(pieces) != 1:  # the pullback had to halve its chunk: so must the push
                raise torch.OutOfMemoryError(f"pulling back {len(select)} tokens does not fit")
            factors += pieces
    source = AlongFactors(factors, precondition)
    moved = []
    for push in pushes:
        with push.anatomy.analysis():
            moved.append(push.logits(source))
    return down.selected, moved


def factored_gram(
    observed: Sequence[Side],
    updated: Sequence[Side],
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    precondition: Direction | None = None,
) -> Tensor:
    """The same M x L products as `token_gram`, through the factored NTK-vector product.

    With `precondition`, ⟨J_mᵀ v_m, P ∘ J_lᵀ v_l⟩ for a diagonal P (name -> tensor).
    """
    starts = _offsets(observed)
    first = updated[0].trace.logits
    total = torch.zeros(starts[-1], _offsets(updated)[-1], dtype=first.dtype, device=first.device)
    traces, cotangents = [side.trace for side in observed], [side.rows for side in observed]
    for rows, moved in factored_push(traces, updated, memory, progress, precondition):
        for start, side_rows, delta in zip(starts, cotangents, moved, strict=False):
            block = torch.einsum("cmv,mv->mc", delta, side_rows.to(delta.dtype))
            total[start : start + len(side_rows)][:, rows] = block
    return checked(total, "the Gram matrix", traces[0].hidden.dtype)


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


def _groups(sides: Sequence[Side], budget: int) -> list[list[tuple[int, Tensor]]]:
    """Rows of the updated sides in groups whose factors of one segment fit the budget."""
    groups: list[list[tuple[int, Tensor]]] = [[]]
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
