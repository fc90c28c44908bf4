"""KTO: single responses, each labelled desirable or not (Ethayarajh et al. 2024, 2402.01306)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.logits import token_log_probs
from lddyn.engine.reference_policy import (
    Reference,
    check_reference,
    describe_reference,
    reference_log_probs,
)
from lddyn.objectives.losses import (
    FINITE,
    NOT_NEGATIVE,
    Parameter,
    kto_desirable,
    kto_undesirable,
)
from lddyn.objectives.objective import Objective, several

__all__ = ["KTO"]

_PARAMETERS = {
    "beta": Parameter(0.1),
    "desirable_weight": Parameter(1.0, NOT_NEGATIVE),
    "undesirable_weight": Parameter(1.0, NOT_NEGATIVE),
}


class KTO(Objective):
    """KTO on single responses, as one batch of TRL's KTOTrainer.

    L = mean over responses of λ σ(−β(r − z)) where desirable, μ σ(−β(z − r)) where not, with
    r = log π(y) − log π_ref(y) and z = max(0, mean of log π − log π_ref over mismatched responses),
    which is not differentiated. "apo_zero_unpaired" has z = 0 and weighs the same terms.

    Args:
        examples: One Example, or a sequence of them as one batch.
        labels: Whether each response is desirable: one bool per example.
        beta: Inverse temperature β.
        desirable_weight, undesirable_weight: λ and μ.
        reference: Where log π_ref comes from, as for `preference`; log-probs are (N,).
        loss_type: TRL's "kto" or "apo_zero_unpaired".
        kl: z in nats. None: computed. It is 0 where the reference is the policy itself.
        kl_examples: Mismatched prompts and responses that z is computed from. None: every prompt
            with the response of the example before it, as in TRL, which needs two examples.

    Raises:
        ValueError: If there are not as many labels as examples, a parameter is out of bounds, or
            z cannot be computed from one example.

    Cost: the reference's log-probs take one forward pass per response; z two more.

    Example:
        >>> import lddyn
        >>> good, bad = lddyn.Example([1, 2], [3]), lddyn.Example([1, 2], [4])
        >>> kto = lddyn.KTO([good, bad], [True, False], reference=[-1.0, -2.0], kl=0.0)
        >>> kto.weights([torch.tensor([-1.0]), torch.tensor([-2.0])])
        (0.5, [tensor([-0.0125]), tensor([0.0125])])
    """

    name = "kto"

    def __init__(
        self,
        examples: Example | Sequence[Example],
        labels: bool | Sequence[bool],
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: Reference = "self",
        loss_type: str = "kto",
        kl: float | None = None,
        kl_examples: Sequence[Example] | None = None,
    ):
        given = several(examples)
        flags = [labels] if isinstance(labels, bool) else [bool(x) for x in labels]
        if len(flags) != len(given):
            raise ValueError(
                f"labels must be one bool per example, got {len(flags)} for {len(given)}"
            )
        if loss_type not in ("kto", "apo_zero_unpaired"):
            raise ValueError(f"loss_type must be 'kto' or 'apo_zero_unpaired', got {loss_type!r}")
        values = (beta, desirable_weight, undesirable_weight)
        self.parameters = {
            key: float(p.checked(key, value))
            for (key, p), value in zip(_PARAMETERS.items(), values, strict=True)
        }
        self.labels, self.loss_type, self.reference = flags, loss_type, reference
        self._take(given, [e.name or f"response {i}" for i, e in enumerate(given)])
        self.reference_log_probs = check_reference(reference, len(given), sides=1)
        self.kl = 0.0 if loss_type != "kto" else kl
        if self.kl is not None:
            Parameter(0.0, FINITE).checked("kl", self.kl)
        self._mismatched = list(kl_examples or _mismatched(given))

    def subset(self, rows: Sequence[int]) -> Self:
        """The loss of some responses as one batch; z stays that of all of them."""
        part = super().subset(rows)
        part.labels = [self.labels[i] for i in rows]
        if self.reference_log_probs is not None:
            part.reference_log_probs = self.reference_log_probs.view(-1)[list(rows)]
        return part

    def prepare(self, anatomy: Anatomy) -> Self:
        """A copy whose reference log-probs and z are those of this moment."""
        prepared = super().prepare(anatomy)
        prepared.reference_log_probs = reference_log_probs(
            self.reference, anatomy, self.examples, sides=1
        )
        if prepared.kl is None:
            prepared.kl = self._divergence(anatomy)
        return prepared

    def _divergence(self, anatomy: Anatomy) -> float:
        """The estimate z of KL(π ‖ π_ref) from mismatched responses, nats."""
        if isinstance(self.reference, str) and self.reference == "self":
            return 0.0
        if check_reference(self.reference, len(self.examples), sides=1) is not None:
            raise ValueError(
                "kl is needed where the reference is given as log-probs: z in nats, 0 where policy "
                "and reference are the same"
            )
        if not self._mismatched:
            raise ValueError(
                "KTO estimates z from prompts with the response of another example: give two "
                "examples or more, kl_examples, or kl"
            )
        policy = torch.stack([lp.sum() for lp in token_log_probs(anatomy, self._mismatched)])
        known = reference_log_probs(self.reference, anatomy, self._mismatched, sides=1)
        return max(0.0, float((policy.double().cpu() - known).mean()))

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The mean over responses."""
        if self.reference_log_probs is None or self.kl is None:
            raise RuntimeError("call prepare() first: the reference log-probs are not known")
        sums = torch.stack([lp.sum() for lp in log_probs])
        gains = sums - self.reference_log_probs.to(sums).view(-1)
        desirable = torch.tensor(self.labels, device=sums.device)
        p = self.parameters
        good = p["desirable_weight"] * kto_desirable(gains, p["beta"], self.kl)
        bad = p["undesirable_weight"] * kto_undesirable(gains, p["beta"], self.kl)
        return torch.where(desirable, good, bad).mean()

    def describe(self) -> dict[str, Any]:
        """Name, parameters, labels, z, the reference and its log-probs in nats."""
        known = self.reference_log_probs
        return {
            "objective": self.name,
            "loss_type": self.loss_type,
            **self.parameters,
            "labels": self.labels,
            "kl": self.kl,
            "reference": describe_reference(self.reference),
            "reference_log_probs": None if known is None else known.view(-1).tolist(),
        }

    def describe_start(self, log_probs: Sequence[Tensor]) -> dict[str, Any]:
        """The largest |log π − log π_ref| of a response before the step, in nats."""
        if self.reference_log_probs is None:
            return {}
        sums = torch.stack([lp.detach().sum() for lp in log_probs]).double().cpu()
        distance = (sums - self.reference_log_probs.view(-1)).abs().max()
        return {"reference_distance": float(distance)}


def _mismatched(examples: Sequence[Example]) -> list[Example]:
    """Every prompt with the response of the example before it; none of a single example."""
    if len(examples) < 2:
        return []
    before = [examples[-1], *examples[:-1]]
    return [
        Example(e.prompt_ids, other.response_ids, other.response_mask)
        for e, other in zip(examples, before, strict=True)
    ]
