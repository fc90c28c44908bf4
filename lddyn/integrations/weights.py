"""Pair weights in a trainer of TRL, which ignores a weight column by itself.

A pair's weight multiplies the gradient that leaves its rows of the model's outputs. Every loss that
is a sum over pairs is so weighted exactly, whatever its formula, and the trainer's own code
computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["weighted"]

# Losses that sort the pairs of a batch, or average over several pairs within one term.
_NOT_SUMS = {
    **dict.fromkeys(("aot", "aot_pair", "aot_unpaired"), "sorts the pairs of a batch"),
    "sft": "is a mean over the tokens of all pairs of a batch",
}


def weighted(trainer: Trainer, column: str = "weight", *, normalise: bool = True) -> Trainer:
    """Let a DPOTrainer of TRL read the pair weights of its training set; returns the trainer.

    With the weights a_i of a step's pairs and their losses ℓ_i, the step's loss becomes

        Σ_i u_i a_i ℓ_i / Σ_i u_i a_i,      u_i = 1 / (pairs of the part · parts of the step)

    u_i is the weight that the trainer gives to the pair by itself. Accumulated parts and processes
    count together.

    Args:
        trainer: The trainer; its training set has the column. Evaluation is not weighted, and
            logged rewards and log-probs are those of the pairs without weights.
        column: Name of the column: finite numbers, 0 or more. 0 is as if the row were left out of
            its step.
        normalise: False: without the denominator, so that a step whose weights are small is small.
            `Diagnosis.simulate(pair_weights=)` has no denominator.

    Raises:
        ValueError: If the trainer is not a DPOTrainer, its loss is not a sum over pairs (TRL's
            "sft" term and AOT), rows are packed or padding-free, or the training set has no such
            column. In training: if a row has no weight.

    Cost: none.

    Example:
        >>> # trainer = trl.DPOTrainer(model, args=…, train_dataset=rows_with_a_weight_column)
        >>> # lddyn.integrations.trl.weighted(trainer).train()
    """
    _check(trainer, column)
    own: Any = trainer
    if getattr(own, "_lddyn_weights", None) is not None:
        raise ValueError("the trainer reads pair weights already")
    weights = own._lddyn_weights = _Weights(own, column, normalise)
    own._set_signature_columns_if_needed()
    own._signature_columns = [*own._signature_columns, column]
    own.data_collator = weights.collator(own.data_collator)
    own.get_batch_samples = weights.batch_samples(own.get_batch_samples)
    own.compute_loss = weights.compute_loss(own.compute_loss)
    return trainer


def _check(trainer: Any, column: str) -> None:
    kinds = [ancestor.__name__ for ancestor in type(trainer).__mro__]
    if "DPOTrainer" not in kinds:
        raise ValueError(
            f"weighted is for a DPOTrainer of TRL, got {type(trainer).__name__}; for other "
            "trainers leave rows out or repeat them"
        )
    args = trainer.args
    losses = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    losses += ["sft"] if getattr(args, "rpo_alpha", None) else []
    others = [name for name in losses if name in _NOT_SUMS]
    if others:
        raise ValueError(
            f"loss_type {others[0]!r} {_NOT_SUMS[others[0]]}: a pair has no weight of its own in it"
        )
    for name in ("padding_free", "use_liger_kernel", "use_liger_loss"):
        if getattr(args, name, False):
            raise ValueError(
                f"{name}=True: the model's outputs have no row for each response, so that pairs "
                "cannot be weighted"
            )
    columns = getattr(trainer.train_dataset, "column_names", None)
    if columns is not None and column not in columns:
        raise ValueError(
            f"the training set has no column {column!r}; it has {', '.join(sorted(columns))}"
        )


class _Weights:
    """The weights of the batches that a trainer is working on."""

    def __init__(self, trainer: Any, column: str, normalise: bool) -> None:
        self.trainer, self.column, self.normalise = trainer, column, normalise
        self.mean = 1.0  # Σ u a of the present step

    def collator(self, inner: Any) -> Any:
        """The collator, which also hands on the weights of the rows."""

        def collate(rows: Sequence[Mapping[str, Any]]) -> MutableMapping[str, Any]:
            known = [row.get(self.column) for row in rows]
            bare = [{k: v for k, v in row.items() if k != self.column} for row in rows]
            batch: MutableMapping[str, Any] = inner(bare)
            if any(value is not None for value in known):
                batch[self.column] = self._tensor(known)
            return batch

        return collate

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        try:
            weights = torch.tensor([float(value) for value in values])
        except (TypeError, ValueError):
            weights = torch.full((1,), -1.0)
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"{self.column} must be finite numbers of 0 or more, got {list(values)}"
            )
        return weights

    def batch_samples(self, inner: Any) -> Any:
        """`get_batch_samples`, which also notes the mean weight of the step."""

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, items = inner(*args, **kwargs)
            means = [float(b[self.column].mean()) for b in batches if self.column in b]
            if means:
                mean = torch.tensor([sum(means) / len(means)], device=self.trainer.args.device)
                self.mean = float(self.trainer.accelerator.gather(mean).mean())
            return batches, items

        return get_batch_samples

    def compute_loss(self, inner: Any) -> Any:
        """`compute_loss`, in which the gradients of the model's outputs are weighted."""

        def compute_loss(model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kw: Any) -> Any:
            rest = {k: v for k, v in inputs.items() if k != self.column}
            weights = inputs.get(self.column)
            if not torch.is_grad_enabled() or not model.training:
                return inner(model, rest, *args, **kw)
            if weights is None:
                raise ValueError(f"rows of the training set have no {self.column}")
            if self.normalise:
                weights = weights / self.mean if self.mean else torch.zeros_like(weights)
            scale = _OutputScale(weights.repeat(2))  # the chosen rows, then the rejected ones
            hook = model.register_forward_hook(scale)
            try:
                return inner(model, rest, *args, **kw)
            finally:
                hook.remove()
                scale.check()

        return compute_loss


class _OutputScale:
    """A forward hook that scales the gradients of a batch's rows."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.scaled = weights, False

    def __call__(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        """The outputs; gradients of their rows will be scaled."""
        if not torch.is_grad_enabled():
            return None  # a pass of the reference
        for name, value in outputs.items():
            if self._has_rows(value):
                outputs[name] = _scaled(value, self.weights)
                self.scaled = True
        return outputs

    def _has_rows(self, value: Any) -> bool:
        rows = isinstance(value, Tensor) and value.requires_grad and value.dim() > 1
        return rows and len(value) == len(self.weights)

    def check(self) -> None:
        """Raises if no output had a row for each response."""
        if not self.scaled:
            raise RuntimeError(
                f"pair weights were not used: no output of the model has {len(self.weights)} rows, "
                "two for each pair"
            )


def _scaled(value: Tensor, weights: Tensor) -> Tensor:
    """The same values, whose gradient is multiplied row by row."""
    view = value.view_as(value)
    factors = weights.to(value).view(-1, *[1] * (value.dim() - 1))
    view.register_hook(lambda gradient: gradient * factors)
    return view
