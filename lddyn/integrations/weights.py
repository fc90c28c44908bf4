"""Weights of rows in a trainer of TRL, which ignores a weight column by itself.

A row's weight multiplies the gradient that leaves the row's part of the model's outputs. Every loss
that is a sum over rows is so weighted exactly, whatever its formula, and the trainer's own code
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

# Class of TRL → responses of a row, which are rows of the model's outputs.
_RESPONSES = {
    "DPOTrainer": 2,
    "CPOTrainer": 2,
    "RewardTrainer": 2,
    "KTOTrainer": 1,
    "SFTTrainer": 1,
}
_REMEDY = "leave rows out of the file (`lddyn filter --drop`), or repeat rows in it"

# Losses that sort the pairs of a batch, or average over several pairs within one term.
_NOT_SUMS = {
    **dict.fromkeys(("aot", "aot_pair", "aot_unpaired"), "sorts the pairs of a batch"),
    "sft": "is a mean over the tokens of all pairs of a batch",
}


def weighted(trainer: Trainer, column: str = "weight", *, normalise: bool = True) -> Trainer:
    """Let a trainer of TRL read the weights of its training set's rows; returns the trainer.

    With the weights a_i of a step's rows and their losses ℓ_i, the step's loss becomes

        Σ_i u_i a_i ℓ_i / Σ_i u_i a_i

    u_i is the weight that the trainer gives to the loss by itself. A pair, or a row of KTO, has
    1 / (rows of the part · parts of the step), with the parts of all processes. In SFT ℓ_i is the
    loss of one token, a_i is the weight of its row, and every counted token of the step has the
    same u_i (where the trainer counts tokens apart in each process or part, so does u_i). A row of
    weight 2 enters the step as the row written twice would.

    Args:
        trainer: A DPOTrainer, SFTTrainer, KTOTrainer, RewardTrainer, or CPOTrainer with
            cpo_alpha=0. Its training set has the column. Evaluation is not weighted, and logged
            losses, rewards and log-probs are those of the rows without weights. The KL baseline
            of KTO's loss is the trainer's own, a mean over all rows of the part.
        column: Name of the column: finite numbers, 0 or more. 0 is as if the row were left out of
            its step.
        normalise: False: without the denominator, so that a step whose weights are small is small.
            `Diagnosis.simulate(pair_weights=)` has no denominator.

    Raises:
        ValueError: If the trainer is another one, its loss is not a sum over rows (TRL's "sft"
            term, the NLL terms of CPO and ORPO, AOT, a loss function of the user's, the balance
            loss of a mixture of experts), rows are packed, pairs are padding-free, Liger computes
            the loss, or the training set has no such column. In training: if a row has no weight.

    Cost: none.

    Example:
        >>> # trainer = trl.DPOTrainer(model, args=…, train_dataset=rows_with_a_weight_column)
        >>> # lddyn.integrations.trl.weighted(trainer).train()
    """
    kind = _check(trainer, column)
    own: Any = trainer
    if getattr(own, "_lddyn_weights", None) is not None:
        raise ValueError("the trainer reads weights already")
    weights = own._lddyn_weights = _Weights(own, column, normalise, _RESPONSES[kind])
    own._set_signature_columns_if_needed()
    own._signature_columns = [*own._signature_columns, column]
    own.data_collator = weights.collator(own.data_collator)
    own.get_batch_samples = weights.batch_samples(own.get_batch_samples)
    own.compute_loss = weights.compute_loss(own.compute_loss)
    return trainer


def _check(trainer: Any, column: str) -> str:
    """Name of the trainer's class in TRL; raises if its rows cannot be weighted."""
    kind = _kind(trainer)
    _check_loss(trainer, kind)
    _check_rows(trainer, kind)
    columns = getattr(trainer.train_dataset, "column_names", None)
    if columns is not None and column not in columns:
        raise ValueError(
            f"the training set has no column {column!r}; it has {', '.join(sorted(columns))}"
        )
    return kind


def _kind(trainer: Any) -> str:
    for ancestor in type(trainer).__mro__:
        if ancestor.__name__ in _RESPONSES:
            return ancestor.__name__
        if ancestor.__module__.startswith("trl.") and "compute_loss" in vars(ancestor):
            break  # one of TRL's own that learns otherwise than the class it is derived from
    raise ValueError(
        f"weighted is for {', '.join(_RESPONSES)} of TRL, got {type(trainer).__name__}; {_REMEDY}"
    )


