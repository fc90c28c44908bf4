"""How steps of a run move log-probs while gradients stay as they are.

One step on the batch B, whose loss has the derivatives w_j = ∂L_B/∂ log π(y_j), has the gradient
g = Σ_j w_j ∇θ log π(y_j). `AdamMotion` follows Adam's own two moments of g, number by number; it
needs the gradients of all sequences. `GramMotion` needs their inner products alone:

    Δ log π = −rate K w,      K = J P Jᵀ

J holds the gradients of all S = sides · N sequences; P is 1 for SGD, and for Adam one diagonal
1/(√v + ε), rescaled as gradients grow or shrink: ‖g‖² = wᵀ J Jᵀ w of each step is known.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.engine.sharded import WHOLE, Shards
from lddyn.sets.flat import Flat
from lddyn.sets.resumed import OptimizerState
from lddyn.sets.run import Run

__all__ = ["AdamMetric", "AdamMotion", "GramMotion", "Motion"]

_BLOCK = 1 << 20  # parameters of which temporaries are made at a time


@dataclass(frozen=True)
class AdamMetric:
    """What a simulated run needs of Adam's diagonal P at the start.

    Attributes:
        gram: J P Jᵀ, (S, S) float64, laid out as the Gram.
        second_moment: Σ v, the sum of Adam's second moment at the start over all parameters.
    """

    gram: Tensor
    second_moment: float


class Motion(ABC):
    """The optimizer of a run. Moments are kept between segments; `net` and `shrunk` start at 0.

    Args:
        run: Settings of the run.
        made: Steps that the optimizer has made before.

    Attributes:
        net: c (sides, N): the moments' coefficients times rates, summed over steps.
        shrunk: Σ rate · weight decay.
    """

    def __init__(self, run: Run, made: int = 0) -> None:
        self.run, self.made = run, made
        self.net, self.shrunk = torch.zeros(0).double(), 0.0
        self._moment = torch.zeros(0).double()
        self._shrinks: Tensor | None = None

    def _begin(self, shape: torch.Size, shrinks: Tensor | None) -> None:
        """A new segment; `shrinks` is ⟨∇θ log π, D θ⟩ (S,), for weight decay."""
        self.net, self.shrunk, self._shrinks = torch.zeros(shape).double(), 0.0, shrinks
        if self._moment.shape != shape:
            self._moment = torch.zeros(shape).double()

    @abstractmethod
    def square(self, c: Tensor) -> float:
        """‖Σ_j c_j ∇θ log π(y_j)‖² of coefficients (sides, N) that `step` gets next."""

    def step(self, c: Tensor, clip: float, square: float, rate: float, number: int) -> Tensor:
        """Makes a step.

        Args:
            c: −w (sides, N), before clipping.
            clip: Factor by which the gradient is clipped.
            square: `square(c)`.
            rate: Learning rate.
            number: Steps of the simulated run that were made before.

        Returns:
            Δ log π (sides, N) since the segment began.
        """
        momentum = self.run.momentum
        fresh = clip if self.run.optimizer == "sgd" else (1 - momentum) * clip
        self._moment = momentum * self._moment + fresh * c
        moved = self._move(clip, clip**2 * square, rate, number + 1 + self.made)
        self.shrunk += rate * self.run.weight_decay
        if self._shrinks is not None:
            moved = moved - self.shrunk * self._shrinks
        return moved.view_as(c)

    @abstractmethod
    def _move(self, clip: float, square: float, rate: float, count: int) -> Tensor:
        """J Δθ (S,) since the segment began, without decay; adds to `net`.

        `count` is that of the optimizer's steps, this one included.
        """


class GramMotion(Motion):
    """Steps of SGD, or of Adam with one diagonal P, by inner products of gradients.

    Cost: 2 S² a step.

    Args:
        run: Settings of the run.
        made: Steps that the optimizer has made before.
        second_moment: Σ v before the run, not corrected for its start.

    Attributes:
        history: h: Δθ of the segment has the part P h m, with m the first moment before the run.
    """

    def __init__(self, run: Run, made: int = 0, second_moment: float = 0.0) -> None:
        super().__init__(run, made)
        self._square, self.history = second_moment, 0.0
        self._left = 1.0  # of the first moment before the run
        self._gram = torch.zeros(0)
        self._adam: AdamMetric | None = None
        self._remembered: Tensor | None = None

    def begin(
        self,
        shape: torch.Size,
        gram: Tensor,
        adam: AdamMetric | None,
        shrinks: Tensor | None = None,
        remembered: Tensor | None = None,
    ) -> None:
        """A new segment.

        Args:
            shape: (sides, N).
            gram: J Jᵀ (S, S).
            adam: Adam's diagonal; None for SGD.
            shrinks: ⟨∇θ log π, D θ⟩ (S,), for weight decay.
            remembered: ⟨∇θ log π, P m⟩ (S,), with the first moment m before the run.
        """
        self._begin(shape, shrinks)
        self._gram, self._adam, self._remembered, self.history = gram, adam, remembered, 0.0

    def square(self, c: Tensor) -> float:
        """‖Σ_j c_j ∇θ log π(y_j)‖²."""
        return max(float(c.flatten() @ self._gram @ c.flatten()), 0.0)

    def _move(self, clip: float, square: float, rate: float, count: int) -> Tensor:
        kernel, momentum, beta2, scale = self._gram, self.run.momentum, self.run.beta2, 1.0
        if self._adam is not None:  # both moments are corrected for their start from zero
            kernel = self._adam.gram
            self._square = beta2 * self._square + (1 - beta2) * square
            v = max(self._square / (1 - beta2**count), 1e-300)
            scale = math.sqrt(self._adam.second_moment / v) / (1 - momentum**count)
        self._left *= momentum
        self.history -= rate * scale * self._left  # the optimizer's moments are of ∇L
        self.net = self.net + rate * scale * self._moment
        moved = kernel @ self.net.flatten()
        return moved if self._remembered is None else moved + self.history * self._remembered


class AdamMotion(Motion):
    """Steps of Adam with its own moments m and v of the steps' gradients.

    Cost: a step reads the gradients of all sequences once and those of its batch once more.

    Args:
        run: Settings of the run.
        parameters: Name → trainable parameter.
        state: Adam's moments before the run; None: it is fresh.
        work: A vector (P,) that nobody else uses while steps are made.
        shards: How the parameters are divided among processes.

    Attributes:
        delta: Δθ of the segment without decay (P,).
    """

    def __init__(
        self,
        run: Run,
        parameters: Mapping[str, Tensor],
        state: OptimizerState | None,
        work: Tensor,
        shards: Shards = WHOLE,
    ) -> None:
        super().__init__(run, 0 if state is None else state.steps)
        self._shards = shards
        first, second = Flat(parameters), Flat(parameters)
        if state is not None:
            first.copy(state.first)
            second.copy(state.second)
        self._first, self._second = first.vector.neg_(), second.vector  # of −∇L
        self._gradient, self.delta = work, torch.zeros_like(work)
        # What m of before the run moves, which belongs to no row.
        self._past = None if state is None else self._first.clone()
        self._past_delta = None if state is None else torch.zeros_like(work)
        self._rows, self._same = work[None], torch.zeros(0, dtype=torch.int64)

    def begin(
        self, shape: torch.Size, rows: Tensor, same: Tensor, shrinks: Tensor | None = None
    ) -> None:
        """A new segment.

        Args:
            shape: (sides, N).
            rows: Gradients of all sequences of the set (S, P).
            same: The row that stands for each sequence (S,): equal gradients cancel exactly.
            shrinks: ⟨∇θ log π, D θ⟩ (S,), for weight decay.
        """
        self._begin(shape, shrinks)
        self._rows, self._same = rows, same
        for vector in (self.delta, self._past_delta):
            if vector is not None:
                vector.zero_()

    def square(self, c: Tensor) -> float:
        """‖Σ_j c_j ∇θ log π(y_j)‖²."""
        self._gradient.zero_()
        by_row = torch.zeros_like(c.flatten()).index_add_(0, self._same, c.flatten())
        for row, value in enumerate(by_row.tolist()):
            if value:
                self._gradient.add_(self._rows[row], alpha=value)
        square = torch.linalg.vector_norm(self._gradient, dtype=torch.float64).square()
        self._shards.add_up(square)
        return float(square)

    def _move(self, clip: float, square: float, rate: float, count: int) -> Tensor:
        run = self.run
        first_bias, second_bias = 1 - run.momentum**count, 1 - run.beta2**count
        total = torch.zeros((), dtype=torch.float64, device=self.delta.device)
        for start in range(0, len(self.delta), _BLOCK):
            at = slice(start, start + _BLOCK)
            gradient, first, second = self._gradient[at], self._first[at], self._second[at]
            gradient *= clip
            first.mul_(run.momentum).add_(gradient, alpha=1 - run.momentum)
            second.mul_(run.beta2).addcmul_(gradient, gradient, value=1 - run.beta2)
            total += second.sum(dtype=torch.float64)
            denominator = (second / second_bias).sqrt_().add_(run.epsilon)
            move = (first * (rate / first_bias)).div_(denominator)
            self.delta[at] += move
            if self._past is not None and self._past_delta is not None:
                past = self._past[at].mul_(run.momentum)
                self._past_delta[at] += (past * (rate / first_bias)).div_(denominator)
        # Adam divides small gradients by small moments: the sizes of steps are in c, not in P.
        moved = (self._rows @ self.delta).double().cpu()
        self._shards.add_up(total, moved)
        size = math.sqrt(max(float(total) / second_bias, 1e-300))
        self.net = self.net + rate / first_bias / size * self._moment
        return moved[self._same]

    def fit(self, diagonal: Tensor, work: Tensor) -> None:
        """Scales a diagonal P (P,) so that P Σ_j c_j ∇θ log π(y_j) comes nearest to Δθ.

        Args:
            diagonal: P; is overwritten.
            work: A vector (P,), which is overwritten.
        """
        rows = self._rows[: self.net.numel()]
        torch.mv(rows.T, self.net.flatten().to(work), out=work)
        work *= diagonal
        products = torch.stack([work @ self.delta, work @ work])
        if self._past_delta is not None:
            products[0] -= work @ self._past_delta
        self._shards.add_up(products)
        along, square = products.tolist()
        diagonal *= along / square if square else 1.0
