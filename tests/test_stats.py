"""Rank correlations and bootstrap intervals against scipy and simulation."""

import numpy as np
import pytest
import torch
from scipy import stats

from lddyn.stats import bootstrap, spearman


def test_spearman_is_scipys_with_ties():
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(60, generator=generator).double().round(decimals=1)
    target = score + torch.randn(60, generator=generator).double()
    got = spearman(score, target)
    assert got["rho"] == pytest.approx(stats.spearmanr(score, target).statistic, abs=1e-12)
    assert got["low"] < got["rho"] < got["high"]
    assert spearman(score, target) == got and spearman(score, target, seed=1) != got


def test_spearman_of_a_constant_is_zero():
    assert spearman(torch.ones(9).double(), torch.arange(9).double())["rho"] == 0


def test_bootstrap_intervals_cover_the_mean():
    """Percentile intervals of 60 values: a little less than 95 %."""
    random, covered = np.random.default_rng(0), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        value, (low, high) = bootstrap(
            random.normal(size=60), lambda x: float(x.mean()), generator=generator, count=400
        )
        assert low <= value <= high
        covered += low <= 0 <= high
    assert 0.91 <= covered / 400 <= 0.97


def test_bootstrap_resamples_rows():
    values = np.stack([np.arange(20.0), -np.arange(20.0)], 1)
    value, (low, high) = bootstrap(values, lambda x: float(x.sum()))
    assert value == low == high == 0.0
