"""Token features: one row of numbers per response token, whose inner products estimate the NTK.

N sequences cost N passes, not N² pairs: every token's gradient is pulled back once, block by block,
sketched where it stands, and forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    hashed_rows,
    low_rank,
    weigh,
)
from lddyn.pullback import DEFAULT_MEMORY, Pullback, parse_memory, segments_down
from lddyn.sketch import Layout, Part, Sketch, best_sizes
from lddyn.store import TokenTable

if TYPE_CHECKING:
    from torch import nn

CHUNK = 16
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
        """From a pullback's factors. A padding token's embedding row is left out: see `pair`."""
        found = cls({}, {}, factors.head)
        for tap, grads in factors.taps:
            delta = _wide(grads)
            if tap.bias is not None:
                found.add(tap.bias, summed(delta), anatomy)
            if tap.weight is None:
                continue
            if tap.kind == "embedding":
                keep = tap.updated()
                term = Term(tap.activations[keep], delta[:, keep])
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
        rows = None
        if weights is not None:
            rows = ops.residual(trace.logits, trace.targets)[0] * weights[:, None]
        pull = Pullback(trace, rows, select, chunk)
        visit(pull.selected, Gradients.of(pull.head_factors(), anatomy))
        for segment in segments_down(anatomy):
            for selected, factors in pull.step(segment):
                visit(selected, Gradients.of(factors, anatomy))


def _head_sides(head: HeadFactor) -> tuple[Tensor, Tensor]:
    """Of gradients v ⊗ h: h (c, d), with a one where the head's bias trains, and v (c, V)."""
    v, h = _wide(head.rows), _wide(head.hidden)
    one = h.new_ones(len(h), 1)
    if head.weight is None:
        return one, v
    return (h if head.bias is None else torch.cat([h, one], 1)), v


# --------------------------------------------------------------------------- the layout


@undisturbed
def plan_layout(model: nn.Module | Anatomy, examples: Sequence[Example], sketch: Sketch) -> Layout:
    """Divides k over the parameters of a model: a layout for `features`.

    A parameter's share of k is its share of ‖gradient‖², averaged over up to 8 evenly spaced tokens
    of each of the first 4 examples, which makes the sum of the variances least; at least one number
    a repeat. What fits into its share as it is, is kept exactly, and so are vectors of up to
    `sketch.exact` entries, which do not count against k. An untied head keeps h, and v by a count
    sketch or exactly.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences, of which the first are looked at.
        sketch: k, kind and the rest.

    Returns:
        Layout; whoever shares it makes rows that can be compared.

    Raises:
        ValueError: If there is no example, or k is too small for the number of parameters.
        UnsupportedModelError: If a parameter is used in two ways at once, or a low-rank form is
            asked for packed experts or for weights that several blocks share.

    Cost: a forward pass of 4 examples; the pullback and the materialised gradients of 32 tokens.
    """
    if not examples:
        raise ValueError("at least one example is needed to divide k over the parameters, got none")
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    squares: dict[str, float] = {}
    uses: dict[str, str] = {}
    head_square = 0.0

    def note(name: str, use: str, square: float) -> None:
        squares[name] = squares.get(name, 0.0) + square
        if uses.setdefault(name, use) != use:
            raise _mixed(name)

    def visit(rows: Tensor, found: Gradients) -> None:
        nonlocal head_square
        for name, terms in found.weights.items():
            base = base_name(name)
            height = int(anatomy.trainable[base].shape[-2])
            whole = (weigh(terms, c, height).square().sum() for c in range(len(rows)))
            note(base, _use(base, terms), float(sum(whole)))
        for name, vector in found.vectors.items():
            note(name, "vector", float(vector.square().sum()))
        if found.head is not None and (found.head.weight or found.head.bias):
            h, v = _head_sides(found.head)
            head_square += float((h.square().sum(1) * v.square().sum(1)).sum())

    for example in examples[: _PILOT[0]]:
        trace = anatomy.trace(example)
        count = min(_PILOT[1], len(trace.positions))
        select = torch.linspace(0, len(trace.positions) - 1, count).round().long()
        _walk(trace, None, select.to(trace.positions.device), CHUNK, visit)
    # Three digits: what another device rounds differently should not move a number.
    squares = {name: float(f"{square:.3g}") for name, square in squares.items()}
    return Layout(sketch, _divide(anatomy, sketch, squares, uses, float(f"{head_square:.3g}")))


