"""Effects of the tokens of some pairs, in forward mode; exact also where the Gram is sketched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.guard import evaluating
from lddyn.engine.trace import Trace
from lddyn.ranks import ALONE, Ranks
from lddyn.sets.access import Access
from lddyn.sets.bar import Bar
from lddyn.sets.pairs import Pair, PairSet
from lddyn.sets.readings import lbk_of_pair

__all__ = ["CLOSE_UP", "LBK", "CloseUp", "lbk_of_pairs", "look_at_tokens"]

CLOSE_UP, LBK = 40, 8  # costs of a pair, in forward passes of one sequence


@dataclass(frozen=True)
class CloseUp:
    """Exact inner products of the gradients of a pair's tokens with a few directions.

    Attributes:
        own: (3, M + K) ⟨∇ log π(token), d⟩ of the M tokens of y+, then the K of y−, with d = g+, g−
            and the mean g+ of all pairs.
        others: Another pair -> (M' + K',) ⟨∇ log π(its token), g+⟩.
        lbk: LBK of a step on y− at y+.
    """

    own: Tensor
    others: Mapping[int, Tensor]
    lbk: float


def look_at_tokens(
    access: Access,
    pairs: PairSet,
    mean_chosen: Tensor,
    wanted: Mapping[int, Sequence[int]],
    bar: Bar,
    ranks: Ranks = ALONE,
) -> dict[int, CloseUp]:
    """Close-ups of the keys of `wanted`, each also with the tokens of the pairs in its value.

    Args:
        access: The model. Where it cannot be pushed through there are no close-ups.
        pairs: The set.
        mean_chosen: Mean gradient of all chosen responses, (P,).
        wanted: Pair -> other pairs whose tokens are paired with the gradient of its y+.
        bar: Advanced by `CLOSE_UP` for each pair, in all processes.
        ranks: Processes that divide the pairs.

    Cost: two gradients and up to eight pushes a pair, each push about four forward passes.
    """
    if access.unavailable:
        return {}
    bar.say("tokens")

    def look(pair: int) -> tuple[list[list[float]], list[list[float]], float]:
        with evaluating(access.model), torch.enable_grad():
            up, down = (access.gradient(example) for example in pairs[pair])
        own, bound = _own(access, pairs[pair], [up, down, mean_chosen])
        others = [
            torch.cat([_inner(access, e, [up])[0][0] for e in pairs[j]]).tolist()
            for j in wanted[pair]
        ]
        bar.advance(CLOSE_UP * ranks.world)
        return own.tolist(), others, bound

    close_ups = {}
    for pair, (own, others, bound) in zip(wanted, ranks.map(look, list(wanted)), strict=True):
        lists = zip(wanted[pair], others, strict=True)
        close_ups[pair] = CloseUp(
            torch.tensor(own, dtype=torch.float64),
            {j: torch.tensor(values, dtype=torch.float64) for j, values in lists},
            bound,
        )
    return close_ups


def lbk_of_pairs(access: Access, pairs: PairSet, bar: Bar, ranks: Ranks = ALONE) -> Tensor:
    """LBK of a step on y− at y+, for every pair (N,); NaN where the model cannot be pushed through.

    Cost: a gradient, a push and a forward pass a pair, which the processes divide: about eight
    forward passes.
    """
    if access.unavailable:
        return torch.full((len(pairs),), math.nan, dtype=torch.float64)
    bar.say("LBK")

    def bound(pair: Pair) -> float:
        with evaluating(access.model), torch.enable_grad():
            down = access.gradient(pair[1])
        _, trace, change = _inner(access, pair[0], [down])
        bar.advance(LBK * ranks.world)
        return _bound(access, pair[1], trace, change[0])

    return torch.tensor(ranks.map(bound, list(pairs)), dtype=torch.float64)


def _own(access: Access, pair: Pair, directions: list[Tensor]) -> tuple[Tensor, float]:
    """⟨∇ log π(token), d⟩ of all tokens of a pair, (D, M + K) float64, and LBK of y− at y+."""
    chosen, trace, change = _inner(access, pair[0], directions)
    rejected, *_ = _inner(access, pair[1], directions)
    return torch.cat([chosen, rejected], 1), _bound(access, pair[1], trace, change[1])


def _inner(
    access: Access, example: Example, directions: list[Tensor]
) -> tuple[Tensor, Trace, Tensor]:
    """⟨∇ log π(token), d⟩ of a response's tokens, (D, M) float64, and the push that it is from."""
    trace, moved = access.push(example, directions)
    at = trace.targets[None, :, None].expand(len(moved), -1, 1)
    return moved.gather(2, at)[:, :, 0].double().cpu(), trace, moved


def _bound(access: Access, rejected: Example, trace: Trace, change: Tensor) -> float:
    """LBK from the change of log π of all tokens along the gradient of y−."""
    other = access.anatomy.trace(rejected)
    return lbk_of_pair(change, trace.logits, other.logits, other.targets)
