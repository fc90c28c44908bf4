"""Losses on response log-probs and the cotangents they put on each token.

Every loss here is a function of the per-token log-probs log π(y_l) of its sequences, so its
gradient on the logits of token l is

    G_l = w_l (e_{y_l} − π_l),     w_l = ∂L / ∂log π(y_l)

and w comes from autograd on `loss(log_probs)`: SFT gives w = −1, DPO w = ∓β(1 − a) (paper Eq. 5
and App. B Eq. 12-15), and any other loss gives what it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.examples import Example

if TYPE_CHECKING:
    from torch import nn

LossFunction = Callable[[list[Tensor]], Tensor]
LogProbs = Callable[[Any, Sequence[Example]], list[Tensor]]


class Objective:
    """Any loss of the per-token log-probs of some examples.

    Args:
        fn: Maps [log π(y) of example 0 (L_0,), …] in nats to a scalar tensor to be minimised.
        examples: The update sequences χu, in the order in which fn receives them.
        names: One name per sequence for tables and pictures.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> mean_nll = lddyn.Objective(lambda log_probs: -log_probs[0].mean(), [ex])
        >>> mean_nll.weights([torch.tensor([-1.0, -2.0])])[1][0]
        tensor([-0.5000, -0.5000])
    """

    title = "custom loss"

    def __init__(
        self, fn: LossFunction, examples: Sequence[Example], names: Sequence[str] | None = None
    ):
        self.fn = fn
        self.examples = list(examples)
        if not self.examples:
            raise ValueError("an objective needs at least one example to update on, got none")
        self.names = list(names or [e.name or f"update {i}" for i, e in enumerate(self.examples)])
        if len(self.names) != len(self.examples):
            raise ValueError(
                f"names must be one per example, got {len(self.names)} for {len(self.examples)}"
            )

    def prepare(self, model: nn.Module, log_probs: LogProbs) -> None:
        """Computes what the loss needs of other models; called once by `decompose`."""

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The scalar loss in nats (times the loss's own units)."""
        return self.fn(log_probs)

    def weights(self, log_probs: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss and w_l = ∂L/∂log π(y_l) for every token of every sequence.

        Raises:
            TypeError: If the loss is not a tensor.
            ValueError: If it is not a scalar, not finite, or does not depend on the log-probs.
        """
        leaves = [lp.detach().clone().requires_grad_(True) for lp in log_probs]
        with torch.enable_grad():
            loss = self.loss(leaves)
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"the loss must be a scalar tensor made of the log-probs, got "
                    f"{type(loss).__name__}: keep it in torch (no .item(), no float())"
                )
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss must be a scalar, got shape {tuple(loss.shape)}: add .sum() or "
                    ".mean()"
                )
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on the log-probs it was given: nothing to update"
                )
            gradients = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
        weights = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(leaves, gradients, strict=True)
        ]
        if not bool(torch.isfinite(loss)) or not all(
            bool(torch.isfinite(w).all()) for w in weights
        ):
            raise ValueError(
                f"the loss ({float(loss.detach())}) or its gradient is not finite: check the "
                "log-probs (is a response token masked out by the model?) and the loss"
            )
        return float(loss.detach()), weights

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, for reports and saved results."""
        return {"objective": self.title}


class SFT(Objective):
    """Supervised finetuning: L = −Σ_l log π(y_l) over one or several examples (paper Eq. 4).

    Args:
        examples: One Example or several; several are one batch.
        reduction: "sum" (the paper's) or "mean" (over all response tokens, as trainers do).
    """

    title = "SFT"

    def __init__(self, examples: Example | Sequence[Example], reduction: str = "sum"):
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction
        several = [examples] if isinstance(examples, Example) else list(examples)
        super().__init__(self.loss, several)

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """Negative log-likelihood in nats."""
        total = torch.stack([lp.sum() for lp in log_probs]).sum()
        count = sum(lp.numel() for lp in log_probs) if self.reduction == "mean" else 1
        return -total / count

    def describe(self) -> dict[str, Any]:
        """Name and reduction."""
        return {"objective": self.title, "reduction": self.reduction}


class DPO(Objective):
    """Direct preference optimisation on one pair (paper App. B Eq. 12-15).

    L = −log a,  a = σ(β [log π(y+)/π_ref(y+) − log π(y−)/π_ref(y−)]), log-probs summed over tokens;
    hence G+ = β(1 − a)(π − y+) and G− = −β(1 − a)(π − y−).

    Args:
        chosen: χ+ = [x; y+].
        rejected: χ− = [x; y−].
        beta: Inverse temperature β.
        reference: What π_ref is: a model, "adapter-off" (the peft model with its adapters
            disabled), "self" (the policy before the step, as in the first step of a run), or the
            pair (log π_ref(y+), log π_ref(y−)) in nats.
        label_smoothing: ε of cDPO; 0 is DPO.

    Raises:
        ValueError: If beta is not positive or the reference is none of these.
    """

    title = "DPO"

    def __init__(
        self,
        chosen: Example,
        rejected: Example,
        beta: float = 0.1,
        reference: Any = "self",
        label_smoothing: float = 0.0,
    ):
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        pair = isinstance(reference, tuple | list)
        if pair and (len(reference) != 2 or not all(math.isfinite(float(r)) for r in reference)):
            raise ValueError(
                "reference log-probs must be two finite numbers (y+, y−) in nats, got "
                f"{reference!r}"
            )
        if isinstance(reference, str) and reference not in ("self", "adapter-off"):
            raise ValueError(
                f"reference must be a model, 'adapter-off', 'self' or a pair of log-probs, got "
                f"{reference!r}"
            )
        self.beta, self.reference, self.label_smoothing = beta, reference, label_smoothing
        self.reference_log_probs: tuple[float, float] | None = (
            (float(reference[0]), float(reference[1])) if pair else None
        )
        super().__init__(self.loss, [chosen, rejected], ["y+", "y-"])

    def prepare(self, model: nn.Module, log_probs: LogProbs) -> None:
        """Computes log π_ref of both responses, unless they were given."""
        if isinstance(self.reference, tuple | list):
            return
        if self.reference == "self":
            values = log_probs(model, self.examples)
        elif self.reference == "adapter-off":
            if not hasattr(model, "disable_adapter"):
                raise ValueError(
                    "reference='adapter-off' needs a peft model with adapters, got "
                    f"{type(model).__name__}"
                )
            disable: Any = model.disable_adapter
            flags = [(p, p.requires_grad) for p in model.parameters()]
            try:
                with disable():
                    values = log_probs(model, self.examples)
            finally:  # leaving disable_adapter makes every adapter weight trainable
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
        else:
            values = log_probs(self.reference, self.examples)
        self.reference_log_probs = (float(values[0].sum()), float(values[1].sum()))

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """−log a, smoothed, in nats."""
        if self.reference_log_probs is None:
            raise RuntimeError("call prepare() first: the reference log-probs are not known")
        chosen, rejected = self.reference_log_probs
        margin = self.beta * ((log_probs[0].sum() - chosen) - (log_probs[1].sum() - rejected))
        smooth = self.label_smoothing
        log_sigmoid = torch.nn.functional.logsigmoid
        return -(1 - smooth) * log_sigmoid(margin) - smooth * log_sigmoid(-margin)

    def describe(self) -> dict[str, Any]:
        """Name, β, label smoothing and the reference log-probs in nats."""
        return {
            "objective": self.title,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "reference_log_probs": self.reference_log_probs,
        }
