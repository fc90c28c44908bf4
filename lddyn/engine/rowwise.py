"""Pulling one row for each cotangent through the tail and the last block's upper part.

Above the last attention a cotangent lives on one position, so its factors there are rank one.

The tail, and the top block from its attention output upwards, act on every position by itself. A
cotangent of the token at p is pulled through them as one row of a plain backward pass, not as one
of c cotangents over t positions; only what it sends to keys and values spreads over t <= p. For B
blocks this saves about 1/B of the whole pullback.

Nothing is assumed of the architecture: the rows are replayed from the gathered rows of the block's
input and arguments, and must give the rows of the forward pass. A block that does not attend once
through `layers.attention`, or that routes its tokens, is pulled back over all positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lddyn.engine import layers
from lddyn.engine.factors import Factors, batched_vjp
from lddyn.engine.guard import undisturbed
from lddyn.engine.ledger import Gain
from lddyn.engine.trace import Replay, Trace
from lddyn.engine.trial import REPLAYED, Trial, UnfitError, close
from lddyn.memory import is_out_of_memory

ROWWISE = Trial("a segment acts on every position by itself")


def pull_rows(
    trace: Trace, segment: int, rows: Tensor, length: int, state: Tensor
) -> tuple[Tensor, Factors] | None:
    """Pulls one row per cotangent through the tail or the last block.

    Args:
        trace: The stored forward pass.
        segment: The tail, or the last block.
        rows: Response tokens (c,) whose cotangents these are.
        length: Tokens of the prefix that holds all of them.
        state: Cotangents (c, d) of the segment's output, at the tokens' own positions.

    Returns:
        For the tail, the cotangents (c, d) of its input; for the block those over the whole prefix,
        (c, 1, length, d); and the factors. None if the segment does not act row by row.
    """
    anatomy = trace.anatomy
    label = anatomy.segments[segment]
    pull = _tail if segment == len(anatomy.segments) - 1 else _last_block
    return ROWWISE.attempt(anatomy, label, lambda: pull(trace, segment, rows, length, state))


@dataclass(frozen=True)
class Spread:
    """The part of the last block that is pulled back over all positions, of its products.

    Attributes:
        flops: As a fraction of their FLOPs.
        width: As a fraction of their output elements.
    """

    flops: float = 1.0
    width: float = 1.0


@undisturbed
def spread(trace: Trace) -> Spread:
    """Which fraction of the last block acts on more than a cotangent's own position.

    Cost: a replay of the last block, and the pullback of one cotangent through tail and last block.
    """
    anatomy = trace.anatomy
    if anatomy.joined:
        return Spread()
    last, tail = len(anatomy.blocks), len(anatomy.blocks) + 1
    rows = torch.zeros(1, dtype=torch.long, device=anatomy.device)
    length = anatomy.prefix(trace, int(trace.positions[0]) + 1)
    with anatomy.analysis():
        pulled = pull_rows(trace, tail, rows, length, torch.zeros_like(trace.hidden[:1]))
        if pulled is not None:
            pulled = pull_rows(trace, last, rows, length, pulled[0])
        if pulled is None:
            return Spread()
        parts = [(tap, delta) for tap, delta in pulled[1].taps if delta.dim() == 3]
    work = trace.work[anatomy.segments[last]]
    flops = sum(2 * tap.activations.shape[-1] * tap.width for tap, _ in parts)
    width = sum(tap.width for tap, _ in parts)
    return Spread(flops * trace.length / work.linear, width * trace.length / work.width)


def _tail(
    trace: Trace, segment: int, rows: Tensor, length: int, state: Tensor
) -> tuple[Tensor, Factors]:
    replay = _replay_rows(trace, segment, rows, length)
    assert replay.input is not None
    if replay.input.dim() != 3:
        raise UnfitError("its input has several streams")
    gradients = _backward(replay, replay.output, state[None], 1, [replay.input])
    moved = gradients[-1]
    assert moved is not None
    return moved[0], _factors(replay, gradients[:-1], {})


def _last_block(
    trace: Trace, segment: int, rows: Tensor, length: int, state: Tensor
) -> tuple[Tensor, Factors]:
    anatomy = trace.anatomy
    positions = trace.positions[rows]
    keys: list[tuple[Tensor, Tensor]] = []
    attended: list[tuple[Tensor, layers.Rows]] = []

    def keep_keys(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        keys.append((key, value))
        raise layers.Stopped

    def attend_rows(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        key, value = (x.detach().squeeze(0) for x in keys[0])
        if mask is None or mask.shape[-2:] != (len(rows), key.shape[1]):
            raise UnfitError("the attention's mask has no row for each token")
        some = layers.Rows(query.detach().squeeze(0), key, value, mask[0], scale, softcap)
        attended.append((query, some))
        return some.output.transpose(0, 1).unsqueeze(0)

    # What the keys and values of the whole prefix are made of; then the rows above them.
    with layers.intercepted(keep_keys):
        below = anatomy.replay(trace, segment, length)
    if len(keys) != 1 or below.input is None:
        raise UnfitError(f"it attends {len(keys)} times by lddyn's attention, not once")
    with layers.intercepted(attend_rows):
        above = _replay_rows(trace, segment, rows, length)
    if len(attended) != 1 or above.input is None:
        raise UnfitError(f"on single rows it attends {len(attended)} times, not once")
    query, middle = attended[0]
    # From the block's output down to the attention's, then from its queries to the block's input.
    first = _backward(above, above.output, state[None], 1, [above.input, middle.output])
    grad_output = first.pop()
    if grad_output is None:
        raise UnfitError("its output does not depend on its attention")
    grad_query, grad_key, grad_value = middle.pull(grad_output)
    second = _backward(above, query, grad_query.unsqueeze(0), 2, [above.input])
    gradients = [
        y if x is None else x if y is None else x + y for x, y in zip(first, second, strict=True)
    ]
    below_gradients = batched_vjp(
        keys[0], below.targets, (grad_key.unsqueeze(1), grad_value.unsqueeze(1))
    )
    moved = below_gradients.pop()
    if moved is None:
        moved = state.new_zeros(len(rows), *below.input.shape)
    own = gradients.pop()
    if own is not None:
        moved[torch.arange(len(rows)), 0, positions] += own[0]
    factors = _factors(above, gradients, _token_axes(below.gains, above.gains))
    lower = Factors.of(below, below_gradients, len(rows))
    factors.taps += lower.taps
    for name, gradient in lower.direct.items():
        factors.add_direct(name, gradient)
    return moved, factors


def _replay_rows(trace: Trace, segment: int, rows: Tensor, length: int) -> Replay:
    """The segment on these rows alone.

    Raises:
        UnfitError: If the rows are not those of the forward pass.
    """
    anatomy = trace.anatomy
    label = anatomy.segments[segment]
    positions = trace.positions[rows]
    try:
        replay = anatomy.replay(trace, segment, length, positions)
    except (RuntimeError, IndexError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        # The model's code takes its tokens for a whole sequence.
        raise UnfitError(f"its code refuses single rows: {error}") from error
    whole = all(
        tap.kind != "embedding"
        and "[" not in f"{tap.weight}{tap.bias}"  # packed experts
        and len(tap.activations) == len(rows)
        for tap in replay.taps
    )
    scaled = {name for gain in replay.gains for name in (gain.weight, gain.bias)}
    direct = {n for n in anatomy.direct if label in anatomy.ledger[n].segments}
    if replay.routed or not whole or not direct <= scaled:
        raise UnfitError("it routes tokens, or uses a parameter in another way than by row")
    last = segment == len(anatomy.segments) - 1
    expected = trace.hidden[rows] if last else trace.inputs[segment][0, positions]
    output = replay.output.detach().reshape(-1, replay.output.shape[-1])
    if output.shape != expected.shape or not _same_rows(output, expected):
        raise UnfitError("single rows have another output than in the whole sequence")
    return replay


def _same_rows(value: Tensor, expected: Tensor) -> bool:
    limit = REPLAYED.of(value.dtype)
    return close(value.flatten(1), expected.flatten(1), limit, by_row=True)


def _backward(
    replay: Replay, output: Tensor, grad: Tensor, axis: int, inputs: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of the replay's taps, of its gains, and of some inputs; cotangents along an axis.

    Row m of a tap must belong to cotangent m. Weighting the cotangents shows it: a block that sorts
    or mixes its tokens inside, whatever it calls, does not return the same weights row by row.
    """
    targets: list[Any] = [tap.edge for tap in replay.taps]
    targets += [gain.edge for gain in replay.gains]
    count = grad.shape[axis]
    shape = [count if i == axis else 1 for i in range(grad.dim())]
    weights = torch.linspace(0.5, 1.5, count, device=grad.device).to(grad.dtype)
    plain, weighted = (
        torch.autograd.grad(
            output, [*targets, *inputs], g.view_as(output), retain_graph=True, allow_unused=True
        )
        for g in (grad, grad * weights.view(shape))
    )
    for tap, one, other in zip(replay.taps, plain, weighted, strict=False):
        if one is None:
            continue
        rows, moved = (x.reshape(-1, tap.width) for x in (one, other))
        if len(rows) != count or not _same_rows(moved, rows * weights[:, None]):
            raise UnfitError(f"{tap.weight or tap.bias} does not act row by row")
    return list(plain)