def _use(name: str, terms: Sequence[Term]) -> str:
    kinds = {term.left.dim() == 1 for term in terms}
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
    head_square: float,
) -> tuple[Part, ...]:
    fixed: list[Part] = []  # not counted in k
    shared: list[tuple[Part, float]] = []  # without sizes; what they weigh
    head = anatomy.head_weight, anatomy.head_bias
    for name, parameter in anatomy.trainable.items():
        tied = name == head[0] and anatomy.tied
        if name in head and not tied:
            continue
        # A parameter that no pilot token reached may yet be reached: an expert of its own, say.
        vector = parameter.dim() not in (2, 3) or name in anatomy.direct
        lookup = "embedding" in anatomy.ledger[name].ops
        use = uses.get(name, "vector" if vector else "onehot" if lookup else "sketch")
        weight = squares.get(name, 0.0)
        if use == "vector":
            part = Part(name, "vector", (parameter.numel(), 1), (1, 1))
            if parameter.numel() <= sketch.exact:
                fixed.append(Part(name, "exact", part.shape, (parameter.numel(), 1)))
            else:
                shared.append((part, weight))
            continue
        shape = int(parameter.shape[-2]), int(parameter.shape[-1])
        if tied:
            if use != "onehot":
                raise _mixed(name)
            cross = weight + 2 * (weight * head_square) ** 0.5
            shared += [(Part(name, kind, shape, (1, 1)), cross / 2) for kind in ("onehot", "minus")]
        elif use == "sketch" and sketch.kind == "lowrank":
            if parameter.dim() == 3 or len(anatomy.ledger[name].segments) > 1:
                raise UnsupportedModelError(
                    f"{name} is packed or shared by several blocks, and the low-rank form of a sum "
                    "is not the sum of the forms: use another kind of sketch"
                )
            fixed.append(Part(name, "lowrank", shape, (min(sketch.rank, *shape), 2)))
        else:
            shared.append((Part(name, use, shape, (1, 1)), weight))
    if head != (None, None):
        width = (anatomy.head.weight.shape[1] if head[0] else 0) + (1 if head[1] else 0)
        part = Part(head[0] or head[1] or "", "head", (anatomy.vocabulary, int(width)), (1, 1))
        shared.append((part, head_square))
    return tuple(fixed + _shares(anatomy, sketch, shared))


def _shares(anatomy: Anatomy, sketch: Sketch, shared: list[tuple[Part, float]]) -> list[Part]:
    """Sizes in proportion to the weights; what fits as it is leaves the rest to the others."""
    done: dict[int, Part] = {}
    while True:
        waiting = [i for i in range(len(shared)) if i not in done]
        kept = sum(p.shape[0] * (1 if p.kind == "head" else p.shape[1]) for p in done.values())
        per_repeat = (sketch.k - kept) // sketch.repeats - len(waiting)
        if per_repeat < 0:
            raise ValueError(
                f"k must be at least {sketch.repeats * len(shared)}, a number for each of "
                f"{sketch.repeats} repeats of {len(shared)} parameters, got {sketch.k}: raise k, "
                "lower repeats, or freeze parameters"
            )
        total = sum(shared[i][1] for i in waiting) or 1.0
        sizes = {i: 1 + int(per_repeat * shared[i][1] / total) for i in waiting}
        fits = []
        for i in waiting:
            part = shared[i][0]
            numbers = part.shape[0] * (1 if part.kind == "head" else part.shape[1])
            packed = part.kind == "sketch" and anatomy.trainable[part.name].dim() == 3
            split = part.kind in ("onehot", "minus") and anatomy.tied
            if numbers <= sketch.repeats * sizes[i] and not packed and not split:
                fits.append(i)
                kind = "head" if part.kind == "head" else "exact"
                done[i] = Part(part.name, kind, part.shape, (numbers, 1))
        if not fits:
            break
    for i in waiting:
        part, size = shared[i][0], sizes[i]
        if part.kind == "head":
            chosen = size, 1
        elif part.kind == "sketch":
            chosen = sketch.sizes(part.shape, size)
        else:
            chosen = best_sizes(*part.shape, size)
        done[i] = Part(part.name, part.kind, part.shape, chosen)
    return [done[i] for i in range(len(shared))]


