"""Computing feature rows: every token's gradient, sketched as soon as it is pulled back.

N sequences cost N passes, not N² pairs: a gradient is sketched segment by segment and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.data.example import Example
from lddyn.data.token_table import table_of
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import Side
from lddyn.engine.guard import undisturbed
from lddyn.errors import MemoryBudgetError
from lddyn.finite import checked
from lddyn.memory import DEFAULT_MEMORY, cpu_threads, parse_memory
from lddyn.sketches.allocation import choose_layout
from lddyn.sketches.gradients import (
    CHUNK,
    Batching,
    chunk_bytes,
    visit_sequences,
    visit_tokens,
)
from lddyn.sketches.layout import Layout, by_sequence
from lddyn.sketches.result import Features
from lddyn.sketches.sketch import Sketch
from lddyn.sketches.writer import RowWriter

if TYPE_CHECKING:
    from torch import nn


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

    Gradients are those of every trainable parameter. Each example takes one forward pass, and each
    of its tokens is pulled back once. Memory holds the factors of one segment of the model and one
    chunk of tokens at a time.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences; each of their counted response tokens is a row.
        sketch: How gradients are sketched; default `Sketch()`. Not with `layout`.
        by: `"token"`; or `"sequence"`: a row is the gradient of a whole sequence's log-prob,
            Σ_m w_m ∇ log π(y_m), by one plain backward pass, for many sequences in a batch.
        weights: w (tokens,) for each example: row m is w_m ∇ log π(y_m). None: 1.
        layout: The layout of earlier rows, to compare with them. None: `choose_layout` of these
            examples, which depends on their order.
        memory: Workspace in bytes or as "2GiB", beyond the model, for rows and one chunk.
        progress: Show a bar over tokens.
        chunk: Tokens, or whole sequences, that are pulled back together. Fewer sequences are taken
            where `memory` does not hold the graph of their forward pass. Where it does not hold the
            graph of a single sequence, segments are computed again in the backward pass.
        threads: CPU threads; None: torch's number. Several processes with one thread each are
            faster than one process with several (`lddyn features build` under torchrun).

    On a CPU, the same seed, layout, chunk and threads give the same bits, whatever the other
    examples, their order or the memory; by sequence also whatever the chunk. Another chunk, more
    threads or another device change only the rounding, and so does a second run on a GPU.

    Returns:
        Features of N rows, float32 (float64 for float64 models).

    Raises:
        ValueError: If there is no example, weights do not fit, the layout belongs to another model,
            or k is too small.
        MemoryBudgetError: If memory does not hold a chunk of the longest example.
        UnsupportedModelError: If the model cannot be opened, or its parameters not be sketched.

    Cost: 2 N_θ Σ (p_m + 1) FLOPs for pulling back, N_θ the block-linear parameters and p_m the
    position of token m, and the FLOPs of `Sketch.apply` for every layer. By sequence 4 N_θ T each,
    and 2 N_θ T more where segments are computed again.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> feats = lddyn.features(model, [ex], lddyn.Sketch(k=1024, seed=0))
        >>> len(feats), feats.by, feats.tokens.token_id.tolist()
        (3, 'token', [3, 4, 5])
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
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1 or None, got {threads}")
    if weights is not None:
        _check_weights(weights, examples)
    budget = parse_memory(memory)
    anatomy = Anatomy.of(model)
    if layout is None:
        layout = choose_layout(anatomy, examples, sketch or Sketch(), by)
    _check_layout(layout, anatomy, together)
    bar = tqdm(
        total=sum(map(len, examples)),
        desc="features",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    compute = _sequence_rows if together else _token_rows
    with bar:
        rows = compute(anatomy, examples, weights, layout, budget, chunk, threads, bar)
    checked(rows, "the features", next(iter(anatomy.trainable.values())).dtype)
    return Features(rows, table_of(examples, by), layout)


def _token_rows(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor] | None,
    layout: Layout,
    budget: int,
    chunk: int,
    threads: int | None,
    bar: tqdm,
) -> Tensor:
    """One row for each counted token, example by example."""
    blocks: list[Tensor] = []
    for index, example in enumerate(examples):
        with cpu_threads(threads):
            trace = anatomy.trace(example)
        element, count = trace.logits.element_size(), min(chunk, len(example))
        total = sum(map(len, examples)) * layout.width * element
        work = chunk_bytes(layout, Side(trace).bytes_per_cotangent(), count, element)
        if total + work > budget:
            raise MemoryBudgetError(
                f"memory must be at least {total + work} bytes, {total} for all rows and {work} "
                f"for a chunk of {count} tokens of a sequence of "
                f"{trace.length}, got {budget}: raise it, lower chunk, or give fewer examples at a "
                "time with one layout"
            )
        if not blocks:
            rows = trace.logits.new_zeros(sum(map(len, examples)), layout.width)
            blocks = list(rows.split([len(e) for e in examples]))
        given = None if weights is None else weights[index].to(trace.logits)
        with cpu_threads(threads):
            visit_tokens(trace, given, None, chunk, RowWriter(blocks[index], layout, False))
        bar.update(len(example))
    return rows


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
    """One row for each sequence, many sequences in a batch."""
    with cpu_threads(threads):
        trace = anatomy.trace(max(examples, key=lambda e: e.length))
        total = len(examples) * layout.width * trace.logits.element_size()
        batching = Batching.of(trace, max(map(len, examples)), chunk, budget - total, layout)
        if total + batching.least > budget:
            raise MemoryBudgetError(
                f"memory must be at least {total + batching.least} bytes, {total} for all rows and "
                f"{batching.least} for a sequence of {trace.length} tokens, got {budget}: raise "
                "it, or give fewer examples at a time with one layout"
            )
        rows = trace.logits.new_zeros(len(examples), layout.width)
        given = None if weights is None else [w.to(rows) for w in weights]
        visit_sequences(anatomy, examples, given, batching, RowWriter(rows, layout, True), bar)
    return rows


def _check_weights(weights: Sequence[Tensor], examples: Sequence[Example]) -> None:
    """A ValueError unless each example has a finite weight for each token."""
    shapes, expected = [tuple(w.shape) for w in weights], [(len(e),) for e in examples]
    if shapes != expected:
        raise ValueError(
            f"weights must be a (tokens,) tensor per example, {expected[:4]}…, got {shapes[:4]}…"
        )
    wrong = [i for i, w in enumerate(weights) if not bool(w.isfinite().all())]
    if wrong:
        raise ValueError(
            f"weights must be finite, got {weights[wrong[0]].tolist()[:4]}… for example "
            f"{wrong[0]} ({len(wrong)} such examples): 0 leaves a token out"
        )


def _check_layout(layout: Layout, anatomy: Anatomy, together: bool) -> None:
    """A ValueError unless a layout belongs to this model and to this kind of row."""
    expected = {n: p.numel() for n, p in anatomy.trainable.items()}
    bias = any(part.name == anatomy.head_bias for part in layout.parts)
    if anatomy.head_weight and anatomy.head_bias and not bias:  # one part for both
        expected[anatomy.head_weight] += expected.pop(anatomy.head_bias)
    stored: dict[str, int] = {}
    for part in layout.parts:
        size, parameter = part.shape[0] * part.shape[1], anatomy.trainable.get(part.name)
        if part.kind == "sketch" and parameter is not None and parameter.dim() == 3:
            size *= parameter.shape[0]
        stored[part.name] = max(size, stored.get(part.name, 0))
    wrong = [n for n in {**expected, **stored} if expected.get(n) != stored.get(n)]
    if wrong:
        raise ValueError(
            f"layout was made for another model: {wrong[0]} has {expected.get(wrong[0], 0)} "
            f"trainable numbers here, {stored.get(wrong[0], 0)} there ({len(wrong)} such "
            "parameters)"
        )
    if together and not layout.linear:
        raise ValueError(
            "layout must be one of sequences, this one stores outer products of tokens: make it "
            "with choose_layout(…, by='sequence')"
        )
    if not together and any(part.kind == "summed" for part in layout.parts):
        raise ValueError("layout is one of sequences: give by='sequence', or a layout of tokens")