def _token_axes(below: list[Gain], above: list[Gain]) -> dict[str | None, int]:
    """Which axis of a norm's input runs over tokens: the one that shrank with the rows.

    Norms of queries and keys see heads before or after the tokens.
    """
    axes: dict[str | None, int] = {}
    for one, other in zip(below, above, strict=False):
        shapes = zip(one.normalized.shape, other.normalized.shape, strict=True)
        changed = [axis for axis, (long, short) in enumerate(shapes) if long != short]
        if one.normalized.dim() > 3 and len(changed) == 1:
            axes[other.weight] = changed[0]
    return axes


def _factors(
    replay: Replay, gradients: list[Tensor | None], axes: dict[str | None, int]
) -> Factors:
    """Rank-one factors of the taps, and the gradients of gains and biases, row by row."""
    factors = Factors()
    for tap, gradient in zip(replay.taps, gradients, strict=False):
        if gradient is not None:
            factors.taps.append((tap, gradient.reshape(-1, tap.width)))
    for gain, gradient in zip(replay.gains, gradients[len(replay.taps) :], strict=True):
        if gradient is None or gain.weight is gain.bias is None:
            continue
        shape = gradient.shape
        known = gain.weight in axes or len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
        axis = axes.get(gain.weight, len(shape) - 2)
        if not known or shape[axis] != replay.output.shape[1]:
            raise UnfitError(f"the axis of the tokens in {gain.weight or gain.bias} is unclear")
        rows, normalized = (
            x.movedim(axis, 0).reshape(x.shape[axis], -1, x.shape[-1])
            for x in (gradient, gain.normalized)
        )
        if gain.weight is not None:
            factors.add_direct(gain.weight, (rows * normalized).sum(1))
        if gain.bias is not None:
            factors.add_direct(gain.bias, rows.sum(1))
    return factors