# --------------------------------------------------------------------------- features


class _Writer:
    """Puts the gradients of one example's chunks into its rows."""

    def __init__(self, rows: Tensor, layout: Layout, anatomy: Anatomy):
        self.rows, self.layout, self.anatomy = rows, layout, anatomy
        self.parts: dict[str, dict[str, Part]] = {}
        for part in layout.parts:
            self.parts.setdefault(part.name, {})[part.kind] = part

    def __call__(self, selected: Tensor, found: Gradients) -> None:
        """Adds what a chunk's tokens have in one segment."""
        layout, sketch = self.layout, self.layout.sketch
        block = self.rows[selected]
        repeated = layout.repeated(block)

        def add(part: Part, numbers: Tensor) -> None:
            start = layout.starts[part.name, part.kind]
            if part.kind == "exact":
                block[:, start : start + part.numbers] += numbers
            else:
                repeated[..., start : start + part.numbers] += numbers

        for name, terms in found.weights.items():
            part = self._part(name, _use(name, terms))
            if part.kind == "exact":  # also of an embedding
                whole = [weigh(terms, c, part.shape[0]).flatten() for c in range(len(block))]
                add(part, torch.stack(whole))
            elif part.kind == "lowrank":
                for place, values in zip(
                    layout.low_rank(block, part),
                    low_rank(terms, part.shape, part.sizes[0]),
                    strict=True,
                ):
                    place[:] = values
            else:
                add(part, sketch.project(name, terms, part.shape, part.sizes))
        for name, vector in found.vectors.items():
            part = self._part(name, "vector")
            if part.kind == "exact":
                add(part, vector)
            else:
                term = Term(vector[:, None], vector.new_ones(len(vector), 1, 1))
                add(part, sketch.project(name, [term], part.shape, part.sizes))
        if found.head is not None and (found.head.weight or found.head.bias):
            self._head(block, found.head, add)
        self.rows[selected] = block

    def _head(self, block: Tensor, head: HeadFactor, add: Callable[[Part, Tensor], None]) -> None:
        sketch = self.layout.sketch
        name = head.weight or head.bias or ""
        part = self.parts[name]["head"]
        h, v = _head_sides(head)
        place, logits = self.layout.head(block, part)
        place[:] = h
        if part.all_logits:
            logits[:, 0] = v
        else:
            logits[:] = count_sketch(Stream(sketch.seed, name, sketch.repeats), v, part.sizes[0])
        tied = self.parts[name].get("minus")
        if tied is not None:
            stream = Stream(sketch.seed, name, sketch.repeats)
            own = hashed_rows(stream, v, _wide(head.hidden), tied.sizes, tied.shape[1]).flatten(2)
            add(tied, own)
            add(self.parts[name]["onehot"], own)

    def _part(self, name: str, use: str) -> Part:
        parts = self.parts.get(base_name(name), {})
        wanted = ("lowrank", "sketch", "exact") if use == "sketch" else (use, "exact")
        found = next((parts[kind] for kind in wanted if kind in parts), None)
        if found is None:
            raise UnsupportedModelError(
                f"the layout keeps nothing of {name} as a {use}: it was made for another model, or "
                "none of its first examples reached this parameter; make it with others"
            )
        return found


