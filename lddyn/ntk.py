"""The empirical NTK between token logits, as a lazy operator.

    K[m, l] = (∇θ z_m(χo)) (∇θ z_l(χu))ᵀ,   V x V for each of the M x L token pairs

Nothing of size V x V is formed: K is contracted with cotangents on both sides (`gram`), by pulling
both sides back block by block and pairing their factors, or by pushing the factors of one side
through the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.anatomy import Anatomy, Trace, is_out_of_memory, undisturbed
from lddyn.examples import Example
from lddyn.factors import Factors, Shelf, merge, pair
from lddyn.pullback import (
    DEFAULT_MEMORY,
    Pullback,
    parse_memory,
    segments_down,
)
from lddyn.pushforward import AlongFactors, Direction, Pushforward

Sink = Callable[[str, Tensor, Tensor, Tensor], None]  # parameter, rows o, rows u, block (c, c')
CHUNK = 32
_ROWS = 4096


@dataclass
class Side:
    """Cotangents on the logits of one traced sequence: rows (M, V).

    They are `given`, or else the log-prob rows e_y − π, ∇ log π(y_m) with respect to the logits of
    position m, which are formed where they are used.
    """

    trace: Trace
    given: Tensor | None = None

    @classmethod
    def log_probs(cls, trace: Trace) -> Side:
        """The rows e_y − π."""
        return cls(trace)

    @property
    def rows(self) -> Tensor:
        """Cotangents (M, V)."""
        if self.given is not None:
            return self.given
        return ops.residual(self.trace.logits, self.trace.targets)[0]

    def __len__(self) -> int:
        return len(self.trace.positions)

    def bytes_per_cotangent(self) -> int:
        """Workspace of one cotangent in the widest segment: factors, and the pullback's buffers."""
        trace = self.trace
        # The pullback of a product holds its output's cotangent and, for attention, the softmax's.
        elements = max((w.elements for w in trace.work.values()), default=0)
        return 4 * elements * trace.hidden.element_size()


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
    budget = parse_memory(memory)
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
                        Pullback(side.trace, side.given, select, _chunk(side, budget)),
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
                    pull = Pullback(side.trace, side.given, rest, _chunk(side, budget))
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
    return total


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

    def observe(rows_o: Tensor, factors: Factors) -> None:
        for rows_u, other in kept:
            pair(factors, other, adder(rows_o, rows_u))
        if tied:
            for (pull, _, at_u), head in zip(pulls, heads, strict=True):
                if at_u is not None:
                    pair(factors, head, adder(rows_o, pull.selected + at_u))

    both: list[tuple[Tensor, Factors]] = []
    for pull, at_o, at_u in pulls:
        if at_u is None:
            continue
        longest = pull.chunks[-1].length
        with pull.anatomy.analysis():
            joined = merge(pull.step(segment), len(pull.selected), longest, shelf)
        for merged in joined:
            rows, factors = merged.rows, merged.factors
            kept.append((rows + at_u, factors))
            if at_o is not None:
                both += [(rows[part] + at_o, factors.part(part)) for part in merged.parts]
    if tied:
        for (pull_o, at_o, _), head in zip(pulls, heads, strict=True):
            for rows_u, factors in kept if at_o is not None else ():
                assert at_o is not None
                pair(head, factors, adder(pull_o.selected + at_o, rows_u))
    for rows_o, factors in both:
        observe(rows_o, factors)
    for pull, at_o, at_u in pulls:
        if at_u is None and at_o is not None:
            with pull.anatomy.analysis():
                for rows, factors in pull.step(segment):
                    observe(rows + at_o, factors)


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
    budget = parse_memory(memory)
    anatomy = updated[0].trace.anatomy
    starts = _offsets(updated)
    vocabulary = 8 * anatomy.vocabulary * max(len(t.positions) for t in observed)
    pushes = [Pushforward(t, keep=_graph_bytes(t) * len(observed) < budget // 2) for t in observed]
    steps = tqdm(
        total=starts[-1],
        desc="pushing",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    for start, side in zip(starts, updated, strict=False):
        per_row = side.bytes_per_cotangent() * (1 + len(anatomy.blocks) // 2) + vocabulary
        size = max(1, min(CHUNK, budget // 2 // per_row))
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
    return total


class NTK:
    """K(χo, χu), lazily: logical shape (M, V, L, V), with nothing of size V x V formed.

    Made by `ntk`. A cotangent is a row vector of the output space, one per response token.
    """

    def __init__(
        self,
        observed: Trace,
        updated: Trace,
        memory: int | str = DEFAULT_MEMORY,
        progress: bool = False,
    ):
        self.observed, self.updated = observed, updated
        self.memory, self.progress = memory, progress

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(M, V, L, V)."""
        return (*self.observed.logits.shape, *self.updated.logits.shape)

    @property
    def T(self) -> NTK:
        """K(χu, χo), with K(o, u)[m, l] = K(u, o)[l, m]ᵀ."""
        return NTK(self.updated, self.observed, self.memory, self.progress)

    @undisturbed
    def gram(
        self, v_o: Tensor | None = None, v_u: Tensor | None = None, method: str = "auto"
    ) -> Tensor:
        """v_oᵀ K v_u for every token pair: out[m, l] = v_o[m]ᵀ K_{m,l} v_u[l].

        Args:
            v_o: Cotangents (M, V) on the observed logits; default: the log-prob rows e_y − π.
            v_u: Cotangents (L, V) on the updated logits; default likewise.
            method: "paired" (both sides pulled back, factors paired), "pushed" (the updated side's
                factors pushed forward through the observed side), or "auto" (pairing, unless the
                model shares parameters between blocks).

        Returns:
            (M, L), float32 (float64 for float64 models).

        Raises:
            ValueError: If a cotangent's shape is not (tokens, vocabulary).

        Cost: 2 N (Σ p_m + Σ p_l) FLOPs paired; 2 N L (T_u + T_o) pushed.
        """
        if method not in ("auto", "paired", "pushed"):
            raise ValueError(f"method must be 'auto', 'paired' or 'pushed', got {method!r}")
        one = self._side(self.observed, v_o, "v_o")
        other = self._side(self.updated, v_u, "v_u")
        if self.observed is self.updated and (v_o is v_u):
            other = one
        anatomy = self.updated.anatomy
        blocked = any(n != anatomy.head_weight for n in anatomy.shared())
        if method == "pushed" or (method == "auto" and blocked):
            return factored_gram([one], [other], self.memory, self.progress)
        return token_gram([one], [other], self.memory, self.progress)

    @undisturbed
    def __matmul__(self, g: Tensor) -> Tensor:
        """K G: logit cotangents (L, V) of χu -> Σ_l K_{m,l} G_l, the move of the logits (M, V)."""
        side = self._side(self.updated, g, "G")
        total = torch.zeros_like(self.observed.logits)
        for _, moved in factored_push([self.observed], [side], self.memory, self.progress):
            total += moved[0].sum(0)
        return total

    def block(self, m: int, token: int) -> Tensor:
        """The dense V x V block K_{m,l} of one token pair; V pullbacks, for small vocabularies.

        Raises:
            ValueError: If V > 4,096 (use gram or @ with the cotangents you need).
        """
        return self.to_dense([m], [token])[0, :, 0, :]

    def to_dense(
        self, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None
    ) -> Tensor:
        """The dense kernel (M, V, L, V), or some of its rows and columns; small V only.

        Raises:
            ValueError: If V > 4,096.
        """
        vocabulary = self.shape[1]
        if vocabulary > 4096:
            raise ValueError(
                f"a dense block has V² entries; V must be at most 4096, got {vocabulary}: use "
                "gram(v_o, v_u) or K @ G"
            )
        columns = range(self.shape[2]) if columns is None else columns
        rows = range(self.shape[0]) if rows is None else rows
        blocks = []
        for column in columns:
            one = torch.zeros_like(self.updated.logits)
            moved = []
            for v in range(vocabulary):
                one[column, v] = 1.0
                side = Side(self.updated, one)
                select = torch.tensor([column], device=one.device)
                (pushed,) = [
                    m[0][0] for _, m in factored_push([self.observed], [side], select=select)
                ]
                moved.append(pushed[list(rows)])
                one[column, v] = 0.0
            blocks.append(torch.stack(moved, dim=-1))  # (M, V, V)
        return torch.stack(blocks, dim=2)

    @staticmethod
    def _side(trace: Trace, rows: Tensor | None, name: str) -> Side:
        if rows is None:
            return Side.log_probs(trace)
        if rows.shape != trace.logits.shape:
            raise ValueError(
                f"{name} must be (tokens, vocabulary) = {tuple(trace.logits.shape)}, got "
                f"{tuple(rows.shape)}"
            )
        return Side(trace, rows.to(trace.logits))


def ntk(
    model: nn.Module,
    observed: Example,
    updated: Example,
    *,
    memory: int | str = DEFAULT_MEMORY,
    attention: str = "lddyn",
    progress: bool = False,
) -> NTK:
    """The empirical NTK between the response logits of two sequences, as a lazy operator.

        K[m, l] = (∇θ z_m(χo)) (∇θ z_l(χu))ᵀ        (paper Eq. 3 and 5)

    Args:
        model: A causal LM of transformers; only parameters with requires_grad=True count.
        observed: χo, M counted response tokens.
        updated: χu, L counted response tokens.
        memory: Workspace in bytes or as "2GiB".
        attention: "lddyn" or "eager", see Anatomy.
        progress: Show progress bars.

    Returns:
        NTK of logical shape (M, V, L, V).

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> K = lddyn.ntk(model, ex, ex)
        >>> K.shape, K.gram().shape
        ((3, 50, 3, 50), torch.Size([3, 3]))
    """
    anatomy = Anatomy(model, attention)
    first = anatomy.trace(observed)
    second = first if updated is observed else anatomy.trace(updated)
    return NTK(first, second, memory, progress)


def _graph_bytes(trace: Trace) -> int:
    """Rough size of all linearised segments: products and attention, values and two graphs."""
    elements = sum(w.elements for w in trace.work.values())
    return 8 * elements * trace.hidden.element_size()


def _offsets(sides: Sequence[Side]) -> list[int]:
    offsets = [0]
    for side in sides:
        offsets.append(offsets[-1] + len(side))
    return offsets


def _distinct(sides: Sequence[Side]) -> list[Side]:
    """The sides, with a copy in place of a side that is listed again: they are told apart by id."""
    return [
        Side(side.trace, side.given) if any(side is s for s in sides[:i]) else side
        for i, side in enumerate(sides)
    ]


def _find(sides: Sequence[Side], wanted: Side) -> int | None:
    return next((i for i, side in enumerate(sides) if side is wanted), None)


def _chunk(side: Side, budget: int) -> int:
    """Cotangents of a chunk: some thousands of rows fill the products, and stay in cache."""
    best = max(CHUNK // 2, min(CHUNK, _ROWS // side.trace.length))
    return int(max(1, min(best, budget // 4 // side.bytes_per_cotangent())))


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
