"""Statistics of tables over classes: rank correlations, bootstrap intervals, pairs of classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from lddyn.lab.mnist.measure import CLASSES, Halves
from lddyn.lab.record import Lab, Verdict

__all__ = [
    "DIFFERENT",
    "PAIRS",
    "STRONG",
    "asymmetry",
    "draws",
    "interval",
    "means_by_class",
    "other_images",
    "pair_means",
    "percentiles",
    "six_digits",
    "spearman",
    "verdict",
]

STRONG = 0.5  # a correlation above this is called strong; stated before anything was measured
DIFFERENT = ~np.eye(CLASSES, dtype=bool)  # entries of a (10, 10) table that are off the diagonal
PAIRS = [(a, b) for a in range(CLASSES) for b in range(a + 1, CLASSES)]
_REPEATS = 1000  # of a bootstrap


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> np.ndarray:
    """Rank correlation along the last dimension."""
    ranks = [rankdata(x, axis=-1) for x in (a, b)]
    x, y = (r - r.mean(-1, keepdims=True) for r in ranks)
    correlation: np.ndarray = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return correlation


def draws(lab: Lab, label: str, sizes: Sequence[int]) -> np.ndarray:
    """Bootstrap indices (repeats, Σ sizes): drawn with replacement within groups of these sizes."""
    generator, offset, parts = lab.generator("bootstrap", label), 0, []
    for size in sizes:
        parts.append(torch.randint(size, (_REPEATS, size), generator=generator) + offset)
        offset += size
    return torch.cat(parts, 1).numpy()


def interval(values: npt.ArrayLike) -> tuple[float, float]:
    """The middle 95 % of bootstrap repeats."""
    low, high = np.quantile(np.asarray(values), (0.025, 0.975))
    return float(low), float(high)


def means_by_class(norms: np.ndarray) -> np.ndarray:
    """(…, 10 n, 10 m), sorted by class, to means by class (…, 10, 10)."""
    *lead, rows, columns = norms.shape
    blocks = norms.reshape(*lead, CLASSES, rows // CLASSES, CLASSES, columns // CLASSES)
    means: np.ndarray = blocks.mean((-3, -1))
    return means


def pair_means(by_class: np.ndarray) -> np.ndarray:
    """(…, 10, 10) to the 45 pairs of different classes, both directions averaged: (…, 45)."""
    return np.stack([(by_class[..., a, b] + by_class[..., b, a]) / 2 for a, b in PAIRS], -1)


def percentiles(values: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Mean rank of these pairs among the 45 values, as a percentage 0 … 100: (…,)."""
    at = [PAIRS.index(pair) for pair in pairs]
    ranks = rankdata(values, axis=-1)[..., at].mean(-1)
    percent: np.ndarray = 100 * (ranks - 1) / (len(PAIRS) - 1)
    return percent


def asymmetry(table: np.ndarray) -> np.ndarray:
    """‖M − Mᵀ‖ / ‖M + Mᵀ‖ off the diagonal: 0 for a symmetric table."""
    off, turned = table * DIFFERENT, np.swapaxes(table * DIFFERENT, -1, -2)
    ratio: np.ndarray = np.linalg.norm(off - turned, axis=(-2, -1)) / np.linalg.norm(
        off + turned, axis=(-2, -1)
    )
    return ratio


def verdict(holds: bool, testable: bool = True) -> Verdict:
    """A claim that holds agrees; one that fails on other images than it names is not testable."""
    if holds:
        return "agrees"
    return "disagrees" if testable else "not testable at this scale"


def other_images(halves: Halves) -> str:
    """Which images a claim that failed was tested on."""
    if halves.unseen.published:
        return "on the paper's images"
    return f"the claim names classes of MNIST, these are {halves.unseen.source}"


def six_digits(value: float) -> float:
    """Rounded to six significant digits."""
    return float(f"{value:.6g}")