def _check_layout(layout: Layout, anatomy: Anatomy) -> None:
    head = anatomy.head_weight or anatomy.head_bias
    expected = {n: p.numel() for n, p in anatomy.trainable.items()}
    if anatomy.head_weight and anatomy.head_bias:  # one part for both
        expected[anatomy.head_weight] += expected.pop(anatomy.head_bias)
    found: dict[str, int] = {}
    for part in layout.parts:
        size = part.shape[0] * part.shape[1]
        packed = part.kind == "sketch" and part.name in anatomy.trainable
        if packed and anatomy.trainable[part.name].dim() == 3:
            size *= anatomy.trainable[part.name].shape[0]
        found[part.name] = max(size, found.get(part.name, 0))
    wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if head is not None and (head, "head") not in layout.starts:
        wrong.append(head)
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
    weights: Sequence[Tensor] | None = None,
    layout: Layout | None = None,
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    chunk: int = CHUNK,
) -> Features:
    """Rows whose inner products estimate those of token gradients, ⟨∇ log π(y_m), ∇ log π(y_l)⟩.

    Every trainable parameter counts. One forward pass an example, every token pulled back once; the
    factors of one segment and one chunk are kept at a time.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences; each of their counted response tokens is a row.
        sketch: How gradients are sketched; default `Sketch()`. Not with `layout`.
        weights: One (tokens,) tensor per example: row m is w_m ∇ log π(y_m).
        layout: That of earlier rows, to compare with them. Default: `plan_layout` of these
            examples, so another order of them may make another one.
        memory: Workspace in bytes or as "2GiB", beyond the model, for rows and one chunk.
        progress: Show a bar over tokens.
        chunk: Cotangents that are pulled back together. It moves rounding alone, but it does:
            the same chunk gives the same bits, whatever the other examples, order, or memory.

    Returns:
        Features of N rows, float32 (float64 for float64 models).

    Raises:
        ValueError: If there is no example, weights do not fit, the layout is another model's, k is
            too small, or a chunk of the longest example does not fit into memory.
        UnsupportedModelError: If the model cannot be opened, or its parameters not be sketched.

    Cost: 2 N_θ Σ (p_m + 1) FLOPs for pulling, N_θ the block-linear parameters, and those of
    `Sketch.apply` for every layer.

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
    examples = list(examples)
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
    budget = parse_memory(memory)
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    if layout is None:
        layout = plan_layout(anatomy, examples, sketch or Sketch())
    bar = tqdm(
        total=sum(len(e) for e in examples), desc="features", unit="token",
        disable=None if progress else True, leave=False,
    )  # fmt: skip
    rows: list[Tensor] = []
    for index, example in enumerate(examples):
        trace = anatomy.trace(example)
        if index == 0:
            _check_layout(layout, anatomy)
            total = sum(len(e) for e in examples) * layout.width * trace.logits.element_size()
        work = Side(trace).bytes_per_cotangent() * min(chunk, len(example))
        if total + work > budget:
            raise ValueError(
                f"memory must be at least {total + work} bytes, {total} for all rows and {work} "
                f"for a chunk of {min(chunk, len(example))} tokens of a sequence of "
                f"{trace.length}, got {budget}: raise it, lower chunk, or give fewer examples at a "
                "time with one layout"
            )
        block = trace.logits.new_zeros(len(example), layout.width)
        given = None if weights is None else weights[index].to(trace.logits)
        _walk(trace, given, None, chunk, _Writer(block, layout, anatomy))
        rows.append(block)
        bar.update(len(example))
    bar.close()
    return Features(torch.cat(rows), token_table(examples), layout)


def token_table(examples: Sequence[Example]) -> TokenTable:
    """Which token each row is, for rows of these examples in their order."""
    return TokenTable(
        [e.content_id for e in examples for _ in range(len(e))],
        torch.tensor([i for i, e in enumerate(examples) for _ in range(len(e))]),
        torch.tensor([m for e in examples for m in range(len(e))], dtype=torch.int32),
        torch.tensor([p for e in examples for p in e.positions], dtype=torch.int32),
        torch.tensor([t for e in examples for t in e.targets], dtype=torch.int32),
    )


@dataclass(frozen=True)
class Features:
    """Rows of token gradients, what tokens they are, and how they are compared. See `features`.

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
        step = max(1, 2**24 // (self.layout.sketch.repeats * max(1, len(other))))
        found = [self.layout.estimate(part, other.rows) for part in self.rows.split(step)]
        return Estimate(
            torch.cat([e.value for e in found]),
            torch.cat([e.stderr for e in found]),
            found[0].samples,
        )

    def per_sequence(self, head: int = 1024) -> Features:
        """The rows of whole sequences: sums over their tokens, of Σ_m w_m ∇ log π(y_m).

        The head's product ⟨h, h'⟩⟨v, v'⟩ is not linear in rows; it is sketched for the purpose.

        Args:
            head: Numbers of one repeat for the head's part.

        Returns:
            Features with one row an example, in order, of a layout that is linear.

        Raises:
            ValueError: If the rows hold low-rank forms, which cannot be summed.
        """
        layout, sketch = self.layout, self.layout.sketch
        if any(part.kind == "lowrank" for part in layout.parts):
            raise ValueError(
                "low-rank forms of tokens cannot be summed: use another kind of sketch, or sum the "
                "entries of gram()"
            )
        if head < 1:
            raise ValueError(f"head must be at least 1, got {head}")
        owner, index = torch.unique(self.tokens.example_index, return_inverse=True)
        index = index.to(self.rows.device)
        exact, repeated, _ = layout.lengths
        end = exact + sketch.repeats * repeated
        summed_rows = self.rows.new_zeros(len(owner), end).index_add_(0, index, self.rows[:, :end])
        parts = [part for part in layout.parts if part.kind != "head"]
        blocks = [summed_rows[:, exact:].unflatten(1, (sketch.repeats, repeated))]
        for part in layout.parts:
            if part.kind == "head":
                sizes = best_sizes(part.sizes[0], part.shape[1], head)
                parts.append(Part(part.name, "summed head", part.shape, sizes))
                blocks.append(self._summed_head(part, sizes, index, len(owner)))
        rows = torch.cat([summed_rows[:, :exact], torch.cat(blocks, 2).flatten(1)], 1)
        first = [int((self.tokens.example_index == i).nonzero()[0]) for i in owner]
        none = torch.full((len(owner),), -1, dtype=torch.int32)
        names = [self.tokens.example_id[i] for i in first]
        table = TokenTable(names, owner, none, none.clone(), none.clone())
        return Features(rows, table, Layout(sketch, tuple(parts)))

    def _summed_head(self, part: Part, sizes: tuple[int, int], index: Tensor, count: int) -> Tensor:
        """Σ_m (S v_m) ⊗ (S' h_m) of each sequence (count, R, numbers)."""
        sketch = self.layout.sketch
        h, v = self.layout.head(self.rows, part)
        frames = haar(
            sketch.seed, part.name, "sum right", sketch.repeats, sizes[1], part.shape[1]
        ).to(h)
        out = h.new_zeros(count, sketch.repeats, *sizes)
        for repeat in range(sketch.repeats):
            own = v[:, repeat % v.shape[1]]
            if sizes[0] < own.shape[1]:
                stream = Stream(sketch.seed, f"{part.name}\0sum", sketch.repeats)
                own = count_sketch(stream, own, sizes[0])[:, repeat]
            right = h @ frames[repeat].T
            for sequence, result in enumerate(out[:, repeat]):
                mine = index == sequence
                result += own[mine].T @ right[mine]
        return out.flatten(2)

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


_COLUMNS = ("example_index", "response_index", "position", "token_id")
