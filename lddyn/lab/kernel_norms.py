"""‖K‖_F beside what the paper measures in its place, and the Gram matrix of whole responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.gradient import flat_gradient, gradient_of
from lddyn.engine.gram import sequence_gram
from lddyn.engine.logits import own_response
from lddyn.entk.operator import ntk
from lddyn.entk.proxies import lbk, sign_delta
from lddyn.lab.record import Row
from lddyn.steps.setup import shifted_copy

__all__ = ["influence", "kernel_norms", "some_tokens"]


def influence(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """⟨∇ log π(y_i), ∇ log π(y_j)⟩ of whole responses, (N, N) float64.

    Times η it is what one SGD step on −log π(y_j) does to log π(y_i), to first order.

    Cost: one backward pass and one gradient in memory per example.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return sequence_gram(
        [flat_gradient(own_response(model, e).log_probs.sum(), parameters) for e in examples]
    )


def some_tokens(example: Example, count: int) -> Example:
    """The example with `count` evenly spaced response tokens counted; all if it has fewer."""
    if len(example.response_ids) <= count:
        return example
    last = len(example.response_ids) - 1
    chosen = {round(float(k)) for k in np.linspace(0, last, count)}
    return replace(example, response_mask=tuple(k in chosen for k in range(last + 1)))


def kernel_norms(
    model: nn.Module,
    updated: Example,
    observed: Mapping[str, Example],
    *,
    lr: float = 1e-5,
    rtol: float = 0.1,
    seed: int = 0,
) -> list[Row]:
    """‖K(χo, χu)‖_F, and the paper's LBK and SignDelta of one real SGD step on χu.

    All of the same counted tokens. K is centred, which loses nothing of log π; to first order
    lr² ‖K‖_F² >= LBK (paper App. C.2).

    Args:
        model: A causal LM of transformers.
        updated: χu, learned by plain SGD with this rate; the model stays as it is.
        observed: χo by name.
        lr: η of the step.
        rtol: Wanted relative standard error of ‖K‖_F.
        seed: Of the estimator's probes.

    Returns:
        One row per observed: "norm", "stderr", "lbk_norm" (√LBK / η, on the norm's scale), "sign"
        (SignDelta / η), "realised" (first-order Δ log π / η).

    Cost: one estimate of ‖K‖_F each, see NTK.frobenius; one forward pass each for the rest.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    learned = own_response(model, updated)
    ascent = gradient_of(learned.log_probs.sum(), parameters)
    moved = shifted_copy(model, {name: lr * g for name, g in ascent.items()})
    rows = []
    with torch.no_grad():
        realised = nn.functional.one_hot(learned.targets, learned.logits.shape[1])
        residual = learned.logits.softmax(-1) - realised
    for name, example in observed.items():
        estimate = ntk(model, example, updated).frobenius(rtol, reduce="all", seed=seed)
        with torch.no_grad():
            before, after = own_response(model, example), own_response(moved, example)
            delta = after.logits.double().log_softmax(-1) - before.logits.double().log_softmax(-1)
            gained = after.log_probs.double() - before.log_probs.double()
        rows.append(
            {
                "observed": name,
                "norm": float(estimate.value),
                "stderr": float(estimate.stderr),
                "lbk_norm": float(lbk(delta, before.logits, residual).sqrt()) / lr,
                "sign": float(sign_delta(delta)) / lr,
                "realised": float(gained.sum()) / lr,
            }
        )
    return rows
