"""Estimates: intervals, storage, and what they refuse."""

import pytest
import torch

from lddyn import Estimate


def test_intervals_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 9, generator=generator) + 3
    estimate = Estimate(draws.mean(1), draws.std(1) / 3, samples=9)
    low, high = estimate.interval(0.95)
    assert 0.93 <= ((low <= 3) & (high >= 3)).float().mean() <= 0.97
    narrow = Estimate(estimate.value, estimate.stderr).interval(0.95)
    assert (narrow[0] > low).all()


def test_saved_and_read_back(tmp_path):
    estimate = Estimate(torch.randn(3, 2), torch.rand(3, 2), samples=8)
    estimate.save(tmp_path / "deep" / "estimate")
    read = Estimate.load(tmp_path / "deep" / "estimate")
    assert torch.equal(read.value, estimate.value) and torch.equal(read.stderr, estimate.stderr)
    assert read.samples == 8 and read[1].value.shape == (2,)


def test_bad_input():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="shape of value"):
        Estimate(one, torch.ones(3))
    with pytest.raises(ValueError, match="two samples"):
        Estimate(one, one, samples=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Estimate(one, one).interval(1.0)
