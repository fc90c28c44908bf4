"""Tangents pushed through one segment, by the transpose of its pullback.

The gradient of u -> pullback(u) is the segment's Jacobian. Reverse mode differentiated once more
has no silent gap: an operation without a second derivative raises, where forward mode may return a
zero tangent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lddyn.engine.ledger import Tap
from lddyn.engine.trace import Replay

HeadNames = tuple[str | None, str | None]  # the head's weight and bias, None where frozen


class Source:
    """A change of the parameters: returns the tangent that it causes at every tap.

    Attributes:
        size: Number of tangents, c.
    """

    size: int

    def tap(self, tap: Tap) -> Tensor | None:
        """Tangent (size, rows, width) of the tap's output, or None for zero."""
        raise NotImplementedError

    def direct(self, name: str) -> Tensor | None:
        """Tangent (size, *shape) of a directly differentiated parameter, or None for zero."""
        raise NotImplementedError

    def head(self, hidden: Tensor, names: HeadNames) -> Tensor | None:
        """Tangent (size, M, V) of W h + b caused by the head's own weight and bias, or None."""
        raise NotImplementedError


@dataclass
class Linearized:
    """A replayed segment together with its pullback of one symbolic cotangent u."""

    replay: Replay
    u: Tensor
    gradients: tuple[Tensor | None, ...]  # of the taps, the direct parameters, the input


def linearize(replay: Replay) -> Linearized:
    """Builds the graph u -> pullback(u); its own pullback is the segment's Jacobian."""
    u = torch.zeros_like(replay.output).requires_grad_(True)
    gradients = torch.autograd.grad(
        replay.output,
        replay.targets,  # type: ignore[arg-type]  # edges and tensors may be mixed
        grad_outputs=u,
        create_graph=True,
        allow_unused=True,
    )
    return Linearized(replay, u, gradients)


def push(linear: Linearized, source: Source, state: Tensor | None) -> Tensor | None:
    """Tangent (c, 1, t, d) of a segment's output from that of its input (None: zero)."""
    replay = linear.replay
    tangents: list[Tensor | None] = [source.tap(tap) for tap in replay.taps]
    tangents += [source.direct(name) for name, _, _ in replay.direct]
    if replay.input is not None:
        tangents.append(state)
    shapes: list[Any] = [tap.shape for tap in replay.taps]
    shapes += [shape for _, _, shape in replay.direct]
    if replay.input is not None:
        shapes.append(replay.input.shape)
    outputs, kept = [], []
    for gradient, tangent, shape in zip(linear.gradients, tangents, shapes, strict=True):
        if gradient is not None and tangent is not None and gradient.requires_grad:
            outputs.append(gradient)
            kept.append(tangent.reshape(len(tangent), *shape).to(gradient.dtype))
    if not outputs:
        return None

    def jvp(*tangents: Tensor) -> Tensor:
        return torch.autograd.grad(outputs, linear.u, tangents, retain_graph=True)[0]

    if all(len(tangent) == 1 for tangent in kept):  # vmap would cost more than a small product
        return jvp(*(tangent[0] for tangent in kept))[None]
    out: Tensor = torch.func.vmap(jvp)(*kept)
    return out
