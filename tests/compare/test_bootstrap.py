"""Intervals over samples."""

import math

import pytest
import torch

from modes_fx.compare import ratio_interval


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = torch.randn(400, dtype=torch.float64)
    low, high = ratio_interval(values, torch.ones(400), rounds=4000)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.015)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.015)


def test_pairs_stay_together() -> None:
    right = torch.randint(0, 2, (50,))
    assert ratio_interval(right, right) == (1.0, 1.0)  # unpaired draws would spread
    low, high = ratio_interval(right * torch.tensor([0] * 5 + [1] * 45), right)
    assert 0.5 < low < high <= 1.0


def test_equal_seeds_draw_equal_samples() -> None:
    values = torch.rand(30)
    ones = torch.ones(30)
    assert ratio_interval(values, ones, seed=1) == ratio_interval(values, ones, seed=1) != ratio_interval(values, ones, seed=2)


def test_without_anything_to_divide_by_there_is_no_interval() -> None:
    low, high = ratio_interval(torch.ones(3), torch.zeros(3))
    assert math.isnan(low)
    assert math.isnan(high)
