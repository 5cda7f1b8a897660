"""Intervals over samples and over models."""

import math

import pytest
import torch

from modes_fx.measure.compare import ratio_interval
from modes_fx.measure.compare.intervals import mean_interval, t_quantile


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


@pytest.mark.parametrize("models", [2, 3, 5, 11, 12, 40])
def test_the_interval_over_models_is_students(models: int) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    assert t_quantile(models - 1) == pytest.approx(scipy_stats.t.ppf(0.975, models - 1), abs=1e-3)
    values = (99 + torch.randn(models, dtype=torch.float64)).tolist()
    wanted = scipy_stats.t.interval(0.95, models - 1, sum(values) / models, scipy_stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted, abs=1e-3)


def test_one_model_tells_nothing_of_others_and_nothing_is_below_zero() -> None:
    assert all(math.isnan(end) for end in mean_interval([0.5]))
    assert mean_interval([0.0, 1.0]) == (0.0, pytest.approx(0.5 + 12.7062 / 2))
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