def _check_loss(trainer: Any, kind: str) -> None:
    args = trainer.args
    names = getattr(args, "loss_type", None) or []
    losses = [names] if isinstance(names, str) else list(names)
    losses += ["sft"] if getattr(args, "rpo_alpha", None) else []
    others = [name for name in losses if name in _NOT_SUMS] if kind == "DPOTrainer" else []
    if others:
        raise ValueError(
            f"loss_type {others[0]!r} {_NOT_SUMS[others[0]]}: a pair has no weight of its own in "
            f"it; {_REMEDY}"
        )
    if kind == "CPOTrainer" and bool(getattr(args, "cpo_alpha", 0)):
        raise ValueError(
            f"cpo_alpha={args.cpo_alpha} adds a mean over the tokens of all chosen responses, in "
            f"which a pair has no weight of its own; set cpo_alpha=0, or {_REMEDY}"
        )
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(
            "compute_loss_func may be no sum over rows: multiply by the weights in it, or remove it"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "the balance loss of the mixture of experts is a mean over the tokens of all rows, in "
            f"which a row has no weight of its own; set router_aux_loss_coef=0, or {_REMEDY}"
        )


def _check_rows(trainer: Any, kind: str) -> None:
    args, sft = trainer.args, kind == "SFTTrainer"
    for name in ("use_liger_kernel", "use_liger_loss", *(() if sft else ("padding_free",))):
        if getattr(args, name, False):
            raise ValueError(
                f"{name}=True: the model's outputs have no row for each response, so that rows "
                f"cannot be weighted; set it to False, or {_REMEDY}"
            )
    packed = "seq_lengths" in (getattr(trainer.train_dataset, "column_names", None) or ())
    if sft and (packed or getattr(args, "packing", False)):
        raise ValueError(
            "packing=True: rows are joined when the trainer is made, and their weights are lost; "
            f"set packing=False and padding_free=True, which needs no padding either, or {_REMEDY}"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallel, "sp_enabled", False) or getattr(parallel, "cp_enabled", False):
        raise ValueError(
            f"sequences are split among devices, so that rows cannot be weighted; {_REMEDY}"
        )


class _Weights:
    """The weights of the batches that a trainer is working on."""

    def __init__(self, trainer: Any, column: str, normalise: bool, responses: int) -> None:
        self.trainer, self.column, self.normalise = trainer, column, normalise
        self.responses = responses  # of a row
        self.factor = 1.0  # by which the weights of the present step are multiplied
        self.logged = 1.0  # by which the loss is multiplied where it is logged

    def collator(self, inner: Any) -> Any:
        """The collator, which also hands on the weights: (rows,), or of every token (1, T)."""

        def collate(rows: Sequence[Mapping[str, Any]]) -> MutableMapping[str, Any]:
            known = [row.get(self.column) for row in rows]
            bare = [{k: v for k, v in row.items() if k != self.column} for row in rows]
            batch: MutableMapping[str, Any] = inner(bare)
            if any(value is not None for value in known):
                weights = self._tensor(known)
                if getattr(inner, "padding_free", False):
                    row_of_token = (batch["position_ids"] == 0).cumsum(1) - 1
                    # Padding begins rows of its own, without a label.
                    weights = weights[row_of_token.clamp(max=len(weights) - 1)]
                batch[self.column] = weights
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
        """`get_batch_samples`, which also divides the step by its weights."""

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, items = inner(*args, **kwargs)
            self.factor = self.logged = 1.0
            known = [batch for batch in batches if self.column in batch]
            if known and self.normalise:
                items = self._divide([self._sums(batch) for batch in known], items)
            return batches, items

        return get_batch_samples

    def _sums(self, batch: Mapping[str, Any]) -> tuple[float, float]:
        """Σ a and the count, of the losses of a part: those of rows, or of counted tokens."""
        weights = batch[self.column].double()
        labels = batch.get("shift_labels", batch.get("labels"))
        if labels is None:
            return float(weights.sum()), float(weights.numel())
        first = 0 if "shift_labels" in batch else 1
        counted = labels[..., first:] != -100
        weights = weights.to(labels.device).view(len(labels), -1).expand(labels.shape)
        return float((weights[..., first:] * counted).sum()), float(counted.sum())

    def _divide(self, sums: Sequence[tuple[float, float]], items: Any) -> Any:
        """Sets the factors of a step; returns the number of items by which the loss is divided."""
        processes = self.trainer.accelerator.num_processes
        if items is None:  # every part is a mean of its own
            own = sum(a / max(n, 1.0) for a, n in sums) / len(sums)
            mean = self._over_processes(own)[0] / processes
            self.factor = 1 / mean if mean else 0.0
            return None
        total, count = (sum(values) for values in zip(*sums, strict=True))
        number = float(torch.as_tensor(items).flatten()[0])
        if self.trainer.args.average_tokens_across_devices or processes == 1:
            total, count = self._over_processes(total, count)
            mean = total / max(count, 1.0)
            divisor = total * (number / max(count, 1.0))
        else:
            mean = self._over_processes(total / max(count, 1.0))[0] / processes
            divisor = number * mean
        if divisor < 1:  # the trainer divides by 1 at least
            self.factor = 1 / mean if mean else 0.0
            return items
        self.logged = mean
        return torch.full_like(torch.as_tensor(items), divisor, dtype=torch.float32)

    def _over_processes(self, *values: float) -> list[float]:
        """The sums of numbers over all processes."""
        own = torch.tensor([values], dtype=torch.float64, device=self.trainer.args.device)
        sums: list[float] = self.trainer.accelerator.gather(own).sum(0).tolist()
        return sums

    def compute_loss(self, inner: Any) -> Any:
        """`compute_loss`, in which the gradients of the model's outputs are weighted."""

        def compute_loss(model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kw: Any) -> Any:
            rest = {k: v for k, v in inputs.items() if k != self.column}
            weights = inputs.get(self.column)
            if not torch.is_grad_enabled() or not model.training:
                return inner(model, rest, *args, **kw)
            if weights is None:
                raise ValueError(f"rows of the training set have no {self.column}")
            weights = weights * self.factor
            # In pairs the chosen responses come first, then the rejected ones.
            scale = _OutputScale(weights if weights.dim() > 1 else weights.repeat(self.responses))
            hook = model.register_forward_hook(scale)
            try:
                found = inner(model, rest, *args, **kw)
            finally:
                hook.remove()
            scale.check()
            return self._as_logged(found)

        return compute_loss

    def _as_logged(self, found: Any) -> Any:
        """The loss with the value that it has without weights, and the gradient that it has."""
        if self.logged == 1.0:
            return found
        loss = found[0] if isinstance(found, tuple) else found
        loss = loss + loss.detach() * (self.logged - 1.0)
        return (loss, *found[1:]) if isinstance(found, tuple) else loss


