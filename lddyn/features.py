"""Token features: one row of numbers per response token, whose inner products estimate the NTK.

N sequences cost N passes, not N² pairs: every token's gradient is pulled back once, block by block,
sketched where it stands, and forgotten.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.anatomy import Anatomy, Trace, undisturbed
from lddyn.estimate import Estimate
from lddyn.examples import Example
from lddyn.factors import Factors, HeadFactor, summed
from lddyn.ledger import UnsupportedModelError
from lddyn.ntk import Side
from lddyn.projections import (
    Stream,
    Term,
    count_sketch,
    haar,
    hashed,
    hashed_rows,
    low_rank,
    single,
    weigh,
)
from lddyn.pullback import (
    DEFAULT_MEMORY,
    Pullback,
    parse_memory,
    segments_down,
)
from lddyn.sequences import batches, pass_together, pull_sequences
from lddyn.shards import COLUMNS
from lddyn.sketch import Layout, Part, Sketch, best_sizes
from lddyn.store import Store, TokenTable, arrow_table, token_columns

if TYPE_CHECKING:
    import pyarrow
    from torch import nn

CHUNK = 16
WINDOW = 64  # whole sequences that are made before a store has them: enough for batches
PAIRS = 1 << 22  # of tokens, times repeats, that are compared at a time
_PILOT = 4, 8  # examples, and tokens of each, whose norms divide k

# --------------------------------------------------------------------------- gradients of a chunk


@dataclass
class Gradients:
    """Token gradients of one segment for c cotangents: weights as terms, all else as vectors.

    weights: (name, with "[e]" for a packed expert) -> terms in the weight's own shape.
    """

    weights: dict[str, list[Term]]
    vectors: dict[str, Tensor]  # (c, n)
    head: HeadFactor | None = None

    @classmethod
    def of(cls, factors: Factors, anatomy: Anatomy) -> Gradients:
        """From a pullback's factors. A padding token's embedding row stays zero: see `pair`."""
        found = cls({}, {}, factors.head)
        for tap, grads in factors.taps:
            delta = _wide(grads)
            if tap.bias is not None:
                found.add(tap.bias, summed(delta), anatomy)
            if tap.weight is None:
                continue
            if tap.kind == "embedding":
                if tap.padding is not None:
                    delta = delta * tap.updated()[..., None]
                term = Term(tap.activations, delta)
            else:
                x = _wide(tap.activations)
                if delta.dim() == 2:  # cotangent m has row m for its own
                    delta, x = delta[:, None], x[:, None]
                term = Term(delta, x) if tap.kind == "linear" else Term(x, delta)
            found.weights.setdefault(tap.weight, []).append(term)
        for name, gradient in factors.direct.items():
            found.add(name, _wide(gradient), anatomy)
        return found

    def add(self, name: str, gradient: Tensor, anatomy: Anatomy) -> None:
        """One more use of a parameter that is a vector here; "[e]": a row of a packed one."""
        base = base_name(name)
        if base != name:
            packed = gradient.new_zeros(len(gradient), *anatomy.trainable[base].shape)
            packed[:, int(name[len(base) + 1 : -1])] = gradient
            gradient = packed
        flat = gradient.flatten(1)
        self.vectors[base] = self.vectors[base] + flat if base in self.vectors else flat


def base_name(name: str) -> str:
    """Canonical parameter name of a weight or of a packed expert of it."""
    return name[: name.rindex("[")] if name.endswith("]") else name


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _walk(
    trace: Trace,
    weights: Tensor | None,
    select: Tensor | None,
    chunk: int,
    visit: Callable[[Tensor, Gradients], None],
) -> None:
    """Pulls the cotangents of a trace down, and shows each chunk's gradients of each segment."""
    anatomy = trace.anatomy
    with anatomy.analysis():
        pull = Pullback(trace, _weighted(trace, weights), select, chunk)
        visit(pull.selected, Gradients.of(pull.head_factors(), anatomy))
        for segment in segments_down(anatomy):
            for selected, factors in pull.step(segment):
                visit(selected, Gradients.of(factors, anatomy))


@dataclass(frozen=True)
class _Room:
    """How many sequences share a pass, and whether it keeps its segments' graphs.

    least: bytes of one sequence whose segments are replayed.
    """

    size: int
    keep: bool
    least: int

    @classmethod
    def of(
        cls, trace: Trace, tokens: int, chunk: int, free: int, layout: Layout | None = None
    ) -> _Room:
        """For sequences as long as the traced one, of at most so many counted tokens."""
        element = trace.logits.element_size()
        least = sequence_bytes(
            layout, Side(trace).bytes_per_cotangent(), tokens * trace.anatomy.vocabulary, element
        )
        # Measured: twice what the products put out. Attention and activations vary.
        kept = least + 3 * element * sum(work.elements for work in trace.work.values())
        size = min(chunk, free // kept)
        return cls(max(1, size), size > 0 and not trace.anatomy.streamed, least)


def _walk_sequences(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor] | None,
    room: _Room,
    visit: Callable[[Tensor, Gradients], None],
    bar: tqdm | None = None,
) -> None:
    """The same for one cotangent a sequence, the sum of its tokens'; of the head, a row a token."""
    for length, index in batches(anatomy, examples, room.size):
        some = [examples[i] for i in index]
        given = [None if weights is None else weights[i] for i in index]
        with anatomy.analysis():
            batch = pass_together(anatomy, some, length, room.keep)
            rows = torch.tensor(index, device=batch.ids.device)
            for part, factors in pull_sequences(anatomy, some, given, batch):
                visit(rows[part], Gradients.of(factors, anatomy))
        if bar is not None:
            bar.update(sum(map(len, some)))


