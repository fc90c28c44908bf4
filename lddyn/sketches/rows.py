"""Making feature rows: every token's gradient, sketched as it is pulled back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.data.example import Example
from lddyn.data.token_table import table_of
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import HeadFactor
from lddyn.engine.gram import Side
from lddyn.engine.guard import undisturbed
from lddyn.errors import UnsupportedModelError
from lddyn.memory import DEFAULT_MEMORY, cpu_threads, parse_memory
from lddyn.sketches.divide import plan_layout, use_of
from lddyn.sketches.features import CHUNK, Features
from lddyn.sketches.gradients import (
    Gradients,
    Room,
    base_name,
    chunk_bytes,
    head_sides,
    walk,
    walk_sequences,
    wide,
)
from lddyn.sketches.layout import Layout, Part, by_sequence
from lddyn.sketches.projections import (
    Stream,
    Term,
    count_sketch,
    hashed_rows,
    low_rank,
    single,
    weigh,
)
from lddyn.sketches.sketch import Sketch

if TYPE_CHECKING:
    from torch import nn


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
        part = self._part(name, use_of(name, terms))
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
        h, v = head_sides(head)
        left, right = self.layout.pair(self.rows, part)
        right[selected, 0] = h
        kept = v[:, None] if part.kind == "outer" else count_sketch(stream, v, part.sizes[0])
        left[selected] = kept
        tied = self.parts[name].get("minus")
        if tied is not None:
            hidden = wide(head.hidden)[:, None]
            own = hashed_rows(stream, v[:, None], hidden, tied.sizes).flatten(2)
            self._add(selected, tied, own)
            self._add(selected, self.parts[name]["onehot"], own)

    def _summed_head(self, selected: Tensor, head: HeadFactor) -> None:
        """Of all tokens together: Σ_m v_m ⊗ h_m."""
        v, h = wide(head.rows)[None], wide(head.hidden)[None]
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
    examples, together = list(examples), by_sequence(by)
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
    anatomy = Anatomy.of(model)
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
        total=sum(map(len, examples)),
        desc="features",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    if together:
        whole = _sequence_rows(anatomy, examples, weights, layout, budget, chunk, threads, bar)
        bar.close()
        return Features(whole, table_of(examples, by), layout)
    height = sum(map(len, examples))
    rows: Tensor | None = None
    start = 0
    for index, example in enumerate(examples):
        with cpu_threads(threads):
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
        with cpu_threads(threads):
            walk(trace, given, None, chunk, writer)
        bar.update(len(example))
    bar.close()
    assert rows is not None
    return Features(rows, table_of(examples, by), layout)


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
    with cpu_threads(threads):
        trace = anatomy.trace(max(examples, key=lambda e: e.length))
        element = trace.logits.element_size()
        total = len(examples) * layout.width * element
        room = Room.of(trace, max(map(len, examples)), chunk, budget - total, layout)
        if total + room.least > budget:
            raise ValueError(
                f"memory must be at least {total + room.least} bytes, {total} for all rows and "
                f"{room.least} for a sequence of {trace.length} tokens, got {budget}: raise it, or "
                "give fewer examples at a time with one layout"
            )
        rows = trace.logits.new_zeros(len(examples), layout.width)
        given = None if weights is None else [w.to(rows) for w in weights]
        writer = _Writer(rows, layout, anatomy, together=True)
        walk_sequences(anatomy, examples, given, room, writer, bar)
    return rows
