"""Scores of a pair from the outputs of its two forward passes; they do not depend on the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.logits import Response
from lddyn.entk.proxies import lbk

__all__ = ["Readings", "ResponseReading", "edit_distance", "lbk_of_pair", "read_pair"]


@dataclass(frozen=True)
class Readings:
    """Scores of N pairs from forward passes alone; they do not depend on the loss.

    Attributes:
        log_probs: log π(y+) and log π(y−), (2, N) float64, nats.
        facts: Name in `SCORES` -> (N,) float64, for scores that do not depend on the loss.
        token_facts: Name in `TOKENS` -> one tensor a pair, the M tokens of y+, then the K of y−.
        observed: log π of the observed sequences, (M,) float64, nats.
    """

    log_probs: Tensor
    facts: Mapping[str, Tensor]
    token_facts: Mapping[str, Sequence[Tensor]]
    observed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def with_fact(self, name: str, values: Tensor) -> Readings:
        """The readings with one more score (N,)."""
        return replace(self, facts={**self.facts, name: values})


@dataclass(frozen=True)
class ResponseReading:
    """One response of M counted tokens, read by one forward pass; tensors are on the host.

    Attributes:
        log_probs: log π of each token, (M,) float64, nats.
        logits: (M, V) float32.
        targets: Token ids, (M,).
        hidden: Last hidden states, (M, d) float32.
        tau: Mean ‖π‖² − π_y over the tokens.
        squeeze: Part of the probability freed in each softmax that its largest gainer gets.
    """

    log_probs: Tensor
    logits: Tensor
    targets: Tensor
    hidden: Tensor
    tau: float
    squeeze: float

    @classmethod
    def of(cls, response: Response) -> ResponseReading:
        """Reads the outputs of a forward pass, without its graph."""
        logits, targets = response.logits.detach(), response.targets
        square = ops.residual(logits.contiguous(), targets)[3].double()
        log_prob = response.log_probs.detach().double()
        threshold = square - log_prob.exp()
        # In one softmax, lowering y moves π_v by π_v (π_v − τ): the tokens that rise share all
        # the probability that is freed.
        pi = logits.double().softmax(-1)
        rising = (pi * (pi - threshold[:, None])).clamp(min=0).scatter(1, targets[:, None], 0.0)
        return cls(
            log_prob.cpu(),
            logits.cpu(),
            targets.cpu(),
            response.hidden.detach().float().cpu(),
            tau=float(threshold.mean()),
            squeeze=float(rising.amax(1).sum() / rising.sum().clamp(min=1e-300)),
        )


def read_pair(
    chosen: Example, rejected: Example, up: ResponseReading, down: ResponseReading
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scores of a pair, and of each of its tokens, that do not depend on the objective."""

    def nthr(reading: ResponseReading) -> Tensor:
        inner = ops.residual_gram(up.logits, up.targets, reading.logits, reading.targets)
        alike = (up.hidden @ reading.hidden.T).double()
        return (inner.double() * alike).sum(0)

    h, r = up.hidden.double(), down.hidden.double()
    sum_chosen, sum_rejected = h.sum(0), r.sum(0)
    m, k = len(chosen), len(rejected)
    longer = max(len(chosen.response_ids), len(rejected.response_ids))
    tokens = {
        "nthr": torch.cat([nthr(up), nthr(down)]),
        "ches": torch.cat([-h @ sum_chosen, r @ sum_chosen]),
        "log_prob": torch.cat([up.log_probs, down.log_probs]),
    }
    cross, square = sum_chosen @ sum_rejected, sum_chosen @ sum_chosen
    cosine = torch.nn.functional.cosine_similarity(sum_chosen, sum_rejected, dim=0)
    facts = {
        "head_inner": float(tokens["nthr"][m:].sum()),
        "ches": float(cross - square),
        "ches_per_token": float(cross / (m * k) - square / m**2),
        "edit_distance": edit_distance(chosen.response_ids, rejected.response_ids) / longer,
        "similarity": float(cosine),
        "valley": float(down.log_probs.mean()),
        "tau": down.tau,
        "squeeze": down.squeeze,
    }
    return facts, tokens


def lbk_of_pair(change: Tensor, logits: Tensor, rejected: Tensor, targets: Tensor) -> float:
    """LBK of a step on y− at y+.

    Args:
        change: Change of log π of every token at the positions of y+ by the step, (M, V).
        logits: Logits at these positions, (M, V).
        rejected: Logits of y−, (K, V).
        targets: Its tokens, (K,).
    """
    cotangents = ops.residual(rejected, targets)[0]
    if not bool(cotangents.any()):
        return 0.0
    return float(lbk(change.to(logits), logits, cotangents))


def edit_distance(one: Sequence[int] | str, other: Sequence[int] | str) -> int:
    """Least number of insertions, deletions and substitutions that make one sequence the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