def _weighted(trace: Trace, weights: Tensor | None) -> Tensor | None:
    """Log-prob rows times weights; None: as they are."""
    if weights is None:
        return None
    return ops.residual(trace.logits, trace.targets)[0] * weights[:, None]


def _head_sides(head: HeadFactor) -> tuple[Tensor, Tensor]:
    """Of gradients v ⊗ h: h (c, d), with a one where the head's bias trains, and v (c, V)."""
    v, h = _wide(head.rows), _wide(head.hidden)
    one = h.new_ones(len(h), 1)
    if head.weight is None:
        return one, v
    return (h if head.bias is None else torch.cat([h, one], 1)), v


# --------------------------------------------------------------------------- the layout


@dataclass
class _Claim:
    """What one parameter asks of k."""

    part: Part
    weight: float = 0.0  # its share: Σ ‖A‖² of the pilot's tokens; of a low-rank form, ‖A‖‖E‖
    copies: int = 1  # with a "minus", 2
    whole: int | None = None  # numbers that hold all of it, as `kept`
    kept: str = "exact"


@undisturbed
def plan_layout(
    model: nn.Module | Anatomy, examples: Sequence[Example], sketch: Sketch, by: str = "token"
) -> Layout:
    """Divides k over the parameters of a model: a layout for `features`.

    A parameter's share of k is its share of ‖gradient‖², averaged over up to 8 evenly spaced tokens
    of each of the first 4 examples, which makes the sum of the variances least; at least one number
    a repeat. What fits into its share as it is, is kept: a vector, a small matrix, or one whose
    gradients are outer products, as above the last attention. Beyond k come h of the head's v ⊗ h,
    of which v is sketched, and low-rank parts.

    By sequence, shares are those of the first 4 whole gradients. The layout is linear: the
    head is sketched like other weights, and a low rank is not looked for.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences, of which the first are looked at.
        sketch: k, kind and the rest.
        by: `"token"` or `"sequence"`: what a row is.

    Returns:
        Layout; whoever shares it makes rows that can be compared.

    Raises:
        ValueError: If there is no example, `by` is neither, or k is too small for the number of
            parameters.
        UnsupportedModelError: If a parameter is used in two ways at once.

    Cost: a forward pass of 4 examples; the pullback and the materialised gradients of 32 tokens.
    """
    if not examples:
        raise ValueError("at least one example is needed to divide k over the parameters, got none")
    together = _by_sequence(by)
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    squares: dict[str, float] = {}
    uses: dict[str, str] = {}
    dense: set[str] = set()  # whose gradients are not outer products
    low_rank_kind = sketch.kind == "lowrank" and not together

    def note(name: str, use: str, square: float) -> None:
        squares[name] = squares.get(name, 0.0) + square
        if uses.setdefault(name, use) != use:
            raise _mixed(name)

    def visit(rows: Tensor, found: Gradients) -> None:
        for name, terms in found.weights.items():
            base, use = base_name(name), _use(name, terms)
            shape = int(anatomy.trainable[base].shape[-2]), int(anatomy.trainable[base].shape[-1])
            if together or name != base or not single(terms):
                dense.add(base)
            kept = None
            if low_rank_kind and use == "sketch" and not single(terms) and _alone(anatomy, base):
                stream = Stream(sketch.seed, base, sketch.repeats)
                kept = low_rank(stream, terms, shape, min(sketch.rank, *shape))
            for c in range(len(rows)):
                square = float(weigh(terms, c, shape[0]).square().sum())
                if kept is not None:  # ‖A_ρ‖² = ‖V‖², U is orthonormal
                    rest = max(square - float(kept[1][c].square().sum()), 0.0)
                    square = (square * rest) ** 0.5
                note(base, use, square)
        for name, vector in found.vectors.items():
            note(name, "vector", float(vector.square().sum()))
        if found.head is not None and (found.head.weight or found.head.bias):
            h, v = _head_sides(found.head)
            if together and found.head.bias is not None:
                note(found.head.bias, "vector", float(v.sum(0).square().sum()))
                h = _wide(found.head.hidden)
            both = (h @ h.T) * (v @ v.T)
            both = both if together else both.diagonal()
            squares["head"] = squares.get("head", 0.0) + float(both.sum())

    pilot = examples[: _PILOT[0]]
    if together:
        with _cpu_threads(1):
            anatomy.trace(pilot[0])
            # One at a time and no graphs: a layout does not depend on what memory there is.
            _walk_sequences(anatomy, pilot, None, _Room(1, keep=False, least=0), visit)
        pilot = []
    for example in pilot:
        count = min(_PILOT[1], len(example))
        select = torch.linspace(0, len(example) - 1, count).round().long()
        with _cpu_threads(1):
            trace = anatomy.trace(example)
            _walk(trace, None, select.to(trace.positions.device), CHUNK, visit)
    # Three digits: what another device rounds differently should not move a number.
    squares = {name: float(f"{square:.3g}") for name, square in squares.items()}
    return Layout(sketch, _divide(anatomy, sketch, squares, uses, dense, together))


