"""Two quantities that the paper measures in place of K: a lower bound of its norm, and a sign.

Both need the change of all log-probs of χo in one step, and the factors A and G beside K:

    LBK = ‖Δ log π‖² / (Σ_m ‖A_m‖² Σ_l ‖G_l‖²) <= lr² ‖K‖_F²     (App. C Eq. 26, to first order)
    SignDelta = mean over tokens and vocabulary of Δ log π

The published code differs from Eq. 26: it takes norms over examples, of sums over realised tokens,
and the square root of ‖A‖ twice. These functions follow Eq. 26.

Source: Ren & Sutherland, ICLR 2025, App. C.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lddyn import ops


def lbk(delta_log_probs: Tensor, logits: Tensor, cotangents: Tensor) -> Tensor:
    """The paper's lower bound of lr² ‖K‖_F² from one measured step.

        LBK = ‖Δ log π‖_F² / (‖A‖_F² ‖G‖_F²),     ‖A‖_F² = Σ_m (V − 2 + V ‖π_m‖²)

    It bounds the centred norm `ntk(...).frobenius(reduce="all")` as well, because A Π = A, and
    1ᵀ G = 0 for every loss of log-probs. It holds for a step of plain SGD with rate lr, and for the
    whole M x L kernel.

    Args:
        delta_log_probs: Δ log π (M, V) in nats, measured or predicted.
        logits: Of χo before the step, (M, V).
        cotangents: G (L, V), gradient of the loss on the logits of χu.

    Returns:
        A scalar in float64.

    Raises:
        ValueError: If shapes do not fit, or G is zero.

    Cost: one pass over (M + L) V numbers.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> bool(lddyn.lbk(torch.tensor([[0.5, -0.5]]), logits, torch.tensor([[0.5, -0.5]])) == 1)
        True
    """
    _check(delta_log_probs, logits)
    if cotangents.dim() != 2 or cotangents.shape[1] != logits.shape[1]:
        raise ValueError(
            f"cotangents must be (tokens, vocabulary) = (L, {logits.shape[1]}), got "
            f"{tuple(cotangents.shape)}"
        )
    energy = cotangents.double().pow(2).sum()
    if not float(energy) > 0:
        raise ValueError("cotangents must not be all zero: such a step moves nothing")
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    peak = ops.residual(precise.contiguous(), targets)[3].double()
    vocabulary = logits.shape[1]
    peakiness = (vocabulary - 2 + vocabulary * peak).sum()
    return delta_log_probs.double().pow(2).sum() / (peakiness * energy)


def sign_delta(delta_log_probs: Tensor) -> Tensor:
    """The paper's SignDelta: the mean of Δ log π over tokens and vocabulary, in nats, float64.

    It is negative where most of the vocabulary was pushed down; the mean weighted by π is zero to
    first order.

    Args:
        delta_log_probs: Δ log π (M, V) in nats.

    Raises:
        ValueError: If it is not a matrix with entries.

    Example:
        >>> float(lddyn.sign_delta(torch.tensor([[0.5, -1.5]])))
        -0.5
    """
    _check(delta_log_probs, delta_log_probs)
    return delta_log_probs.double().mean()


def _check(delta_log_probs: Tensor, logits: Tensor) -> None:
    if delta_log_probs.dim() != 2 or delta_log_probs.numel() == 0:
        raise ValueError(
            f"delta_log_probs must be (tokens, vocabulary), got {tuple(delta_log_probs.shape)}"
        )
    if logits.shape != delta_log_probs.shape:
        raise ValueError(
            f"logits must be (tokens, vocabulary) = {tuple(delta_log_probs.shape)}, got "
            f"{tuple(logits.shape)}"
        )
