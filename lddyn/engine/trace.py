"""One stored forward pass, and one segment of it computed again with gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.ledger import Gain, Tap, Work

if TYPE_CHECKING:
    from lddyn.engine.anatomy import Anatomy


@dataclass
class Trace:
    """One stored forward pass: everything a replay needs.

    inputs[i] is the input of block i, (1, T, d); inputs[-1] is the output of the last block.
    hidden (M, d) are the head's inputs at the response positions; logits (M, V) are in float32
    (float64 for a float64 model); slope is d logits / d raw logits, or None when post is identity.
    """

    anatomy: Anatomy
    example: Example
    ids: Tensor
    positions: Tensor
    targets: Tensor
    inputs: list[Tensor]
    hidden: Tensor
    logits: Tensor
    slope: Tensor | None
    work: dict[str, Work]  # what the products of each segment cost
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """T, tokens of the sequence."""
        return self.ids.shape[1]

    def log_probs(self) -> Tensor:
        """Log π(y_m) (M,) of the realised tokens, in nats."""
        log_probs: Tensor = ops.residual(self.logits, self.targets)[1]
        return log_probs

    def at_tokens(self, tokens: Tensor) -> Trace:
        """The same forward pass for cotangents that sit on these response tokens (R,), repeated.

        For cotangents at the head's input: of the logits it keeps the dtype, and no row.
        """
        return replace(
            self,
            positions=self.positions[tokens],
            targets=self.targets[tokens],
            hidden=self.hidden[tokens],
            logits=self.logits[:0],
            slope=None,
        )


@dataclass
class Batch:
    """Sequences in one forward pass, padded on the right to one length, which a replay needs.

    inputs and calls as in `Trace`, with (B, T, d); hidden (B, T, d) are the head's inputs. replays
    are all segments from the front up with their graphs, or none, to be run again by `replay`.
    """

    ids: Tensor
    hidden: Tensor
    inputs: list[Tensor]
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]
    replays: list[Replay]
    apart: bool  # sequences, of which none sees another

    @property
    def length(self) -> int:
        """T, tokens of every sequence."""
        return self.ids.shape[1]


@dataclass
class Replay:
    """A segment recomputed with gradients on."""

    output: Tensor
    input: Tensor | None
    taps: list[Tap]
    direct: list[tuple[str, Any, torch.Size]]  # name, gradient edge, shape
    gains: list[Gain] = field(default_factory=list)
    routed: bool = False  # whether tokens were picked by their values

    @property
    def targets(self) -> list[Any]:
        """What cotangents are pulled back to beside the input: taps, then direct parameters."""
        return [tap.edge for tap in self.taps] + [edge for _, edge, _ in self.direct]
