"""Effects of the tokens of some pairs, in forward mode; exact also where the Gram is sketched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.engine.guard import evaluating
from lddyn.sets.access import Access
from lddyn.sets.pairs import PairSet

__all__ = ["CloseUp", "look_at_tokens"]


@dataclass(frozen=True)
class CloseUp:
    """Exact inner products of the gradients of a pair's tokens with a few directions.

    Attributes:
        own: (3, M + K) ⟨∇ log π(token), d⟩ of the M tokens of y+, then the K of y−, with d = g+, g−
            and the mean g+ of all pairs.
        others: Another pair -> (M' + K',) ⟨∇ log π(its token), g+⟩.
    """

    own: Tensor
    others: Mapping[int, Tensor]


def look_at_tokens(
    access: Access,
    pairs: PairSet,
    mean_chosen: Tensor,
    wanted: Mapping[int, Sequence[int]],
    *,
    progress: bool,
) -> dict[int, CloseUp]:
    """Close-ups of the keys of `wanted`, each also with the tokens of the pairs in its value.

    Args:
        access: The model. Where it cannot be pushed through there are no close-ups.
        pairs: The set.
        mean_chosen: Mean gradient of all chosen responses, (P,).
        wanted: Pair -> other pairs whose tokens are paired with the gradient of its y+.
        progress: Show a bar.

    Cost: a dozen pushes a pair, each about four forward passes.
    """
    if access.unavailable:
        return {}
    close_ups = {}
    for pair, others in tqdm(wanted.items(), desc="tokens", disable=not progress, leave=False):
        with evaluating(access.model), torch.enable_grad():
            own = [access.gradient(example) for example in pairs[pair]]
        close_ups[pair] = CloseUp(
            _inner(access, pairs, pair, [*own, mean_chosen]),
            {j: _inner(access, pairs, j, own[:1])[0] for j in others},
        )
    return close_ups


def _inner(access: Access, pairs: PairSet, pair: int, directions: list[Tensor]) -> Tensor:
    """⟨∇ log π(token), d⟩ of all tokens of a pair, (D, M + K) float64."""
    parts = []
    for example in pairs[pair]:
        trace, moved = access.push(example, directions)
        at = trace.targets[None, :, None].expand(len(moved), -1, 1)
        parts.append(moved.gather(2, at)[:, :, 0])
    return torch.cat(parts, 1).double().cpu()