def _alone(anatomy: Anatomy, name: str) -> bool:
    """Whether all of a weight's gradient is seen at once: only then factors can stand for it."""
    return anatomy.trainable[name].dim() == 2 and len(anatomy.ledger[name].segments) == 1


def _use(name: str, terms: Sequence[Term]) -> str:
    kinds = {term.one_hot for term in terms}
    if len(kinds) > 1:
        raise _mixed(name)
    return "onehot" if kinds.pop() else "sketch"


def _mixed(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is used in products and in some other way too; sketches cannot pair the two: use "
        "lddyn.ntk for this model, or freeze the parameter"
    )


def _divide(
    anatomy: Anatomy,
    sketch: Sketch,
    squares: dict[str, float],
    uses: dict[str, str],
    dense: set[str],
    together: bool,
) -> tuple[Part, ...]:
    fixed: list[Part] = []  # beyond k
    claims: list[_Claim] = []
    head = anatomy.head_weight, anatomy.head_bias
    for name, parameter in anatomy.trainable.items():
        tied = name == head[0] and anatomy.tied
        if name in head and not tied and not (together and name == head[1]):
            continue
        # A parameter that no pilot token reached may yet be reached: an expert of its own, say.
        vector = parameter.dim() not in (2, 3) or name in anatomy.direct
        lookup = "embedding" in anatomy.ledger[name].ops
        use = uses.get(name, "vector" if vector else "onehot" if lookup else "sketch")
        weight, size = squares.get(name, 0.0), parameter.numel()
        if use == "vector":
            claims.append(_Claim(Part(name, use, (size, 1), (1, 1)), weight, whole=size))
            continue
        shape = int(parameter.shape[-2]), int(parameter.shape[-1])
        claim = _Claim(Part(name, use, shape, (1, 1)), weight)
        claims.append(claim)
        if tied:
            if use != "onehot":
                raise _mixed(name)
            claim.copies = 1 if together else 2  # a sum is in the embedding's numbers
            claim.weight += 2 * (weight * squares["head"]) ** 0.5
            claim.weight += squares["head"] if together else 0.0
        elif use == "sketch" and name in uses and name not in dense and _alone(anatomy, name):
            claim.whole, claim.kept = sum(shape), "outer"
        elif (
            use == "sketch" and sketch.kind == "lowrank" and not together and _alone(anatomy, name)
        ):
            claim.copies = 2
            fixed.append(Part(name, "outer", shape, (min(sketch.rank, *shape), 1)))
        if parameter.dim() == 2 and claim.copies == 1 and size <= (claim.whole or size):
            claim.whole, claim.kept = size, "exact"
    if together and head[0] and not anatomy.tied:
        shape = anatomy.vocabulary, int(anatomy.head.weight.shape[1])
        part = Part(head[0], "summed", shape, (1, 1))
        claims.append(_Claim(part, squares["head"], whole=shape[0] * shape[1]))
    elif head != (None, None) and not together:
        width = (int(anatomy.head.weight.shape[1]) if head[0] else 0) + (1 if head[1] else 0)
        name = head[0] or head[1] or ""
        part = Part(name, "head", (anatomy.vocabulary, width), (1, 1))
        claims.append(_Claim(part, squares["head"], 1, anatomy.vocabulary, "outer"))
    return tuple(fixed + _shares(sketch, claims))


def _shares(sketch: Sketch, claims: list[_Claim]) -> list[Part]:
    """Sizes in proportion to the weights; what fits as it is leaves the rest to the others."""
    kept: dict[int, Part] = {}
    while True:
        waiting = [c for i, c in enumerate(claims) if i not in kept]
        taken = sum(claims[i].whole or 0 for i in kept)
        free = (sketch.k - taken) // sketch.repeats - sum(c.copies for c in waiting)
        if free < 0:
            least = sketch.repeats * sum(c.copies for c in claims)
            raise ValueError(
                f"k must be at least {least}, a number for each of {sketch.repeats} repeats of "
                f"{len(claims)} parameters, got {sketch.k}: raise k, lower repeats, or freeze "
                "parameters"
            )
        total = sum(c.weight for c in waiting) or 1.0
        sizes = {
            i: 1 + int(free * c.weight / total / c.copies)
            for i, c in enumerate(claims)
            if i not in kept
        }
        fits = {
            i: claims[i]
            for i, size in sizes.items()
            if claims[i].whole is not None and (claims[i].whole or 0) <= sketch.repeats * size
        }
        if not fits:
            break
        for i, claim in fits.items():
            shape = claim.part.shape
            numbers = 1 if claim.kept == "outer" else shape[0] * shape[1]
            kept[i] = Part(claim.part.name, claim.kept, shape, (numbers, 1))
    parts = []
    for i, claim in enumerate(claims):
        if i in kept:
            parts.append(kept[i])
            continue
        part, size = claim.part, sizes[i]
        if part.kind == "head":
            chosen = size, 1
        elif part.kind == "sketch":
            chosen = sketch.sizes(part.shape, size)
        else:
            chosen = best_sizes(*part.shape, size)
        parts.append(replace(part, sizes=chosen))
        if claim.copies == 2:
            parts.append(replace(part, kind="minus", sizes=chosen))
    return parts


