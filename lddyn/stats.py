"""Rank correlations and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["bootstrap", "spearman"]


def spearman(score: Tensor, target: Tensor, seed: int = 0) -> dict[str, float]:
    """Spearman's rank correlation with a 95 % percentile interval, bootstrapped over pairs.

    Args:
        score: (n,).
        target: (n,), float64.
        seed: Seed of the 2,000 resamples.

    Returns:
        "rho", and the interval from "low" to "high". A constant score has rho 0.

    Example:
        >>> from lddyn.stats import spearman
        >>> x = torch.arange(9.0, dtype=torch.float64)
        >>> round(spearman(x, x**3)["rho"], 6)
        1.0
    """
    generator, n = torch.Generator().manual_seed(seed), len(score)
    picks = torch.randint(n, (2000, n), generator=generator)
    resampled = _rank_correlation(score[picks], target[picks])
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return {"rho": float(_rank_correlation(score, target)), "low": low, "high": high}


def _rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rho along the last dimension."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(v.numpy(), axis=-1)) for v in (x, y)]
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    lengths: Tensor = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / lengths.clamp(min=1e-300)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values))


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = _mean,
    *,
    generator: torch.Generator | None = None,
    count: int = 2000,
) -> tuple[float, tuple[float, float]]:
    """A statistic and its 95 % percentile interval, bootstrapped over the first axis.

    Args:
        values: (P, …), one entry per prompt.
        statistic: Function of such an array. Default: the mean, without NaN.
        generator: Random numbers of the resampling. None: torch's default generator.
        count: Number of resamples.

    Returns:
        The statistic of `values`, and (low, high).

    Example:
        >>> value, (low, high) = bootstrap(np.array([1.0, 2.0, 3.0]))
        >>> value, 1.0 <= low <= high <= 3.0
        (2.0, True)
    """
    picks = torch.randint(len(values), (count, len(values)), generator=generator).numpy()
    resampled = np.array([statistic(values[rows]) for rows in picks])
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return statistic(values), (float(low), float(high))
