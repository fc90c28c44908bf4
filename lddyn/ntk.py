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
from lddyn.estimate import Estimate
from lddyn.examples import Example
from lddyn.factors import BodyRows, Factors, Shelf, merge, pair
from lddyn.lowrank import LowRank, find_low_rank
from lddyn.norms import (
    Basis,
    Sampling,
    block_squares,
    block_traces,
    pushed_squares,
    root,
    row_squares,
    span_basis,
)
from lddyn.pullback import (
    DEFAULT_MEMORY,
    Pullback,
    gradient_of_logits,
    parse_memory,
    reach,
    segments_down,
)
from lddyn.pushforward import (
    AlongDirection,
    AlongFactors,
    Direction,
    Pushforward,
    delta_log_probs,
)

Sink = Callable[[str, Tensor, Tensor, Tensor], None]  # parameter, rows o, rows u, block (c, c')
CHUNK = 32
_ROWS = 4096
_ROWS_GPU = 2**20


@dataclass
class Side:
    """Cotangents on the logits of one traced sequence: rows (M, V).

    They are `given`, or else the log-prob rows e_y − π, ∇ log π(y_m) with respect to the logits of
    position m, which are formed where they are used. `BodyRows` are cotangents at the head's input,
    any number per token (`at_tokens`); their products leave out those of the head with itself.
    """

    trace: Trace
    given: Tensor | BodyRows | None = None

    @classmethod
    def log_probs(cls, trace: Trace) -> Side:
        """The rows e_y − π."""
        return cls(trace)

    @classmethod
    def below_head(cls, trace: Trace, rows: BodyRows, tokens: Tensor | None = None) -> Side:
        """The same n cotangents at the head's input for every token: row m n + i is the i-th of m.

        They are cotangents of the raw logits W h + b; `tokens` keeps some of the response tokens.
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
        elements = max((w.elements for w in trace.work.values()), default=0)
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
        # Those with themselves are symmetric: a chunk meets what is not after it.
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
    return total


@dataclass(frozen=True)
class Shift:
    """What cotangents G of χu do to the logits of χo: K G, the head's own part apart.

    head, body (M, V); log_probs() takes it through A = I − 1 πᵀ.
    """

    head: Tensor
    body: Tensor
    reference: Tensor  # logits (M, V) at which π is taken

    @property
    def logits(self) -> Tensor:
        """K G (M, V)."""
        return self.head + self.body

    def log_probs(self, part: str = "all") -> Tensor:
        """A K G (M, V), or that of one part: "head" or "body".

        Raises:
            ValueError: If part is none of these.
        """
        parts = {"all": self.logits, "head": self.head, "body": self.body}
        if part not in parts:
            raise ValueError(f"part must be one of {sorted(parts)}, got {part!r}")
        return delta_log_probs(parts[part], self.reference)


class NTK:
    """K(χo, χu), lazily: logical shape (M, V, L, V), with nothing of size V x V formed.

    Made by `ntk`. A cotangent is a row vector of the output space, one per response token. With raw
    logits W h + b and slopes D of what follows them (soft-capping; else D = I),

        K_{m,l} = D_m (W K^h_{m,l} Wᵀ + c_{m,l} I) D_l,     c = ⟨h_m, h_l⟩ [W trains] + [b trains]

    holds exactly; where the head is tied to the embedding there are cross terms besides, which
    reach the vocabulary tokens of the two sequences: [W, E] M [W, E]ᵀ in place of W K^h Wᵀ.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> one = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> other = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 6])
        >>> K = lddyn.ntk(model, one, other)
        >>> K.restrict(K.top_tokens(4)).shape, K.diagonal([3, 6]).shape, K.trace().value.shape
        (torch.Size([3, 4, 2, 4]), torch.Size([3, 2, 2]), torch.Size([3, 2]))
        >>> shift = K.explain()  # of an SFT step on `other`
        >>> shift.log_probs("head").shape, bool((shift.logits == shift.head + shift.body).all())
        (torch.Size([3, 50]), True)
        >>> form = K.lowrank(8)
        >>> form.rank, (form @ torch.randn(2, 50)).shape, form.residual.value.shape
        (8, torch.Size([3, 50]), torch.Size([]))
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
        self._bases: dict[bool, Basis] = {}

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
        if method == "pushed" or (method == "auto" and self._blocked):
            return factored_gram([one], [other], self.memory, self.progress)
        return token_gram([one], [other], self.memory, self.progress)

    @undisturbed
    def __matmul__(self, g: Tensor) -> Tensor:
        """K G: logit cotangents (L, V) of χu -> Σ_l K_{m,l} G_l, the move of the logits (M, V).

        Cost: one backward pass of χu, 4 N T_u FLOPs more than its forward, and one push through χo,
        6 N T_o; one gradient the size of the trainable parameters.
        """
        return self._product()(self._cotangents(self.updated, g, "G"))

    def _product(self, precondition: Direction | None = None) -> Callable[[Tensor], Tensor]:
        """G (L, V) -> K G (M, V), or K_P G: one backward pass and one push each time."""
        push, updated = self._pushforward(), self.updated

        def product(g: Tensor) -> Tensor:
            direction = gradient_of_logits(updated.anatomy, updated.example, g)
            if precondition is not None:
                direction = {n: d * precondition[n].to(d) for n, d in direction.items()}
            with push.anatomy.analysis():
                return push.logits(AlongDirection(direction))[0]

        return product

    def _pushforward(self) -> Pushforward:
        """Through χo, for many products: it keeps its linearised segments where they fit."""
        fits = (
            _graph_bytes(self.observed) < parse_memory(self.memory, self.updated.logits.device) // 2
        )
        return Pushforward(self.observed, keep=fits)

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

    # ----- parts of it

    @undisturbed
    def explain(self, g: Tensor | None = None) -> Shift:
        """K G with the head's own part apart: what moves the logits of χo (M, V), and how.

            head: Σ_l c_{m,l} G_l, the head's weight and bias answering for themselves, closed form
            body: all the rest, W K^h Wᵀ G; with tied weights both cross terms: embedding rows
                  that G moves through the head, output rows that it moves through the embedding

        Args:
            g: Logit cotangents (L, V) of χu; default: those of SFT, π − e_y.

        Returns:
            Shift. A step of plain SGD moves the logits by −lr times it.

        Raises:
            ValueError: If the shape of g is not (L, V).

        Cost: that of K @ G.
        """
        g = -Side.log_probs(self.updated).rows if g is None else g
        g = self._cotangents(self.updated, g, "G")
        total = self._product()(g)
        raw = g if self.updated.slope is None else g * self.updated.slope
        head = self._head_multiples() @ raw
        if self.observed.slope is not None:
            head = head * self.observed.slope
        return Shift(head, total - head, self.observed.logits)

    def top_tokens(self, count: int) -> Tensor:
        """Vocabulary ids (count,) that π holds likeliest, summed over both sides' tokens; sorted.

        Raises:
            ValueError: If count is not in 1 … V.
        """
        if not 1 <= count <= self.shape[1]:
            raise ValueError(f"count must be between 1 and {self.shape[1]}, got {count}")
        mass = sum(side.logits.softmax(-1).sum(0) for side in (self.observed, self.updated))
        assert isinstance(mass, Tensor)
        return mass.topk(count).indices.sort().values

    @undisturbed
    def restrict(
        self, tokens: Tensor | Sequence[int], updated: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """K between some tokens of the vocabulary: (M, n, L, n'), exact.

        Args:
            tokens: Vocabulary ids (n,) on the observed side, such as `top_tokens(16)`.
            updated: Vocabulary ids (n',) on the updated side; default: the same.

        Raises:
            ValueError: If an id is outside the vocabulary.
            NotImplementedError: If weights are shared between blocks (use gram).

        Cost: n pullbacks per observed and n' per updated token, at most d each (tied: d + tokens).
        """
        ids_o = self._vocabulary_ids(tokens, "tokens")
        ids_u = ids_o if updated is None else self._vocabulary_ids(updated, "updated")
        (rows_o, mix_o), (rows_u, mix_u) = self._one_hot(ids_o), self._one_hot(ids_u)
        out = self.observed.logits.new_zeros(self.shape[0], len(ids_o), self.shape[2], len(ids_u))
        for at, gram in self._blocks(rows_o, rows_u):
            if mix_o is not None:
                gram = torch.einsum("vi,milj->mvlj", mix_o, gram)
            out[:, :, at] = gram if mix_u is None else gram @ mix_u.T
        same = (ids_o[:, None] == ids_u[None]).to(out)
        out += self._head_multiples()[:, None, :, None] * same[:, None]
        if self.observed.slope is not None:
            out *= self.observed.slope[:, ids_o, None, None]
        if self.updated.slope is not None:
            out *= self.updated.slope[:, ids_u]
        return out

    @undisturbed
    def diagonal(self, tokens: Tensor | Sequence[int] | None = None) -> Tensor:
        """K_{m,l}[v, v] for every token pair and some tokens of the vocabulary: (M, L, n), exact.

        Args:
            tokens: Vocabulary ids (n,); default: all V.

        Raises:
            ValueError: If an id is outside the vocabulary.
            NotImplementedError: If weights are shared between blocks (use gram).

        Cost: n pullbacks per token of both sides; for n > d (tied: d + tokens) it is d pullbacks,
        M L d² floats and 2 M L n d² FLOPs.
        """
        chosen = range(self.shape[1]) if tokens is None else tokens
        ids = self._vocabulary_ids(chosen, "tokens")
        out = self.observed.logits.new_zeros(self.shape[0], self.shape[2], len(ids))
        rows, mix = self._one_hot(ids)
        if mix is None:
            for start in range(0, len(ids), 8):  # pairs of different tokens are not wanted
                part = rows[torch.arange(start, min(start + 8, len(ids)), device=ids.device)]
                for at, gram in self._blocks(part, part):
                    out[:, at, start : start + 8] = gram.transpose(1, 2).diagonal(dim1=2, dim2=3)
        else:
            for at, gram in self._blocks(rows, rows):
                for m, block in enumerate(gram):  # (d, l, d)
                    out[m, at] = ((mix @ block.transpose(0, 1)) * mix).sum(-1)
        out += self._head_multiples()[:, :, None]
        if self.observed.slope is not None:
            out *= self.observed.slope[:, None, ids]
        if self.updated.slope is not None:
            out *= self.updated.slope[:, ids]
        return out

    def _vocabulary_ids(self, tokens: Tensor | Sequence[int], name: str) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.updated.anatomy.device)
        vocabulary = self.shape[1]
        if ids.dim() != 1 or len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(
                f"{name} must be vocabulary ids (n,) from 0 to {vocabulary - 1}, got "
                f"{ids.flatten()[:8].tolist()} of shape {tuple(ids.shape)}"
            )
        return ids

    def _one_hot(self, ids: Tensor) -> tuple[BodyRows, Tensor | None]:
        """Cotangents e_v below the head; where they are more than d, a basis and the mixture."""
        precise, tied = self.updated.logits.dtype, self._tied_ids()
        own = self.updated.anatomy.head.weight.detach()[ids].to(precise)
        own = torch.cat([own, (ids[:, None] == tied[None]).to(precise)], 1)
        width = own.shape[1] - len(tied)
        if len(ids) <= own.shape[1]:
            return BodyRows(own[:, :width], own[:, width:], tied), None
        eye = torch.eye(own.shape[1], dtype=precise, device=own.device)
        return BodyRows(eye[:, :width], eye[:, width:], tied), own

    @undisturbed
    def lowrank(
        self,
        rank: int | None = None,
        rtol: float | None = None,
        *,
        span: str = "random",
        centred: bool = True,
        probes: int = 8,
        limit: int = 256,
        seed: int = 0,
    ) -> LowRank:
        """K ≈ c I + U X Yᵀ Uᵀ: a scaled identity per token pair, and R factors for all of them.

        A randomised range finder below the head: the images of R cotangents are orthonormalised in
        the metric of the (centred) logits, and K is projected on them.

        Args:
            rank: R; or
            rtol: ‖K − K̂‖_F / ‖K̂‖_F to reach, R being doubled from 8.
            span: "random": Gaussian cotangents. "data": combinations of the log-prob rows of χu's
                tokens, one by one if R >= L, so that K̂ G = K G for every loss of their log-probs.
            centred: Whether Π is in the metric and the residual: what log π can see.
            probes: Random probes of the residual, 4 or more.
            limit: Largest R under rtol.
            seed: Of all random signs.

        Returns:
            LowRank, with its estimated residual.

        Raises:
            ValueError: If not just one of rank and rtol is given, or an argument is out of range.

        Cost: 2 R + probes backward passes and pushes, whatever M and L; a gradient the size of the
        trainable parameters, R (M + L) d floats.
        """
        if (rank is None) == (rtol is None):
            raise ValueError(f"give rank or rtol, one of them; got rank={rank}, rtol={rtol}")
        if rank is not None and rank < 0:
            raise ValueError(f"rank must be 0 or more, got {rank}")
        if span not in ("random", "data"):
            raise ValueError(f"span must be 'random' or 'data', got {span!r}")
        Sampling(0.05 if rtol is None else rtol, None, probes, limit, seed)
        if rtol is not None and self._bent:
            raise NotImplementedError(
                "the model changes its logits after the head: give rank, and read the residual"
            )
        return find_low_rank(
            self._pushforward(), self.T._pushforward(), self._basis(centred),
            self._head_multiples(), centred, self._product(), rank=rank, rtol=rtol, span=span,
            probes=probes, limit=limit, seed=seed,
        )  # fmt: skip

    # ----- norms and traces

    @undisturbed
    def frobenius(
        self,
        rtol: float = 0.05,
        *,
        centred: bool = True,
        reduce: str = "none",
        squared: bool = False,
        directions: int | None = None,
        probes: int | None = None,
        precondition: Direction | None = None,
        limit: int = 256,
        seed: int = 0,
    ) -> Estimate:
        """‖K_{m,l}‖_F of every token pair, of every observed token, or of the whole kernel.

            none: ‖Π K_{m,l} Π‖_F (M, L)     row: (Σ_l ‖·‖²)^½ (M,)     all: (Σ_ml ‖·‖²)^½ ()

        Π = I − 11ᵀ/V (I with centred=False): what a common shift of all logits does is nothing that
        log π could see. The square is estimated without bias; its root has a bias of the order of
        stderr²/value, which is below the stated error.

        For "none" the leading r directions of the centred unembedding are exact on both sides, and
        random signs sample the rest (algorithm: "deflated two-sided probes"); the head's identity
        is never sampled. With all directions (small d) the answer is exact, its error 0. Where
        logits are changed after the head, weights are shared between blocks or K is preconditioned,
        whole logit cotangents are pushed instead. For "row" and "all" it is Hutch++.

        Args:
            rtol: Wanted relative standard error, in every entry; directions, then probes, are
                doubled until it is met.
            centred: Whether Π is applied.
            reduce: "none", "row" or "all".
            squared: Return the (unbiased) square.
            directions: r, leading directions that are exact; k of Hutch++. None: by rtol.
            probes: q random probes, 4 or more. None: by rtol.
            precondition: Diagonal P of K_P = J_o P J_uᵀ: parameter name -> tensor of its shape,
                such as AdamW's 1/(√v̂ + ε). None: P = I.
            limit: Most cotangents per token ("none") or products with K ("row", "all"). Where it
                is reached before rtol is met, a warning says so.
            seed: Of the probes.

        Returns:
            Estimate in float64; `samples`, of its intervals, allows for the probes' kurtosis.

        Raises:
            ValueError: If an argument is out of range, or precondition lacks a parameter.

        Cost: none: (r + q) pullbacks per token of χo and (r + 2q) of χu, 2 N (p + 1) FLOPs each,
        and pairing; pushed: (r + q) L pullbacks and pushes. row, all: 2k + q backward passes and
        pushes. No matrix with V rows but W and one logit cotangent per token.

        Example:
            >>> import lddyn, transformers
            >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16,
            ...     intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            ...     pad_token_id=None)
            >>> model = transformers.LlamaForCausalLM(config)
            >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
            >>> norms = lddyn.ntk(model, ex, ex).frobenius()
            >>> norms.value.shape, float(norms.stderr.max())  # d = 16: exact
            (torch.Size([3, 3]), 0.0)
        """
        sampling = Sampling(rtol, directions, probes, limit, seed)
        if reduce not in ("none", "row", "all"):
            raise ValueError(f"reduce must be 'none', 'row' or 'all', got {reduce!r}")
        if precondition is not None:
            _check_precondition(precondition, self.updated.anatomy)
        anatomy = self.updated.anatomy
        if reduce != "none":
            square = row_squares(
                self._product(precondition),
                self.T._product(precondition),
                (self.observed.logits.shape, self.updated.logits.shape),
                centred,
                reduce == "all",
                self.updated.logits,
                sampling,
            )
        elif precondition is not None or self._bent or self._blocked:
            square = pushed_squares(
                lambda v: self._image_squares(v, centred, precondition),
                anatomy.head.weight,
                self._basis(centred),
                centred,
                sampling,
            )
        else:
            identity = anatomy.vocabulary - int(centred)
            square = block_squares(
                self._blocks, self._basis(centred), self._head_multiples(), identity, sampling
            )
        return square if squared else root(square)

    @undisturbed
    def trace(
        self,
        rtol: float | None = None,
        *,
        centred: bool = False,
        directions: int | None = None,
        probes: int | None = None,
        limit: int = 256,
        seed: int = 0,
    ) -> Estimate:
        """Traces (M, L): tr K_{m,l}, or tr Π K_{m,l} Π: exact, or sampled to a relative error.

        tr K = tr(K^h WᵀW) + c V: the head's part is exact either way.

        Args:
            rtol: Wanted relative standard error in every entry; None: exact.
            centred: Whether Π is applied.
            directions: r, leading directions that are exact; None: by rtol.
            probes: q random probes, the same on both sides; None: by rtol.
            limit: Most cotangents per token; a warning says where it is reached.
            seed: Of the probes.

        Raises:
            ValueError: If an argument is out of range.
            NotImplementedError: If logits are changed after the head (use diagonal), or weights
                are shared between blocks.

        Cost: exact: d pullbacks per token of both sides (tied heads: d + tokens); else r + q.
        """
        sampling = None if rtol is None else Sampling(rtol, directions, probes, limit, seed)
        if self._bent:
            raise NotImplementedError(
                "the model changes its logits after the head: use diagonal().sum(-1)"
            )
        return block_traces(
            self._blocks,
            self._basis(centred),
            self._head_multiples(),
            self.updated.anatomy.vocabulary - int(centred),
            sampling,
        )

    @property
    def _bent(self) -> bool:
        """Whether logits are more than W h + b (soft-capping, scaling)."""
        return self.observed.slope is not None or self.updated.slope is not None

    @property
    def _blocked(self) -> bool:
        """Whether blocks share parameters, so that factors of different segments pair."""
        anatomy = self.updated.anatomy
        return any(n != anatomy.head_weight for n in anatomy.shared())

    def _basis(self, centred: bool) -> Basis:
        """Directions of the logits, one eigendecomposition for the life of this operator."""
        if centred not in self._bases:
            weight: Tensor = self.updated.anatomy.head.weight
            self._bases[centred] = span_basis(weight, self._tied_ids(), centred)
        return self._bases[centred]

    def _tied_ids(self) -> Tensor:
        """Tokens whose embedding rows are moved, where these are rows of the head too."""
        ids: Tensor = torch.cat([self.observed.ids[0], self.updated.ids[0]]).unique()
        return ids if self.updated.anatomy.tied else ids[:0]

    def _head_multiples(self) -> Tensor:
        """Multiples c (M, L): the head's own part of the kernel of the raw logits is c I."""
        anatomy = self.updated.anatomy
        precise = self.updated.logits.dtype
        out: Tensor = self.observed.logits.new_zeros(self.shape[0], self.shape[2])
        if anatomy.head_weight is not None:
            out = out + self.observed.hidden.to(precise) @ self.updated.hidden.to(precise).T
        return out + 1 if anatomy.head_bias is not None else out

    def _blocks(self, rows_o: BodyRows, rows_u: BodyRows) -> Iterator[tuple[slice, Tensor]]:
        """Products (M, n_o, l, n_u) of cotangents below the head, some updated tokens at a time."""
        n_o, n_u, (m, _, count, _) = len(rows_o.hidden), len(rows_u.hidden), self.shape
        dtype, same = self.updated.logits.dtype, rows_o is rows_u
        rows_o, rows_u = (
            BodyRows(r.hidden.to(dtype), r.picked.to(dtype), r.ids) for r in (rows_o, rows_u)
        )
        step = self._tokens_at_once(n_o, n_u)
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

    def _tokens_at_once(self, n_o: int, n_u: int) -> int:
        """Updated tokens whose products with all observed ones fit a quarter of the memory."""
        size = self.shape[0] * n_o * n_u * self.updated.logits.element_size()
        return max(1, parse_memory(self.memory, self.updated.logits.device) // 4 // size)

    def _image_squares(self, v: Tensor, centred: bool, precondition: Direction | None) -> Tensor:
        """‖K_{m,l} v‖² (M, L) for one cotangent (V,), centred on the observed side where asked."""
        side = Side(self.updated, v.to(self.updated.logits).expand_as(self.updated.logits))
        out = self.observed.logits.new_zeros(self.shape[0], self.shape[2])
        for rows, (moved,) in factored_push(
            [self.observed], [side], self.memory, self.progress, precondition
        ):
            if centred:
                moved = moved - moved.mean(-1, keepdim=True)
            out[:, rows] = moved.pow(2).sum(-1).T
        return out

    @classmethod
    def _side(cls, trace: Trace, rows: Tensor | None, name: str) -> Side:
        if rows is None:
            return Side.log_probs(trace)
        return Side(trace, cls._cotangents(trace, rows, name))

    @staticmethod
    def _cotangents(trace: Trace, rows: Tensor, name: str) -> Tensor:
        if rows.shape != trace.logits.shape:
            raise ValueError(
                f"{name} must be (tokens, vocabulary) = {tuple(trace.logits.shape)}, got "
                f"{tuple(rows.shape)}"
            )
        return rows.to(trace.logits)


def ntk(
    model: nn.Module | Anatomy,
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
        model: A causal LM of transformers, or its Anatomy, which is worth opening once for many
            pairs; only parameters with requires_grad=True count.
        observed: χo, M counted response tokens.
        updated: χu, L counted response tokens.
        memory: Workspace in bytes or as "2GiB"; "auto" is 4 GiB, a third of what is free on a GPU.
        attention: "lddyn" or "eager", see Anatomy; an Anatomy has its own.
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
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model, attention)
    first = anatomy.trace(observed)
    second = first if updated is observed else anatomy.trace(updated)
    return NTK(first, second, memory, progress)


def _check_precondition(precondition: Direction, anatomy: Anatomy) -> None:
    for name, parameter in anatomy.trainable.items():
        found = precondition.get(name)
        if found is None or found.shape != parameter.shape:
            raise ValueError(
                f"precondition must hold a tensor {tuple(parameter.shape)} for {name}, got "
                f"{None if found is None else tuple(found.shape)}"
            )


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


def chunk_size(
    length: int, bytes_per_cotangent: int, budget: int, device: torch.device | None = None
) -> int:
    """Cotangents of a chunk: some thousands of rows fill the products, and stay in cache.

    A GPU has no such cache, and a chunk costs it the launches of a replay: as many as fit.
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