# --------------------------------------------------------------------------- features


class _Writer:
    """Puts the gradients of one example's chunks into its rows."""

    def __init__(self, rows: Tensor, layout: Layout, anatomy: Anatomy, together: bool):
        self.rows, self.layout, self.anatomy = rows, layout, anatomy
        self.together = together
        self.parts: dict[str, dict[str, Part]] = {}
        for part in layout.parts:
            self.parts.setdefault(part.name, {})[part.kind] = part

    def __call__(self, selected: Tensor, found: Gradients) -> None:
        """Adds what a chunk's tokens have in one segment."""
        for name, terms in found.weights.items():
            self._weight(selected, name, terms)
        for name, vector in found.vectors.items():
            self._vector(selected, name, vector)
        if found.head is not None and (found.head.weight or found.head.bias):
            (self._summed_head if self.together else self._head)(selected, found.head)

    def _add(self, selected: Tensor, part: Part, numbers: Tensor) -> None:
        rows = self.rows if part.kind == "exact" else self.layout.repeated(self.rows)
        place = self.layout.places[part.name, part.kind]
        rows[..., place].index_add_(0, selected, numbers.to(rows))

    def _vector(self, selected: Tensor, name: str, vector: Tensor) -> None:
        part, numbers = self._part(name, "vector"), vector
        if part.kind != "exact":
            term = Term(vector[:, None], vector.new_ones(len(vector), 1, 1))
            numbers = self.layout.sketch.project(name, [term], part.shape, part.sizes)
        self._add(selected, part, numbers)

    def _weight(self, selected: Tensor, name: str, terms: list[Term]) -> None:
        layout, sketch = self.layout, self.layout.sketch
        part = self._part(name, _use(name, terms))
        if part.kind == "exact":
            for c in range(len(selected)):  # one at a time: they may be as large as the weight
                whole = weigh(terms, c, part.shape[0]).view(1, -1)
                self._add(selected[c : c + 1], part, whole)
            return
        if part.kind == "summed":
            for term in terms:
                left = term.left if term.left.dim() == 3 else term.left[None]
                self._add(selected, part, self._hashed(part, left, term.right))
            return
        # A tied head keeps an "outer" of its own under the embedding's name.
        outer = None if part.kind == "onehot" else self.parts[part.name].get("outer")
        if outer is not None:
            stream = Stream(sketch.seed, name, sketch.repeats)
            form = low_rank(stream, terms, outer.shape, outer.sizes[0])
            for place, side in zip(layout.pair(self.rows, outer), form, strict=True):
                place[selected] = side.to(place)
            if part is outer:
                _check_outer(name, terms, form)
                return
            minus = self.parts[name]["minus"]
            u, v = form
            kept = [Term(u, v)]
            self._add(selected, minus, sketch.project(name, kept, minus.shape, minus.sizes))
        # A packed expert has signs of its own, in the numbers of its parameter.
        self._add(selected, part, sketch.project(name, terms, part.shape, part.sizes))

    def _head(self, selected: Tensor, head: HeadFactor) -> None:
        sketch = self.layout.sketch
        name = head.weight or head.bias or ""
        stream = Stream(sketch.seed, name, sketch.repeats)
        part = self._part(name, "head")
        h, v = _head_sides(head)
        left, right = self.layout.pair(self.rows, part)
        right[selected, 0] = h
        kept = v[:, None] if part.kind == "outer" else count_sketch(stream, v, part.sizes[0])
        left[selected] = kept
        tied = self.parts[name].get("minus")
        if tied is not None:
            hidden = _wide(head.hidden)[:, None]
            own = hashed_rows(stream, v[:, None], hidden, tied.sizes).flatten(2)
            self._add(selected, tied, own)
            self._add(selected, self.parts[name]["onehot"], own)

    def _summed_head(self, selected: Tensor, head: HeadFactor) -> None:
        """Of all tokens together: Σ_m v_m ⊗ h_m."""
        v, h = _wide(head.rows)[None], _wide(head.hidden)[None]
        if head.bias is not None:
            self._vector(selected, head.bias, v.sum(1))
        if head.weight is None:
            return
        part = self._part(head.weight, "summed")
        numbers = (v.mT @ h).flatten(1) if part.kind == "exact" else self._hashed(part, v, h)
        self._add(selected, part, numbers)

    def _hashed(self, part: Part, left: Tensor, right: Tensor) -> Tensor:
        """Σ_t left[t] ⊗ right[t] with hashed rows, as an embedding's are; "summed": if need be."""
        sketch, summed = self.layout.sketch, part.kind == "summed"
        name = f"{part.name}\0sum" if summed else part.name
        stream = Stream(sketch.seed, name, sketch.repeats)
        whole = summed and part.sizes[0] == part.shape[0]
        return hashed_rows(stream, left, right, part.sizes, whole).flatten(2)

    def _part(self, name: str, use: str) -> Part:
        parts = self.parts.get(base_name(name), {})
        others = {
            "sketch": ("exact", "outer", "summed"),
            "head": ("outer",),
            "summed": ("exact", "onehot"),
        }.get(use, ("exact",))
        found = next((parts[kind] for kind in (use, *others) if kind in parts), None)
        if found is None:
            raise UnsupportedModelError(
                f"the layout keeps nothing of {name} as a {use}: it was made for another model, or "
                "none of its first examples reached this parameter; make it with others"
            )
        return found


