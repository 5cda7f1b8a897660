"""What the frontier search knows while it runs: the region left open, and a local model of a function."""

import itertools
import math

import pytest

from modes_fx.calib.frontier_state import LocalModel, Region


def test_walk_bound_counts_each_gap_alone() -> None:
    region = Region(5, 4)
    assert region.walk_bound() == 5 + 4 - 1
    region.rule_out(2, 1)
    region.close(2, 2)  # column 2 is settled: columns 0-1 keep rows 2-3, columns 3-4 rows 0-1
    assert region.gaps() == [(0, 1), (3, 4)]
    assert region.walk_bound() == 3 + 3


def test_local_model_recovers_a_plane_and_survives_degenerate_samples() -> None:
    model = LocalModel()
    assert model(3, 3) == 0.0
    for q, p in itertools.product(range(0, 20, 5), repeat=2):
        model.add(q, p, 2.0 * q - p)
    model.add(1, 1, math.inf)
    assert model(7, 8) == pytest.approx(6.0, abs=0.5)
    line = LocalModel()
    for q in range(6):
        line.add(q, 0, 1.0)
    assert line(0, 40) == pytest.approx(1.0, abs=1e-3)
