"""Rank correlations and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["bootstrap"]


def spearman(score: Tensor, target: Tensor, seed: int = 0) -> dict[str, float]:
    """Rank correlation "rho" and the 95 % interval "low" to "high" of a bootstrap over places."""
    from scipy.stats import rankdata

    generator, n = torch.Generator().manual_seed(seed), len(score)
    picks = torch.randint(n, (2000, n), generator=generator)

    def rho(x: Tensor, y: Tensor) -> Tensor:
        ranks = [torch.from_numpy(rankdata(v.numpy(), axis=-1)) for v in (x, y)]
        a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
        found: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-300)
        return found

    drawn = rho(score[picks], target[picks])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return {"rho": float(rho(score, target)), "low": low, "high": high}


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda x: float(np.nanmean(x)),
    *,
    generator: torch.Generator | None = None,
    count: int = 2000,
) -> tuple[float, tuple[float, float]]:
    """A statistic over prompts and its 95 % percentile interval.

    Args:
        values: (P, …): the first axis is resampled.
        statistic: Of such an array.
        generator: Of the resampling.
        count: Resamples.

    Example:
        >>> value, (low, high) = bootstrap(np.array([1.0, 2.0, 3.0]))
        >>> value, 1.0 <= low <= high <= 3.0
        (2.0, True)
    """
    at = torch.randint(len(values), (count, len(values)), generator=generator).numpy()
    found = np.array([statistic(values[rows]) for rows in at])
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return statistic(values), (float(low), float(high))
