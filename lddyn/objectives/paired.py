"""A loss of the table on (chosen, rejected) examples: `preference`, and `DPO` as one of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.reference_policy import (
    Reference,
    check_reference,
    describe_reference,
    reference_log_probs,
)
from lddyn.objectives.loss import Loss
from lddyn.objectives.losses import Pairs, Value, discounted
from lddyn.objectives.objective import Objective, several

__all__ = ["DPO", "Preference", "preference"]


class Preference(Objective):
    """A `Loss` on one or several (chosen, rejected) pairs; made by `preference` and `DPO`.

    The loss is that of the pairs as one batch of TRL's trainers, for most losses the mean over
    pairs. `examples` holds all chosen responses, then all rejected ones; where the loss also learns
    the prompt, a chosen example counts its prompt's tokens, too.
    """

    def __init__(
        self,
        loss: Loss,
        chosen: Example | Sequence[Example],
        rejected: Example | Sequence[Example],
        reference: Reference = "self",
    ):
        good, bad = several(chosen), several(rejected)
        if len(good) != len(bad):
            raise ValueError(
                f"chosen and rejected must be as many, got {len(good)} and {len(bad)}: one "
                "rejected response per chosen one"
            )
        self._remarks = _remarks(good, bad)
        self.pair_loss = loss
        self.name = loss.name
        self.reference = reference
        # (2, N) in nats, float64; None until prepare() has computed it.
        self.reference_log_probs = check_reference(reference, len(good))
        sides = ("y+", "y-")
        names = sides if len(good) == 1 else [f"{s} {i}" for s in sides for i in range(len(good))]
        self._responses = [tuple(e.positions) for e in good]
        if loss.reads_prompt:
            good = [_whole(e) for e in good]
        self._take([*good, *bad], names)
        for remark in self._remarks:
            warnings.warn(remark, stacklevel=3)

    def remarks(self) -> list[str]:
        """A sentence where the two responses of a pair answer different prompts."""
        return self._remarks

    def prepare(self, anatomy: Anatomy) -> Self:
        """A copy whose reference log-probs are those of this moment."""
        prepared = super().prepare(anatomy)
        if self.pair_loss.needs_reference:
            prepared.reference_log_probs = reference_log_probs(
                self.reference, anatomy, self.examples, self._sums
            )
        return prepared

    def _sums(self, log_probs: Sequence[Tensor]) -> Tensor:
        """Log π of the 2N responses: sums over tokens, discounted where ld_alpha says so."""
        if self.pair_loss.ld_alpha != 1.0:
            return discounted(log_probs, self.pair_loss.ld_alpha)
        return torch.stack([lp.sum() for lp in log_probs])

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The table's loss of these pairs as one batch."""
        count = len(log_probs) // 2
        whole = None
        if self.pair_loss.reads_prompt:
            whole, log_probs = log_probs[:count], self._of_responses(log_probs)
        sums = self._sums(log_probs).view(2, count)
        lengths = sums.new_tensor([lp.numel() for lp in log_probs]).view(2, count)
        reference = self.reference_log_probs
        if not self.pair_loss.needs_reference:
            reference = torch.zeros_like(sums)
        elif reference is None:
            raise RuntimeError("call prepare() first: the reference log-probs are not known")
        pairs = Pairs.of(sums, reference.to(sums), lengths, self.pair_loss.score)
        if whole is not None:
            counts = sums.new_tensor([lp.numel() for lp in whole])
            pairs = replace(
                pairs, sequence=torch.stack([lp.sum() for lp in whole]), sequence_length=counts
            )
        return self.pair_loss(pairs).mean()

    def _of_responses(self, log_probs: list[Tensor]) -> list[Tensor]:
        """The log-probs of responses alone, where chosen ones come with those of their prompts."""
        chosen = [
            lp[torch.tensor(positions, device=lp.device)]
            for lp, positions in zip(log_probs, self._responses, strict=False)
        ]
        return [*chosen, *log_probs[len(chosen) :]]

    def describe(self) -> dict[str, Any]:
        """Name, parameters, the reference and its log-probs in nats (lists for a batch)."""
        described: dict[str, Any] = {"objective": self.name, **self.pair_loss.parameters}
        if self.pair_loss.needs_reference and self.reference_log_probs is not None:
            known = self.reference_log_probs.tolist()
            described["reference"] = describe_reference(self.reference)
            described["reference_log_probs"] = [k[0] if len(k) == 1 else k for k in known]
        return described

    def describe_start(self, log_probs: Sequence[Tensor]) -> dict[str, Any]:
        """The mean margin log π(y+)/π_ref(y+) − log π(y−)/π_ref(y−) before the step, in nats.

        "distance" is the largest |log π − log π_ref| of a response.
        """
        known = self.reference_log_probs
        if known is None or not self.pair_loss.needs_reference:
            return {}
        sums = self._sums([lp.detach() for lp in log_probs]).double().cpu().view(2, -1)
        gains = sums - known
        return {
            "margin_at_start": float((gains[0] - gains[1]).mean()),
            "reference_distance": float(gains.abs().max()),
        }