def _check_outer(name: str, terms: list[Term], form: tuple[Tensor, Tensor]) -> None:
    """What is kept as one outer product must be one."""
    u, v = form
    for c in range(0 if single(terms) else len(u)):
        whole = weigh(terms, c, u.shape[2])
        if float((whole - u[c].T @ v[c]).norm()) > 1e-3 * float(whole.norm()):
            raise UnsupportedModelError(
                f"the gradients of {name} were outer products in the examples of the layout, and "
                "are none here: give `plan_layout` examples like this one"
            )


def _check_layout(layout: Layout, anatomy: Anatomy) -> None:
    expected = {n: p.numel() for n, p in anatomy.trainable.items()}
    bias = any(part.name == anatomy.head_bias for part in layout.parts)
    if anatomy.head_weight and anatomy.head_bias and not bias:  # one part for both
        expected[anatomy.head_weight] += expected.pop(anatomy.head_bias)
    found: dict[str, int] = {}
    for part in layout.parts:
        size, parameter = part.shape[0] * part.shape[1], anatomy.trainable.get(part.name)
        if part.kind == "sketch" and parameter is not None and parameter.dim() == 3:
            size *= parameter.shape[0]
        found[part.name] = max(size, found.get(part.name, 0))
    wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if wrong:
        raise ValueError(
            f"layout was made for another model: {wrong[0]} has {expected.get(wrong[0], 0)} "
            f"trainable numbers here, {found.get(wrong[0], 0)} there ({len(wrong)} such parameters)"
        )


