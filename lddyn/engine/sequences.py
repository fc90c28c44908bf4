"""Gradients of whole sequences, ∇ Σ_m w_m log π(y_m), as factors, many sequences in a batch.

Sequences of nearly one length are padded on the right and share a forward and a backward pass.
In a causal model padding changes nothing before it, and its own cotangents are zero; the gradient
of a weight, Σ_t δ[t] ⊗ x[t], is a sum over the sequences' rows. Every product is called once for
each sequence, with the shape that it has alone, so that the bits of a row do not depend on the rest
of its batch.

No architecture is assumed. The results of a small batch must equal those of each sequence alone, on
a CPU to the bit. If they differ, as in models that send tokens to experts, a batch has one
sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.backward_check import check_pull
from lddyn.engine.factors import Factors, HeadFactor
from lddyn.engine.guard import undisturbed
from lddyn.engine.pullback import segments_down
from lddyn.engine.trace import Batch, Replay
from lddyn.engine.trial import REPLAYED, Trial, UnfitError, close
from lddyn.errors import UnsupportedModelError

_STEP = 16  # lengths are padded to multiples: products of few shapes, and more in a batch

# --------------------------------------------------------------------------- batches


def batches(
    anatomy: Anatomy, examples: Sequence[Example], size: int
) -> Iterator[tuple[int, list[int]]]:
    """Which examples share a pass, and of how many tokens.

    A sequence is cut after its last counted token, rounded up to 16. It keeps all of its tokens and
    gets a pass of its own if the model does not keep sequences apart, or if later tokens change
    what earlier ones see (rotary embeddings that rescale).

    Args:
        anatomy: The model.
        examples: The sequences.
        size: Most of them in one pass.

    Yields:
        The length of a pass in tokens, and the indices of its examples.
    """
    if examples:
        check_pull(anatomy, examples[0])
    limit = anatomy.max_positions or math.inf
    size, apart = (size, True) if keeps_apart(anatomy) else (1, False)
    together: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        length = _padded(example.positions[-1] + 1)
        longest = max(length, _padded(example.length))
        # Not of one token: angles at the first position are zero, however they are scaled.
        shortest = max(2, length - _STEP + 1)
        fits = apart and longest <= limit and anatomy.extends(shortest, longest)
        together.setdefault(length if fits else example.length, []).append(i)
    for length, index in together.items():
        for start in range(0, len(index), size):
            yield length, index[start : start + size]


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def pass_together(
    anatomy: Anatomy,
    examples: Sequence[Example],
    length: int,
    keep: bool,
    apart: bool | None = None,
) -> Batch:
    """The forward pass of examples that are padded, or cut, to one length.

    Args:
        anatomy: The model.
        examples: The sequences; more than one only where the model keeps sequences apart.
        length: Tokens of each row.
        keep: As in `Anatomy.batch`.
        apart: Whether gradients of directly used parameters are taken sequence by sequence.
            Default: whether the model keeps sequences apart.
    """
    check_pull(anatomy, examples[0])
    together = not anatomy.joined and APART.verdict(anatomy, "") is True
    for example in examples:
        anatomy.check_limits(example)
        if not together:
            anatomy.trace(example)  # an expert that it alone reaches enters the ledger
    rows = [list(e.ids[:length]) + [e.ids[0]] * (length - e.length) for e in examples]
    ids = torch.tensor(rows, device=anatomy.device)
    return anatomy.batch(ids, together if apart is None else apart, keep)


@undisturbed
def keeps_apart(anatomy: Anatomy) -> bool:
    """Whether the sequences of a batch have the gradients that each has alone.

    On a CPU, to the bit. Call after a `trace`. The first call costs passes over two sequences of 16
    tokens; the verdict is remembered.
    """
    return not anatomy.joined and APART.passes(anatomy, "", lambda: _check_apart(anatomy))


APART = Trial("the sequences of a batch keep apart", tolerant=True)


def _check_apart(anatomy: Anatomy) -> bool:
    count = min(_STEP, anatomy.max_positions or _STEP)
    ids = torch.arange(2 * count, device=anatomy.device).view(2, count) % anatomy.vocabulary
    pair = _probe(anatomy, ids, apart=True)
    alone = _probe(anatomy, ids[:1], apart=False)
    if not all(map(_agree, alone, pair)):
        raise UnfitError("a sequence has other gradients beside another one")
    if ids.device.type == "cpu":  # a GPU's bits differ from run to run
        single = _probe(anatomy, ids[:1], apart=True)
        if not all(map(_same_bits, single, pair)):
            raise UnfitError("a sequence's gradients are rounded otherwise beside another one")
    return True


def _probe(anatomy: Anatomy, ids: Tensor, apart: bool) -> list[Factors]:
    """Factors of all segments for cotangents that differ from entry to entry."""
    with anatomy.analysis():
        batch = anatomy.batch(ids, apart, keep=not anatomy.streamed)
        size = batch.hidden[0].numel()
        entries = torch.linspace(-1, 1, size, device=ids.device).view_as(batch.hidden[0])
        state = (entries + torch.zeros_like(batch.hidden)).to(batch.hidden)
        parts = []
        for segment in segments_down(anatomy):
            replay = _segment(anatomy, batch, segment)
            if replay.routed and apart:
                raise UnfitError("it picks tokens by their values")
            state, factors = _pull_apart(replay, state, apart)
            parts.append(factors)
    return parts


def _same_bits(alone: Factors, pair: Factors) -> bool:
    """Whether a sequence has bitwise the same factors alone and beside another one.

    Matrix products of the model's own attention, for example, may be rounded otherwise in a batch.
    """
    return _agree(alone, pair, torch.equal)


def _agree(
    alone: Factors, pair: Factors, same: Callable[[Tensor, Tensor], bool] | None = None
) -> bool:
    """Whether the first sequence of two has the factors that it has alone, by default nearly."""
    if len(alone.taps) != len(pair.taps) or alone.direct.keys() != pair.direct.keys():
        return False
    one = [alone.direct[name][0] for name in alone.direct]
    two = [pair.direct[name][0] for name in alone.direct]
    for (tap, delta), (other, moved) in zip(alone.taps, pair.taps, strict=True):
        one += [tap.activations[0], delta[0]]
        two += [other.activations[0], moved[0]]
    same = same or _close
    return all(x.shape == y.shape and same(x, y) for x, y in zip(one, two, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return close(other, one, REPLAYED.of(one.dtype))


# --------------------------------------------------------------------------- pulling


def pull_sequences(
    anatomy: Anatomy, examples: Sequence[Example], weights: Sequence[Tensor | None], batch: Batch
) -> Iterator[tuple[Tensor, Factors]]:
    """Factors of one cotangent a sequence, the sum of its tokens', from the head down.

    Args:
        anatomy: The model.
        examples: The sequences of the batch.
        weights: Of each one's tokens (M,), or None for ones.
        batch: Their forward pass; what it keeps is given up on the way.

    Yields (sequences, Factors): of the head for one sequence, a row for each of its tokens; of a
    segment for all, with own rows of activations: (B, T, d_in) and (B, T, d_out).

    Cost: one plain backward pass, and a replay of each segment where none are kept.
    """
    state = torch.zeros_like(batch.hidden)
    everyone = torch.arange(len(state), device=state.device)
    for i, (example, weight) in enumerate(zip(examples, weights, strict=True)):
        positions = torch.tensor(example.positions, device=state.device)
        head = _head(anatomy, batch.hidden[i, positions], example, weight)
        g = anatomy.head.back_project(head.rows)
        state[i].index_add_(0, positions, g.to(state.dtype))
        yield everyone[i : i + 1], Factors(head=head)
        del head, g
    for segment in segments_down(anatomy):
        state, factors = _pull_apart(_segment(anatomy, batch, segment), state, batch.apart)
        yield everyone, factors


def _segment(anatomy: Anatomy, batch: Batch, segment: int) -> Replay:
    """The next segment from the top: as the pass kept it, or else replayed."""
    return batch.replays.pop() if batch.replays else anatomy.replay(batch, segment, batch.length)


def _head(anatomy: Anatomy, hidden: Tensor, example: Example, weight: Tensor | None) -> HeadFactor:
    logits, slope = anatomy.head_logits(hidden)
    if not math.isfinite(float(logits.sum())):
        anatomy.trace(example)  # says what is not finite
    targets = torch.tensor(example.targets, device=hidden.device)
    rows = ops.residual(logits, targets)[0]
    if weight is not None:
        rows = rows * weight[:, None]
    if slope is not None:
        rows = rows * slope
    names = anatomy.head_weight, anatomy.head_bias
    return HeadFactor(*names, anatomy.head.own(hidden), rows, logits, targets)


def _pull_apart(replay: Replay, state: Tensor, apart: bool) -> tuple[Tensor, Factors]:
    """Pulls one cotangent for each sequence of a batch (B, T, d) through a segment."""
    targets: list[Any] = [tap.edge for tap in replay.taps]
    targets += [x.edge for x in (replay.gains if apart else replay.direct)]
    if replay.input is not None:
        targets.append(replay.input)
    if not targets:
        return state, Factors()
    gradients = torch.autograd.grad(replay.output, targets, state, allow_unused=True)
    below = gradients[-1] if replay.input is not None else state
    factors, count = Factors(), len(state)
    for tap, delta in zip(replay.taps, gradients, strict=False):
        if delta is not None:
            if count > 1 and len(tap.activations) != count * state.shape[1]:
                raise UnsupportedModelError(
                    f"{tap.weight or tap.bias} met {len(tap.activations)} rows in a batch of "
                    f"{count} sequences of {state.shape[1]} tokens, so they cannot be told apart: "
                    "give chunk=1"
                )
            x = tap.activations.view(count, -1, *tap.activations.shape[1:])
            factors.taps.append((replace(tap, activations=x), delta.reshape(count, -1, tap.width)))
    rest = gradients[len(replay.taps) :]
    for (name, _, _), gradient in zip(() if apart else replay.direct, rest, strict=False):
        if gradient is not None:
            factors.direct[name] = gradient[None]
    for gain, gradient in zip(replay.gains if apart else (), rest, strict=False):
        if gradient is None:
            continue
        rows, normalized = (x.reshape(count, -1, x.shape[-1]) for x in (gradient, gain.normalized))
        if gain.weight is not None:
            factors.add_direct(gain.weight, (rows * normalized).sum(1))
        if gain.bias is not None:
            factors.add_direct(gain.bias, rows.sum(1))
    return (torch.zeros_like(state) if below is None else below), factors
