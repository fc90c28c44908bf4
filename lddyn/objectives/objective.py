"""Objectives: a loss together with the sequences that it is a loss of; and SFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy

__all__ = ["SFT", "Objective", "several"]

LossFunction = Callable[[list[Tensor]], Tensor]


class Objective:
    """Any loss of the per-token log-probs of some examples.

    The loss sees log π of the realised tokens alone. A term that reads the whole distribution is
    out of reach: label smoothing of SFT, a z-loss, an entropy bonus, a KL divergence over the
    vocabulary, and the auxiliary loss of a router.

    Args:
        fn: Maps [log π(y) of example 0 (L_0,), …] in nats to a scalar tensor, which a step lowers.
        examples: The update sequences χu, in the order in which fn receives them.
        names: One name per sequence, for tables and pictures.

    Raises:
        ValueError: If there is no example, or names are not one per example.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> mean_nll = lddyn.Objective(lambda log_probs: -log_probs[0].mean(), [ex])
        >>> mean_nll.weights([torch.tensor([-1.0, -2.0])])[1][0]
        tensor([-0.5000, -0.5000])
    """

    name = "custom loss"

    def __init__(
        self, fn: LossFunction, examples: Sequence[Example], names: Sequence[str] | None = None
    ):
        self.fn = fn
        self._take(examples, names)

    def _take(self, examples: Sequence[Example], names: Sequence[str] | None = None) -> None:
        """Keeps the examples and their names, and checks them."""
        self.examples = list(examples)
        if not self.examples:
            raise ValueError("an objective needs at least one example to update on, got none")
        self.names = list(names or [e.name or f"update {i}" for i, e in enumerate(self.examples)])
        if len(self.names) != len(self.examples):
            raise ValueError(
                f"names must be one per example, got {len(self.names)} for {len(self.examples)}"
            )

    def prepare(self, anatomy: Anatomy) -> Self:
        """A copy of this objective that needs no model any more; this one is not changed.

        What the loss needs of models (the reference log-probs of a preference loss) is computed
        here, at the parameters of this moment.

        Args:
            anatomy: The policy, before the step.
        """
        prepared = copy.copy(self)
        prepared.examples, prepared.names = list(self.examples), list(self.names)
        return prepared

    divides_by_tokens = False  # whether trainers divide by the tokens of a whole optimizer step

    def subset(self, rows: Sequence[int]) -> Self:
        """The loss of some of the examples as one batch; of a prepared objective it is prepared.

        Args:
            rows: Their numbers, in any order.

        Raises:
            ValueError: If the loss is a function of all examples, as one of the user's own is.
        """
        if type(self) is Objective:
            raise ValueError(
                "a custom loss is a function of all its examples: no batch of some of them is "
                "known; give lddyn.SFT, lddyn.KTO or lddyn.GRPO, or predict one step, without a run"
            )
        part = copy.copy(self)
        part.examples = [self.examples[i] for i in rows]
        part.names = [self.names[i] for i in rows]
        return part

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The scalar loss of per-token log-probs in nats, one (L_i,) tensor per example."""
        return self.fn(log_probs)

    def weights(self, log_probs: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss, and w_l = ∂L/∂log π(y_l) for every token: one (L_i,) tensor per example.

        Weights are in units of the loss per nat; a negative weight raises the token.

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
        if not all(bool(torch.isfinite(x).all()) for x in (loss, *weights)):
            raise ValueError(
                f"the loss ({float(loss.detach())}) or its gradient is not finite"
                f"{self._suspects(log_probs, weights)}: check the log-probs (is a response token "
                "masked out by the model, or certain?) and the loss"
            )
        return float(loss.detach()), weights

    def _suspects(self, log_probs: list[Tensor], weights: list[Tensor]) -> str:
        """The responses that make a loss infinite or NaN, in words; empty: none stands out."""
        sums = [float(lp.detach().sum()) for lp in log_probs]
        wrong = [i for i, total in enumerate(sums) if not math.isfinite(total)]
        wrong = wrong or [i for i, total in enumerate(sums) if total == 0]
        wrong = wrong or [i for i, w in enumerate(weights) if not bool(w.isfinite().all())]
        named = [
            f"{self.names[i]!r}"
            + (f" ({name})" if (name := self.examples[i].name) not in ("", self.names[i]) else "")
            + f", where log π = {sums[i]:g}"
            for i in wrong[:3]
        ]
        return f" at response {'; '.join(named)}" if named else ""

    def describe(self) -> dict[str, Any]:
        """The objective's name and parameters, JSON-safe, for reports and saved results."""
        return {"objective": self.name}

    def describe_start(self, log_probs: Sequence[Tensor]) -> dict[str, Any]:
        """What the log-probs before the step say of it besides the loss, JSON-safe.

        Args:
            log_probs: Per-token log-probs in nats, one (L_i,) tensor per example.
        """
        return {}

    def remarks(self) -> list[str]:
        """Sentences on what the examples have that such a loss does not expect."""
        return []


class SFT(Objective):
    """Supervised finetuning: the negative log-likelihood of one or several responses.

        mean: L = −Σ_i Σ_l log π(y_il) / Σ_i L_i          sum: L = −Σ_i Σ_l log π(y_il)

    Args:
        examples: One Example, or a sequence of them as one batch: all that one optimizer step
            learns from, gradient accumulation and processes included, since trainers divide by the
            tokens of all of them.
        reduction: "mean" over all counted tokens of the batch, as TRL's SFTTrainer does, or "sum",
            which is the paper's Eq. 4.
        loss_type: TRL's "nll", or "dft" (Wu et al. 2025, 2508.05629): every token's term times its
            own probability, which is not differentiated.

    Raises:
        ValueError: If there is no example, or the reduction or loss_type is none of these.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> lddyn.SFT(ex).weights([torch.tensor([-1.0, -2.0])])
        (1.5, [tensor([-0.5000, -0.5000])])
    """

    name = "sft"

    def __init__(
        self,
        examples: Example | Sequence[Example],
        reduction: str = "mean",
        loss_type: str = "nll",
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if loss_type not in ("nll", "dft"):
            raise ValueError(f"loss_type must be 'nll' or 'dft', got {loss_type!r}")
        self.reduction, self.loss_type = reduction, loss_type
        self.divides_by_tokens = reduction == "mean"
        self._take(several(examples))

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """Negative log-likelihood in nats (per token for "mean")."""
        if self.loss_type == "dft":
            log_probs = [lp * lp.detach().exp() for lp in log_probs]
        total = torch.stack([lp.sum() for lp in log_probs]).sum()
        count = sum(lp.numel() for lp in log_probs) if self.reduction == "mean" else 1
        return -total / count

    def describe(self) -> dict[str, Any]:
        """Name, reduction, and loss type where it is not the usual one."""
        kind = {} if self.loss_type == "nll" else {"loss_type": self.loss_type}
        return {"objective": self.name, "reduction": self.reduction, **kind}


def several(examples: Example | Sequence[Example]) -> list[Example]:
    """One Example, or several, as a list."""
    return [examples] if isinstance(examples, Example) else list(examples)
