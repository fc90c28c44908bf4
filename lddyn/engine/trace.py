"""What forward passes and replays store.

A Trace is the forward pass of one sequence, a Batch that of several; both hold what is needed to
compute any segment of the model again. A Replay is such a segment, with its graph and its taps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.blocks import Call
from lddyn.engine.ledger import Gain, Tap, Work

if TYPE_CHECKING:
    from lddyn.engine.anatomy import Anatomy


@dataclass
class Trace:
    """One stored forward pass: everything a replay needs.

    Attributes:
        anatomy: The model.
        example: The sequence, of T tokens.
        ids: Its token ids, (1, T).
        positions: Of the M counted response tokens' logits, (M,).
        targets: The response tokens themselves, (M,).
        inputs: inputs[i] is the input of block i, (1, T, d); inputs[-1] the last block's output.
        hidden: The head's inputs at the positions, (M, d).
        logits: (M, V) in float32, or float64 for a float64 model.
        slope: ∂ logits / ∂ (W h + b), (M, V); None where the model returns W h + b.
        work: What the products of each segment cost.
        calls: By length of a prefix, the arguments of every block besides the hidden state.
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
    work: dict[str, Work]
    calls: dict[int, list[Call]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """T, tokens of the sequence."""
        return self.ids.shape[1]

    def log_probs(self) -> Tensor:
        """Log π(y_m) (M,) of the realised tokens, in nats."""
        log_probs: Tensor = ops.residual(self.logits, self.targets)[1]
        return log_probs

    def at_tokens(self, tokens: Tensor) -> Trace:
        """The same forward pass with these response tokens (R,), which may repeat, as its rows.

        It is for cotangents at the head's input, so it has no logits, only their dtype.
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
    """The stored forward pass of B sequences, padded on the right to T tokens.

    Attributes:
        ids: Token ids, (B, T).
        hidden: The head's inputs, (B, T, d).
        inputs: As in `Trace`, (B, T, d).
        calls: As in `Trace`.
        replays: All segments from the front up with their graphs; empty if these are not kept.
        apart: True if the sequences do not attend to each other, and gradients of gains are taken
            sequence by sequence.
    """

    ids: Tensor
    hidden: Tensor
    inputs: list[Tensor]
    calls: dict[int, list[Call]]
    replays: list[Replay]
    apart: bool

    @property
    def length(self) -> int:
        """T, tokens of every sequence."""
        return self.ids.shape[1]


class Direct(NamedTuple):
    """A parameter that a replay differentiates as a tensor of its own."""

    name: str
    edge: GradientEdge
    shape: torch.Size


@dataclass
class Replay:
    """A segment computed again with gradients on.

    Attributes:
        output: Its output, with the graph.
        input: Its input, a leaf; None for the front.
        taps: Products with trainable weights, in the order in which they ran.
        direct: Parameters with gradients of their own.
        gains: Norms with trainable parameters.
        routed: True if the segment picked tokens by their values, as a mixture of experts does.
    """

    output: Tensor
    input: Tensor | None
    taps: list[Tap]
    direct: list[Direct]
    gains: list[Gain] = field(default_factory=list)
    routed: bool = False

    @property
    def targets(self) -> list[GradientEdge | Tensor]:
        """Where cotangents are pulled back to: taps, direct parameters, and the input."""
        edges: list[GradientEdge | Tensor] = [tap.edge for tap in self.taps]
        edges += [direct.edge for direct in self.direct]
        return edges if self.input is None else [*edges, self.input]
