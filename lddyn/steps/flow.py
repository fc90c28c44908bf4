"""Where probability goes when the predictions of softmaxes change: arithmetic, without a model.

At a position with prediction π and label y, a step that moves the logits by Δz moves

    Δ log π(v) = Δz_v − log Σ_u π_u e^{Δz_u},        Δπ(v) = π(v) (e^{Δ log π(v)} − 1)        (nats)

In a single softmax whose logits are the parameters, one step with coefficients c (c_y = −η on a
label that is pushed down, +η on one that is pulled up) has Δz = c − (Σc) π. This is Lemma 1 of the
paper. It says that a label v ≠ y gains from a push on y, to first order, if and only if

    π_v > τ = ‖π‖² − π_y.

In a model Δz has other causes too (shared features, other positions), so τ is only a guess there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Flow", "leading", "renormalised", "softmax_step", "threshold"]

# ---------------------------------------------------------------------------------------------
# One softmax


def softmax_step(logits: Tensor, coefficients: Tensor) -> Tensor:
    """Δ log π after one gradient step on logits that are the parameters: Lemma 1, exactly.

        Δz = c − (Σ_l c_l) π,        Δ log π_i = Δz_i − log Σ_j π_j e^{Δz_j}

    Args:
        logits: z, shape (..., V).
        coefficients: c, shape (..., V): η' times minus the weight of each label's log-probability
            in the loss. One label y with c_y = −|η'| is the paper's negative gradient, c_y = +|η'|
            a step of SFT; several labels are one step on all of them.

    Returns:
        Δ log π in nats, shape (..., V), float64, with full relative precision where it is small.

    Raises:
        ValueError: If the two have different numbers of labels.

    Cost: O(V) per row.

    Source: paper App. E, Lemma 1: π'_i / π_i = 1 / Σ_j β_j π_j.

    Example:
        >>> from lddyn.steps.flow import softmax_step
        >>> logits, push = torch.tensor([2.0, 1, 0, -1, -2]), torch.tensor([-0.5, 0, 0, 0, 0])
        >>> after = (logits.double().log_softmax(-1) + softmax_step(logits, push)).exp()
        >>> [round(float(p), 4) for p in after]
        [0.572, 0.2837, 0.0969, 0.0347, 0.0126]
    """
    if logits.shape[-1] != coefficients.shape[-1]:
        raise ValueError(
            f"coefficients must have one column per logit, {logits.shape[-1]}, got "
            f"{coefficients.shape[-1]}"
        )
    log_probs = logits.double().log_softmax(-1)
    pushed = coefficients.double()
    return renormalised(log_probs, pushed - pushed.sum(-1, keepdim=True) * log_probs.exp())


def threshold(log_probs: Tensor, labels: Tensor) -> Tensor:
    """τ = ‖π‖² − π_y: what a label's probability must exceed to gain when y is pushed down.

    Args:
        log_probs: log π, shape (..., V), in nats.
        labels: y, shape (...), int64.

    Returns:
        τ, shape (...), float64; negative where every other label gains.

    Cost: O(V) per row.

    Source: first order of Lemma 1 in the step, Δ log π_i = |η'| (π_i − [i = y] − τ).

    Example:
        >>> from lddyn.steps.flow import threshold
        >>> round(threshold(torch.tensor([0.75, 0.25]).log(), torch.tensor(1)).item(), 4)
        0.375
    """
    probs = log_probs.double().exp()
    return (probs * probs).sum(-1) - _at(probs, labels)


def renormalised(log_probs: Tensor, shift: Tensor) -> Tensor:
    """The change of log π, (..., V) float64, when the logits move by `shift`."""
    log_probs, shift = log_probs.double(), shift.double()
    # Small moves: log1p keeps every digit. Large ones: expm1 could overflow, logsumexp cannot.
    small = torch.log1p((log_probs.exp() * torch.expm1(shift.clamp(max=1.0))).sum(-1, keepdim=True))
    large = torch.logsumexp(log_probs + shift, -1, keepdim=True)
    return shift - torch.where(shift.abs().amax(-1, keepdim=True) < 1.0, small, large)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[..., index]: one entry of every row."""
    return values.gather(-1, index[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------
# What a change of predictions did


@dataclass(frozen=True, repr=False)
class Flow:
    """Where probability went in M predictions over V labels, float64.

    In every row label + argmax + top + rest = 0. y* is the most likely label other than y before
    the step.

    Attributes:
        leading: The most likely labels other than y before the step, (M, top), likeliest first; y*
            is column 0.
        likeliest: Whether y was as likely as y* or more before the step, (M,) bool.
        change: Δπ of every label, (M, V).
        label: Δπ of the row's own label y, (M,).
        argmax: Δπ of y*, (M,).
        top: Δπ of the other labels in `leading` together, (M,).
        rest: Δπ of all labels that are neither y nor in `leading`, together, (M,).
        gainers, losers: How many labels other than y rose and fell, (M,) int64.
        gained, lost: Δπ of the labels that rose, and of those that fell, together, (M,).
        ratio: Squeeze ratio Δπ(y*) / −Δπ(y), (M,); NaN where y did not fall. Above 1, y* takes
            from other labels as well.
        entropy: Change of −Σ π log π, (M,), in nats.
    """

    leading: Tensor
    likeliest: Tensor
    change: Tensor
    label: Tensor
    argmax: Tensor
    top: Tensor
    rest: Tensor
    gainers: Tensor
    losers: Tensor
    gained: Tensor
    lost: Tensor
    ratio: Tensor
    entropy: Tensor

    def __repr__(self) -> str:
        rows, labels = self.change.shape
        return (
            f"Flow({rows} positions, {labels} labels; summed: y {float(self.label.sum()):+.3g}, "
            f"y* {float(self.argmax.sum()):+.3g}, next likely {float(self.top.sum()):+.3g}, "
            f"the rest {float(self.rest.sum()):+.3g})"
        )

    @classmethod
    def of(cls, log_probs: Tensor, delta: Tensor, labels: Tensor, top: int = 10) -> Flow:
        """The flow of predictions whose log π changes by `delta`.

        Args:
            log_probs: log π before, shape (M, V), in nats.
            delta: Δ log π, shape (M, V); e^{log π + Δ log π} must sum to one.
            labels: y, shape (M,), int64.
            top: How many labels other than y count as the most likely, y* included.

        Returns:
            The Flow. Small changes keep their digits: probabilities are never subtracted.

        Cost: a few passes over (M, V) float64.

        Example:
            >>> from lddyn.steps.flow import Flow, softmax_step
            >>> logits, label = torch.tensor([[4.0, 1, 0, 0]]), torch.tensor([3])
            >>> step = softmax_step(logits, torch.tensor([[0, 0, 0, -1.0]]))
            >>> flow = Flow.of(logits.log_softmax(-1), step, label)
            >>> bool(flow.argmax > 0), bool(flow.top < 0), bool(flow.ratio > 1)
            (True, True, True)
        """
        log_probs, delta = log_probs.double(), delta.double()
        probs = log_probs.exp()
        change = probs * torch.expm1(delta)
        entropy = -(change * log_probs + (probs + change) * delta).sum(-1)
        return cls._sorted(log_probs, delta, change, entropy, labels, top)

    @classmethod
    def first_order(cls, log_probs: Tensor, shift: Tensor, labels: Tensor, top: int = 10) -> Flow:
        """The flow to first order in a move Δz of the logits: Δπ = π (Δz − ⟨π, Δz⟩).

        It is linear in Δz: the flows of a step's terms add up to the flow of the step.

        Args:
            log_probs: log π before, shape (M, V), in nats.
            shift: Δz, shape (M, V).
            labels: y, shape (M,), int64.
            top: How many labels other than y count as the most likely, y* included.

        Example:
            >>> from lddyn.steps.flow import Flow
            >>> logits, label = torch.tensor([[4.0, 1, 0, 0]]), torch.tensor([3])
            >>> flow = Flow.first_order(logits.log_softmax(-1), -0.1 * logits, label)
            >>> round(float(flow.argmax), 4), round(float(flow.label), 4)
            (-0.0251, 0.0063)
        """
        log_probs, shift = log_probs.double(), shift.double()
        delta = shift - (log_probs.exp() * shift).sum(-1, keepdim=True)
        change = log_probs.exp() * delta
        return cls._sorted(log_probs, delta, change, -(change * log_probs).sum(-1), labels, top)

    @classmethod
    def _sorted(
        cls,
        log_probs: Tensor,
        delta: Tensor,
        change: Tensor,
        entropy: Tensor,
        labels: Tensor,
        top: int,
    ) -> Flow:
        own = torch.zeros_like(change, dtype=torch.bool).scatter_(-1, labels[:, None], True)
        order = leading(log_probs, labels, top)
        in_top = torch.zeros_like(own).scatter_(-1, order, True)
        rose, fell = (delta > 0) & ~own, (delta < 0) & ~own
        label, argmax = _at(change, labels), _at(change, order[:, 0])
        return cls(
            leading=order,
            likeliest=_at(log_probs, labels) >= _at(log_probs, order[:, 0]),
            change=change,
            label=label,
            argmax=argmax,
            top=change.gather(-1, order[:, 1:]).sum(-1),
            rest=(change * ~(own | in_top)).sum(-1),
            gainers=rose.sum(-1),
            losers=fell.sum(-1),
            gained=(change * rose).sum(-1),
            lost=(change * fell).sum(-1),
            ratio=torch.where(label < 0, argmax / -label, torch.nan),
            entropy=entropy,
        )


def leading(log_probs: Tensor, labels: Tensor, count: int) -> Tensor:
    """The most likely labels other than each row's own, (M, count), likeliest first."""
    others = log_probs.scatter(-1, labels[:, None], -torch.inf)
    return others.topk(min(count, log_probs.shape[-1] - 1), dim=-1).indices
