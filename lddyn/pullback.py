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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lddyn import ops
from lddyn.anatomy import Anatomy, Replay, Trace, back_project, is_out_of_memory
from lddyn.examples import Example
from lddyn.factors import BodyRows, Factors, HeadFactor, batched_vjp
from lddyn.rowwise import pull_rows

Gradient = dict[str, Tensor]  # parameter name -> tensor of its shape

# 4 GiB; on a GPU, whose kernels want many rows, a third of what is free.
DEFAULT_MEMORY = "auto"
_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_memory(memory: int | str, device: torch.device | None = None) -> int:
    """Bytes of a budget such as "2GiB", "500MB" or a plain number of bytes.

    "auto" is 4 GiB, or a third of the free memory of a GPU where that is more.

    Raises:
        ValueError: If the text is not a positive number followed by a unit.

    Example:
        >>> parse_memory("2GiB")
        2147483648
    """
    if memory == "auto":
        cuda = device is not None and device.type == "cuda"
        return max(_UNITS["GIB"] * 4, torch.cuda.mem_get_info(device)[0] // 3 if cuda else 0)
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


# --------------------------------------------------------------------------- pulling


def reach(position: int, length: int) -> int:
    """Tokens to replay for a cotangent at a position: in steps of 16, for products of few sizes."""
    return min(position // 16 * 16 + 16, length)


@dataclass
class Chunk:
    """Cotangents that travel together: rows of the side, their prefix and their state.

    The state is (c, d), at the tokens' own positions, above the last attention; (c, 1, t, d) below.
    """

    rows: Tensor
    length: int
    state: Tensor


class Pullback:
    """Cotangents of one trace on their way from the head to the embeddings.

    Args:
        trace: The stored forward pass.
        rows: Cotangents on the logits, (M, V); row m belongs to trace.positions[m]. Default: the
            log-prob rows e_y − π, which are formed for the head alone and not kept. Or cotangents
            at the head's input, whose products leave out those of the head with itself.
        select: Rows to pull back (default: all).
        chunk: Cotangents per chunk; small chunks are truncated tighter, large ones share the
            replay of the segment.

    Use it top-down: `head_factors()` once, then `step(segment)` for segment = B + 1, B, …, 0; each
    step yields (row indices, Factors) per chunk and moves the states one segment down.
    """

    def __init__(
        self,
        trace: Trace,
        rows: Tensor | BodyRows | None = None,
        select: Tensor | None = None,
        chunk: int = 16,
    ):
        self.trace = trace
        self.anatomy: Anatomy = trace.anatomy
        count = torch.arange(len(trace.positions), device=trace.positions.device)
        order = count if select is None else select
        order = order[trace.positions[order].argsort(stable=True)]
        self.selected = order
        if isinstance(rows, BodyRows):
            self.head = self._body_head(rows[order])
            g = rows.hidden[order].to(trace.hidden.dtype)
        else:
            self.head = self._logits_head(rows)
            g = back_project(self.head.rows, self.anatomy.head.weight).to(trace.hidden.dtype)
        self.chunks: list[Chunk] = []
        for part, state in zip(order.split(chunk), g.split(chunk), strict=True):
            length = self.anatomy.prefix(
                trace, reach(int(trace.positions[part].max()), trace.length)
            )
            self.chunks.append(Chunk(part, length, state))

    def _logits_head(self, rows: Tensor | None) -> HeadFactor:
        trace, order = self.trace, self.selected
        if rows is None and trace.slope is not None:
            rows = ops.residual(trace.logits, trace.targets)[0]
        if rows is not None and rows.shape != trace.logits.shape:
            raise ValueError(
                f"cotangents must be (tokens, vocabulary) = {tuple(trace.logits.shape)}, got "
                f"{tuple(rows.shape)}"
            )
        logits, targets = trace.logits, trace.targets
        if not torch.equal(order, torch.arange(len(trace.positions), device=order.device)):
            logits, targets = logits[order], targets[order]
        if rows is not None:
            rows = rows[order].to(logits.dtype)
            rows = rows if trace.slope is None else rows * trace.slope[order]
        weight, bias = self.anatomy.head_weight, self.anatomy.head_bias
        return HeadFactor(weight, bias, trace.hidden[order], rows, logits, targets)

    def _body_head(self, rows: BodyRows) -> HeadFactor:
        trace, order = self.trace, self.selected
        weight = self.anatomy.head_weight if self.anatomy.tied else None
        hidden, targets = trace.hidden[order], trace.targets[order]
        return HeadFactor(weight, None, hidden, rows.picked, trace.logits, targets, rows.ids)

    def head_factors(self) -> Factors:
        """Factors of the head for the selected rows, in position order."""
        return Factors(head=self.head)

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
        state = chunk.state
        pulled, routed = None, False
        if state.dim() == 2 and segment >= len(self.anatomy.blocks):
            pulled = pull_rows(self.trace, segment, chunk.rows, chunk.length, state)
        if pulled is None:
            if state.dim() == 2:
                dense = state.new_zeros(len(state), 1, chunk.length, state.shape[-1])
                dense[torch.arange(len(state)), 0, self.trace.positions[chunk.rows]] = state
                state = dense
            replay = self.anatomy.replay(self.trace, segment, chunk.length)
            pulled, routed = pull(replay, state), replay.routed
        state, factors = pulled
        lengths = self.trace.positions[chunk.rows] + 1
        if not routed and factors.in_order(lengths, chunk.length):
            factors.lengths, factors.tokens = lengths, chunk.length
        return state, factors


def pull(replay: Replay, cotangents: Tensor) -> tuple[Tensor, Factors]:
    """Cotangents (c, *output.shape) of a replayed segment -> (cotangents of its input, factors)."""
    targets = replay.targets
    if replay.input is not None:
        targets.append(replay.input)
    if not targets:
        return cotangents, Factors()
    batch = cotangents.view(len(cotangents), *replay.output.shape)
    gradients = batched_vjp([replay.output], targets, [batch])
    state = gradients.pop() if replay.input is not None else cotangents
    factors = Factors.of(replay, gradients, len(cotangents))
    return (torch.zeros_like(cotangents) if state is None else state), factors


def segments_down(anatomy: Anatomy) -> Iterable[int]:
    """Segments from the tail to the lowest one that holds a trainable parameter."""
    return range(len(anatomy.segments) - 1, anatomy.lowest_segment() - 1, -1)


@dataclass(frozen=True)
class TokenFactor:
    """Gradients ∇ log π(y_m) of one parameter for some response tokens m, as factors.

    Attributes:
        name: Canonical parameter name; "[e]" follows for the e-th slice of packed experts.
        kind: What the gradient of token i is: `"linear"`, Σ_t grads[i, t] ⊗ activations[t];
            `"matmul"`, its transpose; `"embedding"`, grads[i, t] added to row activations[t];
            `"whole"`, grads[i] as it is.
        tokens: Which response tokens, (c,) int64.
        activations: (t, d_in); of an embedding token ids (t,); where every token has one row of its
            own, as at the head, (c, d_in); None for a whole gradient.
        grads: (c, t, d_out), or (c, d_out) with rows of their own; zero beyond a token's position.
    """

    name: str
    kind: str
    tokens: Tensor
    activations: Tensor | None
    grads: Tensor

    def dense(self, shape: Sequence[int]) -> Tensor:
        """The gradients formed, (c, *shape), for a parameter of this shape."""
        x, delta = self.activations, self.grads
        if x is None:
            return delta.reshape(len(delta), *shape)
        if self.kind == "embedding":
            out = delta.new_zeros(len(delta), *shape)
            return out.index_add_(1, x, delta)
        x = x.to(delta)
        own = delta.dim() == 2
        out = delta[:, :, None] * x[:, None, :] if own else delta.mT @ x
        return out.mT if self.kind == "matmul" else out


def token_factors(
    model: nn.Module | Anatomy, example: Example, chunk: int = 16
) -> Iterator[TokenFactor]:
    """The gradients of every response token's log-prob, as factors, without forming them.

    One forward pass; all tokens are pulled back block by block, from the head down, so that only
    one block's factors exist at a time if each is used and let go. A parameter that is used twice
    (tied to the head, shared, an expert in two places) comes twice: its gradient is the sum.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        example: The sequence.
        chunk: Tokens that are pulled back together, and come together.

    Yields:
        TokenFactor, for each use of each trainable parameter and each chunk.

    Raises:
        UnsupportedModelError: If the model cannot be opened.

    Cost: 2 N Σ (p_m + 1) FLOPs, N the block-linear parameters; factors of one chunk and block.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> squares = torch.zeros(3)  # ‖∇ log π(y_m)‖², over the weights of products
        >>> for factor in lddyn.token_factors(model, ex):
        ...     if factor.kind == "linear" and factor.grads.dim() == 3:
        ...         x, delta = factor.activations, factor.grads
        ...         squares[factor.tokens] += ((delta @ delta.mT) * (x @ x.T)).sum((1, 2))
        >>> bool((squares > 0).all())
        True
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    trace = anatomy.trace(example)
    pull = Pullback(trace, chunk=chunk)
    head = pull.head
    if head.weight is not None:
        yield TokenFactor(head.weight, "linear", pull.selected, head.hidden, head.rows)
    if head.bias is not None:
        yield TokenFactor(head.bias, "whole", pull.selected, None, head.rows)
    for segment in segments_down(anatomy):
        with anatomy.analysis():
            found = list(pull.step(segment))
        for tokens, factors in found:
            yield from _token_factors(tokens, factors)


def _token_factors(tokens: Tensor, factors: Factors) -> Iterator[TokenFactor]:
    for tap, grads in factors.taps:
        if tap.bias is not None:
            whole = grads.sum(1) if grads.dim() == 3 else grads
            yield TokenFactor(tap.bias, "whole", tokens, None, whole)
        if tap.weight is None:
            continue
        if tap.kind == "embedding" and tap.padding is not None:
            grads = grads * tap.updated()[:, None]
        yield TokenFactor(tap.weight, tap.kind, tokens, tap.activations, grads)
    for name, gradient in factors.direct.items():
        yield TokenFactor(name, "whole", tokens, None, gradient)


def gradient(anatomy: Anatomy, examples: Sequence[Example], weights: Sequence[Tensor]) -> Gradient:
    """Σ_l w_l ∇θ log π(y_l) over several sequences, by one plain backward pass each.

    The model runs as a whole, without replays, taps or factors: what the factored engine says is
    checked against this. Returns name -> tensor for every trainable parameter.

    Cost: 6 N T FLOPs a sequence; one gradient the size of the trainable parameters.
    """
    total: Gradient = {}
    for example, weight in zip(examples, weights, strict=True):
        part = _backward(anatomy, anatomy.response_log_probs, example, weight)
        for name, value in part.items():
            total[name] = value if name not in total else total[name] + value
    return total


def gradient_of_logits(anatomy: Anatomy, example: Example, rows: Tensor) -> Gradient:
    """Σ_l ∇θ ⟨v_l, z_l⟩ for cotangents (L, V) on the logits, by one plain backward pass."""
    return _backward(anatomy, anatomy.response_logits, example, rows)


def gradient_of_hidden(anatomy: Anatomy, example: Example, rows: Tensor) -> Gradient:
    """Σ_l ∇θ ⟨g_l, h_l⟩ for cotangents (L, d) at the head's input, by one plain backward pass."""
    return _backward(anatomy, anatomy.response_hidden, example, rows)


def _backward(
    anatomy: Anatomy, forward: Callable[[Example], Tensor], example: Example, cotangent: Tensor
) -> Gradient:
    parameters = list(anatomy.trainable.values())
    with anatomy.analysis():
        for parameter in parameters:
            parameter.requires_grad_(True)
        value = forward(example)
        scalar = (value * cotangent.to(value.dtype)).sum()
        if not scalar.requires_grad:  # no trainable parameter is on the way
            return {n: torch.zeros_like(p) for n, p in anatomy.trainable.items()}
        parts = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if part is None else part
        for (name, parameter), part in zip(anatomy.trainable.items(), parts, strict=True)
    }
