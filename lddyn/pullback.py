"""Many cotangents, one forward: token gradients as factors, block by block.

A cotangent v_m in R^V sits on the logits of one response position p_m. Pulled back through the head
it is g_m = Wᵀ v_m; through every segment it meets the taps and leaves a factor there: δ_m, the
gradient at the tap's output. The gradient of a weight is then Σ_t δ_m[t] ⊗ x[t], and is never
formed. Causality: δ_m[t] = 0 for t > p_m, so chunks of cotangents that are sorted by position are
pulled back through a prefix of the sequence only.

Cost of one cotangent: 2 N (p_m + 1) FLOPs, N the block-linear parameters, plus one forward replay
of the prefix per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lddyn import ops
from lddyn.anatomy import Anatomy, Replay, Trace, back_project
from lddyn.examples import Example
from lddyn.ledger import Tap

Gradient = dict[str, Tensor]  # parameter name -> tensor of its shape

DEFAULT_MEMORY = "2GiB"
_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_memory(memory: int | str) -> int:
    """Bytes of a budget such as "2GiB", "500MB" or a plain number of bytes.

    Raises:
        ValueError: If the text is not a positive number followed by a unit.

    Example:
        >>> parse_memory("2GiB")
        2147483648
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        value = memory
    else:
        text = str(memory).strip().upper().replace(" ", "")
        digits = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = text[len(digits) :] or "B"
        try:
            value = int(float(digits) * _UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            raise ValueError(f"memory must look like '2GiB' or '500MB', got {memory!r}") from None
    if value <= 0:
        raise ValueError(f"memory must be positive, got {memory!r}")
    return value


# --------------------------------------------------------------------------- factors


@dataclass
class HeadFactor:
    """The head's factors: one row each. Gradient of W for cotangent l: v_l ⊗ h_l."""

    weight: str | None
    bias: str | None
    hidden: Tensor  # (L, d)
    rows: Tensor  # (L, V), cotangents on the raw logits


@dataclass
class Factors:
    """Token gradients of one segment for one chunk of cotangents, as factors.

    taps: (tap, δ) with δ of shape (c, rows, d_out); direct: name -> (c, *shape) materialised.
    lengths (c,): cotangent m reaches tokens t < lengths[m] of the `tokens` replayed ones.
    """

    taps: list[tuple[Tap, Tensor]] = field(default_factory=list)
    direct: dict[str, Tensor] = field(default_factory=dict)
    head: HeadFactor | None = None
    lengths: Tensor | None = None
    tokens: int = 0

    def reach(self, tap: Tap) -> Tensor | None:
        """Lengths of the tap's rows, or None where its rows are not the replayed tokens."""
        return self.lengths if len(tap.activations) == self.tokens else None

    def __len__(self) -> int:
        if self.head is not None:
            return self.head.rows.shape[0]
        tensors = [d for _, d in self.taps] + list(self.direct.values())
        return tensors[0].shape[0] if tensors else 0


def pair(one: Factors, other: Factors, add: Callable[[str, Tensor], None]) -> None:
    """Adds Σ over parameters of ⟨gradient of one's m, gradient of other's l⟩, named, as (c, c').

    `one` is observed, `other` updated: autograd does not update the embedding row of a padding
    token, so that row is left out of the updated side only.
    """
    weights: dict[str, list[tuple[Tap, Tensor]]] = {}
    biases: dict[str, list[Tensor]] = {}
    for tap, delta in other.taps:
        if tap.weight is not None:
            weights.setdefault(tap.weight, []).append((tap, delta))
        if tap.bias is not None:
            biases.setdefault(tap.bias, []).append(delta.sum(1))
    for tap, delta in one.taps:
        if tap.weight is not None:
            for tap_u, delta_u in weights.get(tap.weight, ()):
                lengths = one.reach(tap), other.reach(tap_u)
                add(tap.weight, _pair_tap(tap, delta, tap_u, delta_u, *lengths))
        if tap.bias is not None:
            for summed in biases.get(tap.bias, ()):
                add(tap.bias, _wide(delta.sum(1)) @ _wide(summed).T)
    for name, gradient in one.direct.items():
        if name in other.direct:
            add(name, _wide(gradient.flatten(1)) @ _wide(other.direct[name].flatten(1)).T)
    pair_head(one, other, add)


def merge(chunks: list[tuple[Tensor, Factors]]) -> list[tuple[Tensor, Factors]]:
    """Joins the chunks of one side, so that what is paired with them is pushed once, not per chunk.

    Shorter prefixes are filled with zeros. Taps whose rows are not a prefix of the longest chunk's
    (packed experts see a subset of tokens) leave the chunks as they are.
    """
    if len(chunks) < 2:
        return chunks
    longest = chunks[-1][1]
    for _, factors in chunks:
        names = [(t.kind, t.weight, t.bias) for t, _ in factors.taps]
        if names != [(t.kind, t.weight, t.bias) for t, _ in longest.taps]:
            return chunks
        if factors.direct.keys() != longest.direct.keys():
            return chunks
        for (tap, _), (reference, _) in zip(factors.taps, longest.taps, strict=True):
            if not _is_prefix(tap.activations, reference.activations):
                return chunks
    rows = torch.cat([r for r, _ in chunks])
    known = [f.lengths for _, f in chunks if f.lengths is not None]
    joined = Factors(
        direct={n: torch.cat([f.direct[n] for _, f in chunks]) for n in longest.direct},
        lengths=torch.cat(known) if len(known) == len(chunks) else None,
        tokens=longest.tokens,
    )
    for i, (tap, delta) in enumerate(longest.taps):
        out = delta.new_empty(len(rows), *delta.shape[1:])
        start = 0
        for _, factors in chunks:
            part = factors.taps[i][1]
            out[start : start + len(part), : part.shape[1]] = part
            out[start : start + len(part), part.shape[1] :] = 0
            start += len(part)
        joined.taps.append((tap, out))
    return [(rows, joined)]


def _is_prefix(short: Tensor, long: Tensor) -> bool:
    """Equal up to the rounding of a product over fewer rows."""
    head = long[: len(short)]
    if short.shape != head.shape:
        return False
    if not short.is_floating_point():
        return torch.equal(short, head)
    limit = 64 * torch.finfo(short.dtype).eps * float(long.abs().max())
    return bool((short - head).abs().max() <= limit)


def pair_head(one: Factors, other: Factors, add: Callable[[str, Tensor], None]) -> None:
    """The head's part, and the cross terms of a head tied to the embedding."""
    if one.head is not None and other.head is not None:
        products = one.head.rows @ other.head.rows.T
        if one.head.weight is not None:
            add(one.head.weight, products * (_wide(one.head.hidden) @ _wide(other.head.hidden).T))
        if one.head.bias is not None:
            add(one.head.bias, products)
    elif other.head is not None and other.head.weight is not None:
        for tap, delta in one.taps:
            if tap.weight == other.head.weight:
                add(tap.weight, _pair_embedding_head(tap, delta, other.head))
    elif one.head is not None and one.head.weight is not None:
        for tap, delta in other.taps:
            if tap.weight == one.head.weight:
                delta = delta * tap.updated()[:, None]
                add(tap.weight, _pair_embedding_head(tap, delta, one.head).T)


def _pair_embedding_head(tap: Tap, delta: Tensor, head: HeadFactor) -> Tensor:
    """Σ_t v_l[x_t] ⟨δ_m[t], h_l⟩ for the embedding rows of one side and the head of the other."""
    if tap.kind != "embedding":
        raise NotImplementedError(f"{tap.weight} is tied to the head through a {tap.kind} product")
    picked = head.rows[:, tap.activations]  # (L, t)
    projected = _wide(delta) @ _wide(head.hidden).T  # (c, t, L)
    return torch.einsum("mtl,lt->ml", projected, picked)


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
    return ops.gram(tap_o.activations, delta_o, tap_u.activations, delta_u, lengths_o, lengths_u)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------- pulling


@dataclass
class Chunk:
    """Cotangents that travel together: rows of the side, their prefix, their state (c, 1, t, d)."""

    rows: Tensor
    length: int
    state: Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocator's refusal, on GPU or CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class Pullback:
    """Cotangents of one trace on their way from the head to the embeddings.

    Args:
        trace: The stored forward pass.
        rows: Cotangents on the logits, (M, V); row m belongs to trace.positions[m].
        select: Rows to pull back (default: all).
        chunk: Cotangents per chunk; small chunks are truncated tighter, large ones share the
            replay of the segment.

    Use it top-down: `head_factors()` once, then `step(segment)` for segment = B + 1, B, …, 0; each
    step yields (row indices, Factors) per chunk and moves the states one segment down.
    """

    def __init__(self, trace: Trace, rows: Tensor, select: Tensor | None = None, chunk: int = 16):
        self.trace = trace
        self.anatomy: Anatomy = trace.anatomy
        if rows.shape != trace.logits.shape:
            raise ValueError(
                f"cotangents must be (tokens, vocabulary) = {tuple(trace.logits.shape)}, got "
                f"{tuple(rows.shape)}"
            )
        rows = rows.to(trace.logits.dtype)
        self.raw_rows = rows if trace.slope is None else rows * trace.slope
        order = torch.arange(len(rows), device=rows.device) if select is None else select
        order = order[trace.positions[order].argsort(stable=True)]
        self.selected = order
        head = self.anatomy.head
        g = back_project(self.raw_rows[order], head.weight).to(trace.hidden.dtype)
        self.chunks: list[Chunk] = []
        for part, state in zip(order.split(chunk), g.split(chunk), strict=True):
            length = self.anatomy.prefix(trace, int(trace.positions[part].max()) + 1)
            dense = state.new_zeros(len(part), 1, length, state.shape[-1])
            dense[torch.arange(len(part)), 0, trace.positions[part]] = state
            self.chunks.append(Chunk(part, length, dense))

    def head_factors(self) -> Factors:
        """Factors of the head for the selected rows, in position order."""
        anatomy = self.anatomy
        return Factors(
            head=HeadFactor(
                anatomy.head_weight,
                anatomy.head_bias,
                self.trace.hidden[self.selected],
                self.raw_rows[self.selected],
            )
        )

    def step(self, segment: int) -> Iterator[tuple[Tensor, Factors]]:
        """Pulls every chunk through one segment; yields its rows and factors.

        A chunk that does not fit is halved, down to one cotangent, before the allocator's error is
        passed on.
        """
        pending, done = list(self.chunks), []
        while pending:
            chunk = pending.pop(0)
            try:
                state, factors = self._pull(segment, chunk)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(chunk.rows) == 1:
                    raise
                half = len(chunk.rows) // 2
                pending[:0] = [
                    Chunk(chunk.rows[:half], chunk.length, chunk.state[:half].clone()),
                    Chunk(chunk.rows[half:], chunk.length, chunk.state[half:].clone()),
                ]
                del error
                continue
            done.append(Chunk(chunk.rows, chunk.length, state))
            yield chunk.rows, factors
        self.chunks = done

    def _pull(self, segment: int, chunk: Chunk) -> tuple[Tensor, Factors]:
        replay = self.anatomy.replay(self.trace, segment, chunk.length)
        state, factors = pull(replay, chunk.state)
        factors.lengths = self.trace.positions[chunk.rows] + 1
        factors.tokens = chunk.length
        return state, factors


def pull(replay: Replay, cotangents: Tensor) -> tuple[Tensor, Factors]:
    """Cotangents (c, *output.shape) of a replayed segment -> (cotangents of its input, factors)."""
    targets: list[Any] = [tap.edge for tap in replay.taps]
    targets += [edge for _, edge, _ in replay.direct]
    if replay.input is not None:
        targets.append(replay.input)
    if not targets:
        return cotangents, Factors()
    gradients: list[Tensor | None] = [None] * len(targets)
    reached: list[int] = []

    def vjp(cotangent: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(replay.output, targets, cotangent, allow_unused=True)
        reached[:] = [i for i, x in enumerate(found) if x is not None]
        return tuple(x for x in found if x is not None)

    batch = cotangents.view(len(cotangents), *replay.output.shape)
    results = torch.func.vmap(vjp)(batch)
    for i, result in zip(reached, results, strict=True):
        gradients[i] = result
    factors = Factors()
    for tap, gradient in zip(replay.taps, gradients, strict=False):
        if gradient is not None:
            factors.taps.append((tap, gradient.reshape(len(cotangents), -1, tap.width)))
    middle = gradients[len(replay.taps) :]
    for (name, _, _), gradient in zip(replay.direct, middle, strict=False):
        if gradient is not None:
            factors.direct[name] = gradient
    state = gradients[-1] if replay.input is not None else cotangents
    return (torch.zeros_like(cotangents) if state is None else state), factors


def segments_down(anatomy: Anatomy) -> Iterable[int]:
    """Segments from the tail to the lowest one that holds a trainable parameter."""
    return range(len(anatomy.segments) - 1, anatomy.lowest_segment() - 1, -1)


def gradient(anatomy: Anatomy, examples: Sequence[Example], weights: Sequence[Tensor]) -> Gradient:
    """Σ_l w_l ∇θ log π(y_l) over several sequences, by one plain backward pass each.

    The model runs as a whole, without replays, taps or factors: what the factored engine says is
    checked against this. Returns name -> tensor for every trainable parameter.

    Cost: 6 N T FLOPs a sequence; one gradient the size of the trainable parameters.
    """
    total: Gradient = {}
    names = list(anatomy.trainable)
    parameters = list(anatomy.trainable.values())
    for example, weight in zip(examples, weights, strict=True):
        with anatomy.analysis():
            for parameter in parameters:
                parameter.requires_grad_(True)
            logp = anatomy.response_log_probs(example)
            parts = torch.autograd.grad(
                (logp * weight.to(logp.dtype)).sum(), parameters, allow_unused=True
            )
        for name, parameter, part in zip(names, parameters, parts, strict=True):
            part = torch.zeros_like(parameter) if part is None else part
            total[name] = part if name not in total else total[name] + part
    return total