@undisturbed
def features(
    model: nn.Module | Anatomy,
    examples: Sequence[Example],
    sketch: Sketch | None = None,
    *,
    by: str = "token",
    weights: Sequence[Tensor] | None = None,
    layout: Layout | None = None,
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    chunk: int = CHUNK,
    threads: int | None = 1,
) -> Features:
    """Rows whose inner products estimate those of token gradients, ⟨∇ log π(y_m), ∇ log π(y_l)⟩.

    Every trainable parameter counts. One forward pass an example, every token pulled back once; the
    factors of one segment and one chunk are kept at a time.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences; each of their counted response tokens is a row.
        sketch: How gradients are sketched; default `Sketch()`. Not with `layout`.
        by: `"token"`; or `"sequence"`: a row is the gradient of a whole sequence's log-prob,
            Σ_m w_m ∇ log π(y_m), by one plain backward pass, for many sequences in a batch.
        weights: One (tokens,) tensor per example: row m is w_m ∇ log π(y_m).
        layout: That of earlier rows, to compare with them. Default: `plan_layout` of these
            examples, so another order of them may make another one.
        memory: Workspace in bytes or as "2GiB", beyond the model, for rows and one chunk.
        progress: Show a bar over tokens.
        chunk: Cotangents that are pulled back together, or whole sequences, fewer where memory
            does not hold the graph of their forward pass. A graph that does not fit for a single
            sequence is made again segment by segment.
        threads: Of the CPU; None: torch's. Several processes with one each are faster than one with
            several (`lddyn features build` under torchrun).

    On a CPU, the same seed, layout, chunk and threads give the same bits, whatever the other
    examples, their order or the memory; rows of whole sequences also whatever the chunk. Another
    chunk, more threads or another device move rounding alone; so does a second run on a GPU.

    Returns:
        Features of N rows, float32 (float64 for float64 models).

    Raises:
        ValueError: If there is no example, weights do not fit, the layout is another model's, k is
            too small, or a chunk of the longest example does not fit into memory.
        UnsupportedModelError: If the model cannot be opened, or its parameters not be sketched.

    Cost: 2 N_θ Σ (p_m + 1) FLOPs for pulling, N_θ the block-linear parameters, and those of
    `Sketch.apply` for every layer; by sequence 4 N_θ T each, and at times 2 N_θ T for replays.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> feats = lddyn.features(model, [ex], lddyn.Sketch(k=1024, seed=0))
        >>> estimate = feats.gram()
        >>> estimate.value.shape, estimate.samples
        (torch.Size([3, 3]), 8)
    """
    examples, together = list(examples), _by_sequence(by)
    if not examples:
        raise ValueError("examples must hold at least one Example, got none")
    if sketch is not None and layout is not None and sketch != layout.sketch:
        raise ValueError(f"sketch is not that of layout: got {sketch} and {layout.sketch}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if weights is not None:
        shapes = [tuple(w.shape) for w in weights]
        if shapes != [(len(e),) for e in examples]:
            raise ValueError(
                "weights must be a (tokens,) tensor per example, "
                f"{[(len(e),) for e in examples][:4]}…, got {shapes[:4]}…"
            )
        wrong = [i for i, w in enumerate(weights) if not bool(w.isfinite().all())]
        if wrong:
            raise ValueError(
                f"weights must be finite, got {weights[wrong[0]].tolist()[:4]}… for example "
                f"{wrong[0]} ({len(wrong)} such examples): 0 leaves a token out"
            )
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1 or None, got {threads}")
    budget = parse_memory(memory)
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    if layout is None:
        layout = plan_layout(anatomy, examples, sketch or Sketch(), by)
    _check_layout(layout, anatomy)
    if together and not layout.linear:
        raise ValueError(
            "layout must be one of sequences, this one keeps outer products of tokens: make it "
            "with plan_layout(…, by='sequence')"
        )
    if not together and any(part.kind == "summed" for part in layout.parts):
        raise ValueError("layout is one of sequences: give by='sequence', or a layout of tokens")
    bar = tqdm(
        total=sum(map(len, examples)), desc="features", unit="token",
        disable=None if progress else True, leave=False,
    )  # fmt: skip
    if together:
        whole = _sequence_rows(anatomy, examples, weights, layout, budget, chunk, threads, bar)
        bar.close()
        return Features(whole, row_table(examples, by), layout)
    height = sum(map(len, examples))
    rows: Tensor | None = None
    start = 0
    for index, example in enumerate(examples):
        with _cpu_threads(threads):
            trace = anatomy.trace(example)
        element, count = trace.logits.element_size(), min(chunk, len(example))
        total = height * layout.width * element
        work = chunk_bytes(layout, Side(trace).bytes_per_cotangent(), count, element)
        if total + work > budget:
            raise ValueError(
                f"memory must be at least {total + work} bytes, {total} for all rows and {work} "
                f"for a chunk of {count} tokens of a sequence of "
                f"{trace.length}, got {budget}: raise it, lower chunk, or give fewer examples at a "
                "time with one layout"
            )
        if rows is None:
            rows = trace.logits.new_zeros(height, layout.width)
        block = rows[start : start + len(example)]
        start += len(example)
        given = None if weights is None else weights[index].to(trace.logits)
        writer = _Writer(block, layout, anatomy, together=False)
        with _cpu_threads(threads):
            _walk(trace, given, None, chunk, writer)
        bar.update(len(example))
    bar.close()
    assert rows is not None
    return Features(rows, row_table(examples, by), layout)


def _sequence_rows(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor] | None,
    layout: Layout,
    budget: int,
    chunk: int,
    threads: int | None,
    bar: tqdm,
) -> Tensor:
    with _cpu_threads(threads):
        trace = anatomy.trace(max(examples, key=lambda e: e.length))
        element = trace.logits.element_size()
        total = len(examples) * layout.width * element
        room = _Room.of(trace, max(map(len, examples)), chunk, budget - total, layout)
        if total + room.least > budget:
            raise ValueError(
                f"memory must be at least {total + room.least} bytes, {total} for all rows and "
                f"{room.least} for a sequence of {trace.length} tokens, got {budget}: raise it, or "
                "give fewer examples at a time with one layout"
            )
        rows = trace.logits.new_zeros(len(examples), layout.width)
        given = None if weights is None else [w.to(rows) for w in weights]
        writer = _Writer(rows, layout, anatomy, together=True)
        _walk_sequences(anatomy, examples, given, room, writer, bar)
    return rows


def _by_sequence(by: str) -> bool:
    if by not in ("token", "sequence"):
        raise ValueError(f"by must be 'token' or 'sequence', got {by!r}")
    return by == "sequence"


def chunk_bytes(layout: Layout, per_cotangent: int, count: int, element: int) -> int:
    """Workspace of a chunk of cotangents: `per_cotangent` of the pullback, and what is formed."""
    work = per_cotangent * count
    if layout.sketch.kind in ("sjlt", "rademacher", "gaussian"):  # gradients are formed
        sizes = (p.shape[0] * p.shape[1] for p in layout.parts if p.kind == "sketch")
        work += (2 * count + 8) * max(sizes, default=0) * element
    return work


