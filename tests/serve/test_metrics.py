"""What is said of pairs; without vLLM."""

import torch

from modes_fx.serve.metrics import summary
from modes_fx.serve.settings import Settings
from modes_fx.serve.thresholds import Thresholds
from modes_fx.serve.worker import Serving
from tests.serve.test_settings import SERVED, two_layers


def test_the_line_names_what_was_seen() -> None:
    seen = {("text", "prefill"): (100, 75), ("vision", "prefill"): (300, 25)}
    assert summary(seen) == "75.0% of pairs skipped (text prefill 25.0%, vision prefill 91.7%)"


def test_pairs_are_handed_out_once() -> None:
    thresholds = Thresholds([2, 2], 4, torch.device("cpu"))
    serving = Serving(Settings(two_layers(), 0.5), thresholds, list(SERVED), counts=True)
    thresholds.begin(torch.tensor([0, 1, 2]), 3)
    assert serving.take_pairs() == [4, 0, 4, 0, 4, 0, 0, 0]
    assert serving.take_pairs() == [0] * 8
    assert serving.pairs() == [4, 0, 4, 0, 4, 0, 0, 0]


def test_one_of_the_ranks_that_compute_the_same_layers_counts() -> None:
    serving = Serving(Settings(two_layers()), Thresholds([2, 2], 4, torch.device("cpu")), list(SERVED), counts=False)
    assert serving.pairs() is serving.take_pairs() is None