def _remarks(chosen: Sequence[Example], rejected: Sequence[Example]) -> list[str]:
    """A sentence on pairs whose prompts differ, where no cut has made them differ."""
    apart = []
    for index, pair in enumerate(zip(chosen, rejected, strict=True)):
        cut = any("truncated_prompt" in dict(example.notes) for example in pair)
        if not cut and pair[0].prompt_ids != pair[1].prompt_ids:
            apart.append(index)
    if not apart:
        return []
    which = "Chosen and rejected"
    if len(chosen) > 1:
        which = (
            f"In {len(apart)} of {len(chosen)} pairs, first in pair {apart[0]}, chosen and rejected"
        )
    return [
        f"{which} have different prompts: the loss compares two responses to one prompt, and "
        "effects through the prompts no longer cancel."
    ]


def _whole(example: Example) -> Example:
    """The example with all its tokens but the first counted."""
    texts = (*example.prompt_texts, *(example.tokens or map(str, example.response_ids)))
    return Example(
        example.ids[:1],
        example.ids[1:],
        name=example.name,
        tokens=texts[1:],
        prompt_tokens=texts[:1],
        notes=example.notes,
    )


def preference(
    loss: str | Loss | Sequence[str],
    chosen: Example | Sequence[Example],
    rejected: Example | Sequence[Example],
    *,
    reference: Reference = "self",
    **parameters: Value,
) -> Preference:
    """An objective on one or several preference pairs: a loss of the table on them as one batch.

    Args:
        loss: A name of the table in `Loss`, several names, or a Loss.
        chosen: χ+ = [x; y+], one Example or one per pair.
        rejected: χ− = [x; y−], likewise.
        reference: Where log π_ref comes from: a model; "self", the policy before the step, as in
            the first step of a run; "adapter-off", the peft model with its adapters disabled;
            "adapter:NAME", with the adapter of this name alone; or log-probs in nats: the pair
            (log π_ref(y+), log π_ref(y−)), numbers for one pair, (N,) each for N. Not computed
            for a loss without a reference.
        **parameters: Parameters of the loss that differ from its defaults.

    Returns:
        An Objective for `decompose`, `massflow` and the like.

    Raises:
        ValueError: If the loss, a parameter or its value is not one of the table's, the reference
            is none of these, or there are not as many rejected as chosen.

    Cost: the reference's log-probs, where they are not given, take one forward pass per response.

    Example:
        >>> import lddyn
        >>> chosen = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> rejected = lddyn.Example(prompt_ids=[1, 2], response_ids=[5])
        >>> ipo = lddyn.preference("ipo", chosen, rejected, beta=0.5, reference=(-3.0, -2.0))
        >>> loss, weights = ipo.weights([torch.tensor([-1.0, -2.0]), torch.tensor([-2.0])])
        >>> loss, weights
        (1.0, [tensor([-1., -1.]), tensor([2.])])
    """
    return Preference(Loss(loss, None, **parameters), chosen, rejected, reference)


class DPO(Preference):
    """Direct preference optimisation on one or several pairs (paper App. B Eq. 12-15).

    L = mean over pairs of −log a,  a = σ(β [log π(y+)/π_ref(y+) − log π(y−)/π_ref(y−)]), log-probs
    summed over tokens; hence w = −β(1 − a)/N on tokens of y+ and +β(1 − a)/N on those of y−. The
    same as `preference("dpo", …)`.

    Args:
        chosen: χ+ = [x; y+], one Example or one per pair.
        rejected: χ− = [x; y−], likewise.
        beta: Inverse temperature β.
        reference: Where log π_ref comes from, as for `preference`.
        label_smoothing: ε of cDPO; where it is not 0 the loss is the table's "cdpo".

    Raises:
        ValueError: If a parameter is out of bounds, the reference is none of those `preference`
            lists, or there are not as many rejected as chosen.
    """

    def __init__(
        self,
        chosen: Example | Sequence[Example],
        rejected: Example | Sequence[Example],
        beta: float = 0.1,
        reference: Reference = "self",
        label_smoothing: float = 0.0,
    ):
        loss = Loss("dpo", beta=beta)
        if label_smoothing != 0:
            loss = Loss("cdpo", beta=beta, label_smoothing=label_smoothing)
        super().__init__(loss, chosen, rejected, reference)
