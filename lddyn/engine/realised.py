"""Log-probs of realised tokens, with a derivative that keeps its digits for learned tokens.

The derivative of log π_y with respect to the logits is e_y − π. A backward pass through
`log_softmax` computes 1 − π_y by subtraction: in float32 nothing of it is left below
1 − π_y = 6e-8. `ops.residual` sums the probabilities of the other tokens instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lddyn import ops


class _Realised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows, log_probs, *_ = ops.residual(logits.contiguous(), targets)
        ctx.save_for_backward(rows)
        ctx.dtype = logits.dtype
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return (rows * grad[:, None]).to(ctx.dtype), None


def realised_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log π(y_m) (M,) of realised tokens, in nats, with a graph that is differentiable once.

    Args:
        logits: (M, V).
        targets: Token ids (M,).
    """
    log_probs: Tensor = _Realised.apply(logits, targets)  # type: ignore[no-untyped-call]
    return log_probs