class _OutputScale:
    """A forward hook that scales the gradients of a batch's rows.

    Attributes:
        weights: Of every row (B,), or of every token of rows that follow each other (1, T).
        scaled: Whether an output was.
        own_loss: Whether the model computed the loss itself, from outputs before they are scaled.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.scaled, self.own_loss = weights, False, False

    def __call__(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        """The outputs; gradients of their rows will be scaled."""
        if not torch.is_grad_enabled():
            return None  # a pass of the reference
        # Where TRL computes the loss, it does so from logits or log-probs.
        self.own_loss |= outputs.get("loss") is not None and "log_probs" not in outputs
        for name, value in outputs.items():
            if self._has_rows(value):
                outputs[name] = _scaled(value, self._factors(value))
                self.scaled = True
        return outputs

    def _has_rows(self, value: Any) -> bool:
        rows = isinstance(value, Tensor) and value.requires_grad and value.dim() > 1
        return rows and len(value) == len(self.weights)

    def _factors(self, value: Tensor) -> Tensor:
        """The weights as factors of an output (B, …), or (1, T − 1 or T, …)."""
        if self.weights.dim() == 1:
            return self.weights.to(value).view(-1, *[1] * (value.dim() - 1))
        # An output at position t is about token t + 1; virtual tokens stand before all others.
        after = self.weights[:, 1:]
        after = torch.cat([after, after[:, -1:]], 1)[:, : value.shape[1]]
        before = after.new_zeros(1, value.shape[1] - after.shape[1])
        factors = torch.cat([before, after], 1).to(value)
        return factors.view(1, -1, *[1] * (value.dim() - 2))

    def check(self) -> None:
        """Raises if the weights did not reach the loss."""
        if self.own_loss:
            raise RuntimeError(
                "weights were not used: this version of TRL takes the loss that the model computes "
                f"itself; install TRL 1.16 or newer, or {_REMEDY}"
            )
        if not self.scaled:
            raise RuntimeError(
                f"weights were not used: no output of the model has {len(self.weights)} rows, one "
                "for each response"
            )


def _scaled(value: Tensor, factors: Tensor) -> Tensor:
    """The same values, whose gradient is multiplied by the factors."""
    view = value.view_as(value)
    view.register_hook(lambda gradient: gradient * factors)
    return view