def sequence_bytes(layout: Layout | None, per_cotangent: int, logits: int, element: int) -> int:
    """Workspace of a whole sequence: of the pullback, three times its logits, what is formed."""
    work = per_cotangent + 3 * logits * element
    return work if layout is None else chunk_bytes(layout, work, 1, element)


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Products that are split over more threads round in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_table(examples: Sequence[Example], by: str) -> TokenTable:
    """Which token, or whole sequence, each row is, for rows of these examples in their order."""
    if by == "sequence":
        names = [e.content_id for e in examples]
        return _sequence_table(names, torch.arange(len(names)))
    found = [token_columns(e) for e in examples]
    columns = (
        torch.tensor([x for each in found for x in each[name]], dtype=torch.int32)
        for name in COLUMNS
    )
    return TokenTable(
        [e.content_id for e in examples for _ in range(len(e))],
        torch.tensor([i for i, e in enumerate(examples) for _ in range(len(e))]),
        *columns,
    )


def _sequence_table(names: list[str], index: Tensor) -> TokenTable:
    """The same for rows of whole sequences: content ids and places."""
    none = torch.full((len(names),), -1, dtype=torch.int32)
    return TokenTable(names, index, none, none.clone(), none.clone())


def store_features(
    store: Store,
    model: nn.Module | Anatomy,
    examples: Mapping[int, Example],
    layout: Layout,
    *,
    by: str = "token",
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
) -> int:
    """Makes the features of examples and appends them to a store, in order; resumes.

    Args:
        store: Open for writing, made with `layout`.
        model: A causal LM of transformers, or its Anatomy.
        examples: Place in the data set -> example. Those that the store has are left out, and
            repeats.
        layout: Of the rows; see `plan_layout`.
        by: `"token"`, or `"sequence"`: one row an example, under the name of its first token.
        memory: Workspace for the rows and a chunk of one example, or of 64 whole sequences.
        progress: Show a bar over tokens.

    Returns:
        How many examples were appended.

    Raises:
        ValueError: If `by` is neither, the store is of another layout, or as by `features`.
        StoreError: As by `Store.append`.

    Cost: that of `features`; one example's rows in memory, or 64 whole sequences', and a shard.
    """
    if store.layout_json != layout.to_json():
        raise ValueError(f"{store.path} has another layout: create it with that of these rows")
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    bar = tqdm(
        total=sum(len(e) for e in examples.values()), desc="features", unit="token",
        disable=None if progress else True, leave=False,
    )  # fmt: skip
    # An example that is there twice is a row of the store once, at its first place.
    first: dict[str, tuple[int, Example]] = {}
    for index, example in examples.items():
        if not store.has(example):
            first.setdefault(example.content_id, (index, example))
    missing = list(first.values())
    bar.update(bar.total - sum(len(example) for _, example in missing))
    step = 1 if by == "token" else WINDOW
    for start in range(0, len(missing), step):
        some = missing[start : start + step]
        feats = features(anatomy, [e for _, e in some], by=by, layout=layout, memory=memory)
        for row, (index, example) in enumerate(some):
            if by == "token":
                store.append(example, feats.rows, index=index)
            else:
                columns = {name: of[:1] for name, of in token_columns(example).items()}
                store.append(example.content_id, feats.rows[row : row + 1], columns, index=index)
        bar.update(sum(len(example) for _, example in some))
    bar.close()
    store.flush()
    return len(missing)


@dataclass(frozen=True)
class Features:
    """Rows of token gradients, what tokens they are, and how they are compared. See `features`.

    `rows.numpy()`, DLPack (`jax.dlpack.from_dlpack(rows)`) and `to_arrow()` share its memory;
    `vectors()` are what a tool for plain vectors takes.

    Attributes:
        rows: (N, layout.width).
        tokens: Example, place, position and id of each row; −1 for whole sequences.
        layout: How two rows make an inner product.
    """

    rows: Tensor
    tokens: TokenTable
    layout: Layout

    def __len__(self) -> int:
        """N, number of rows."""
        return len(self.rows)

    def gram(self, other: Features | None = None) -> Estimate:
        """⟨gradient of row i, gradient of row j⟩ of these rows with themselves, or with others.

        Args:
            other: Features of the same layout.

        Returns:
            Estimate (N, N'), with standard errors.

        Raises:
            ValueError: If the layouts differ: such rows cannot be compared.

        Cost: 4 N N' width FLOPs.
        """
        other = self if other is None else other
        if other.layout != self.layout:
            raise ValueError(
                "other has another layout, so its rows cannot be compared with these: make both "
                "with the same layout=…"
            )
        step = max(1, PAIRS // (self.layout.sketch.repeats * max(1, len(other))))
        found = [self.layout.estimate(part, other.rows) for part in self.rows.split(step)]
        return Estimate(
            torch.cat([e.value for e in found]),
            torch.cat([e.stderr for e in found]),
            found[0].samples,
        )

    def vectors(self) -> Tensor:
        """Plain vectors (N, width) whose inner products are `gram().value`, for other tools.

        Where there are no sketched parts this is `rows` itself, no copy.

        Raises:
            ValueError: If there are none: rows of tokens keep outer products (make them with
                `by="sequence"`, or sum them with `per_sequence`; or use `gram` as a kernel).

        Example:
            >>> import lddyn, transformers
            >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16,
            ...     intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
            >>> model = transformers.LlamaForCausalLM(config)
            >>> exs = [lddyn.Example(prompt_ids=[1, 2], response_ids=[i, 5]) for i in (3, 4)]
            >>> feats = lddyn.features(model, exs, lddyn.Sketch(k=1024), by="sequence")
            >>> x = feats.vectors().numpy()
            >>> bool((abs(x @ x.T - feats.gram().value.numpy()) < 1e-4 * abs(x @ x.T).max()).all())
            True
        """
        layout = self.layout
        if not layout.linear or any(part.kind == "minus" for part in layout.parts):
            raise ValueError(
                "vectors needs rows of whole sequences: their inner product is a plain one; these "
                'keep outer products of tokens: features(…, by="sequence"), or per_sequence()'
            )
        exact = layout.exact(self.rows)
        if exact.shape[1] == layout.width:
            return self.rows
        sketched = layout.repeated(self.rows).flatten(1) / layout.sketch.repeats**0.5
        return torch.cat([exact, sketched], 1)

    def to_arrow(self) -> pyarrow.Table:
        """Token table and rows as an Arrow table of one chunk, as by `Store.to_arrow`.

        The column `features` is a view of `rows` on the CPU.

        Raises:
            ImportError: If pyarrow is not installed.
        """
        return arrow_table([(self.tokens, self.rows)], self.layout.width, self.rows.dtype)

    def per_sequence(self) -> Features:
        """The rows of whole sequences: sums over their tokens, of Σ_m w_m ∇ log π(y_m).

        Returns:
            Features with one row an example, in order, of the layout `layout.summed()`.
        """
        layout, new = self.layout, self.layout.summed()
        owner, index = torch.unique(self.tokens.example_index, return_inverse=True)
        index = index.to(self.rows.device)

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(len(owner), *x.shape[1:]).index_add_(0, index, x)

        rows = self.rows.new_zeros(len(owner), new.width)
        new.exact(rows)[:] = total(layout.exact(self.rows))
        for part in new.parts:
            place = new.repeated(rows)[..., new.places[part.name, part.kind]]
            if part.kind == "summed" and (part.name, "summed") not in layout.places:
                outer = next(p for p in layout.parts if p.name == part.name)
                place[:] = self._summed(outer, part.sizes, index, len(owner))
            elif part.kind != "exact":
                old = layout.places[part.name, part.kind]
                place[:] = total(layout.repeated(self.rows)[..., old])
        first = [int((self.tokens.example_index == i).nonzero()[0]) for i in owner]
        names = [self.tokens.example_id[i] for i in first]
        return Features(rows, _sequence_table(names, owner), new)

    def _summed(self, part: Part, sizes: tuple[int, int], index: Tensor, count: int) -> Tensor:
        """Σ_m (S v_m) ⊗ (S' h_m) of each sequence (count, R, numbers), for one outer product."""
        sketch, name = self.layout.sketch, f"{part.name}\0sum"
        v, h = self.layout.pair(self.rows, part)
        frames = haar(sketch.seed, name, "right", sketch.repeats, sizes[1], part.shape[1]).to(h)
        where, sign = hashed(sketch.seed, name, "left hash", sketch.repeats, sizes[0], v.shape[2])
        out = h.new_zeros(count, sketch.repeats, sizes[0] * sizes[1])
        for repeat in range(sketch.repeats):
            left = v[:, repeat % v.shape[1]]
            if sizes[0] < v.shape[2]:
                moved = left.new_zeros(len(left), sizes[0])
                signed = left * sign[repeat].to(left)
                left = moved.index_add_(1, where[repeat].to(left.device), signed)
            both = left[:, :, None] * (h[:, 0] @ frames[repeat].T)[:, None, :]
            out[:, repeat].index_add_(0, index, both.flatten(1))
        return out

    def save(self, path: str | Path) -> None:
        """Writes `path`.safetensors (rows and token table) and `path`.json (layout, examples)."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: getattr(self.tokens, name) for name in _COLUMNS}
        tensors = {"rows": self.rows} | columns
        save_file(
            {name: x.contiguous().cpu() for name, x in tensors.items()},
            path.with_name(path.name + ".safetensors"),
        )
        described = {"layout": self.layout.to_json(), "example_id": self.tokens.example_id}
        path.with_name(path.name + ".json").write_text(json.dumps(described), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If one of the two files is not there.
            ValueError: If they do not fit each other, or are of another version.
        """
        from safetensors.torch import load_file

        path = Path(path)
        text = path.with_name(path.name + ".json").read_text(encoding="utf-8")
        tensors = load_file(path.with_name(path.name + ".safetensors"))
        described = json.loads(text)
        layout = Layout.from_json(described["layout"])
        names, rows = described["example_id"], tensors["rows"]
        if tuple(rows.shape) != (len(names), layout.width):
            raise ValueError(
                f"{path}: rows must be ({len(names)}, {layout.width}) by its JSON file, got "
                f"{tuple(rows.shape)}; the two files are not of one save"
            )
        return cls(rows, TokenTable(names, *(tensors[name] for name in _COLUMNS)), layout)


_COLUMNS = ("example_index", *COLUMNS)
