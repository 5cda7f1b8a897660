"""alpha: what each layer matters, for each modality."""

import math

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.calib import Importance, layer_importance
from modes_fx.errors import CalibrationError, NotOptimizedError
from modes_fx.optimize import optimized_state
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.calib.conftest import Batch, oracle_kl
from tests.harness import model_state


def columns(importance: Importance) -> list[float]:
    return torch.tensor(importance.alpha, dtype=torch.float64).sum(0).tolist()


def test_reference_mode_skips_one_modality_of_one_layer(model: nn.Module, batches: list[Batch]) -> None:
    importance = layer_importance(model, batches)
    assert (importance.mode, importance.answer_tokens) == ("reference", 12)
    assert columns(importance) == pytest.approx([1.0, 1.0])
    for layer in range(2):
        for modality in range(2):
            bounds = torch.zeros(2, 2)
            bounds[layer, modality] = math.inf
            assert importance.kl[layer][modality] == pytest.approx(oracle_kl(batches, bounds)[0], rel=1e-4, abs=1e-7)


def test_visual_tokens_of_the_last_layer_cannot_change_an_answer(model: nn.Module, batches: list[Batch]) -> None:
    importance = layer_importance(model, batches)
    assert importance.alpha[-1][1] == 0.0
    assert importance.alpha[0][1] == 1.0


def test_paper_mode_skips_a_layer_for_all_tokens(model: nn.Module, batches: list[Batch]) -> None:
    importance = layer_importance(model, batches, mode="paper")
    assert columns(importance) == pytest.approx([1.0, 1.0])
    for layer, (text, vision) in enumerate(importance.alpha):
        assert text == vision
        bounds = torch.zeros(2, 2)
        bounds[layer] = math.inf
        assert importance.kl[layer][0] == pytest.approx(oracle_kl(batches, bounds)[0], rel=1e-4)


def test_a_modality_that_is_absent_gives_all_layers_the_same(model: nn.Module) -> None:
    ids = tiny.text_batch(1, 6)["input_ids"]
    importance = layer_importance(model, [{"input_ids": ids, "labels": ids}])
    assert [vision for _, vision in importance.alpha] == [0.5, 0.5]


@pytest.mark.parametrize(("mode", "passes"), [("reference", 4), ("paper", 2)])
def test_progress_counts_the_passes(model: nn.Module, batches: list[Batch], mode: str, passes: int) -> None:
    steps = []
    layer_importance(model, batches[:1], mode, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(done + 1, passes) for done in range(passes)]


@pytest.mark.usefixtures("without_inductor")
def test_a_stock_model_is_a_stock_model_afterwards(vlm: nn.Module, batches: list[Batch]) -> None:
    before = model_state(vlm)
    layer_importance(vlm, batches[:1], "paper")
    assert model_state(vlm) == before
    with pytest.raises(NotOptimizedError):
        modes_fx.report(vlm)


@pytest.mark.usefixtures("without_inductor")
def test_a_stock_model_is_a_stock_model_after_a_failure_too(vlm: nn.Module) -> None:
    before = model_state(vlm)
    with pytest.raises(CalibrationError, match="at least one batch"):
        layer_importance(vlm, [])
    assert model_state(vlm) == before


def test_thresholds_in_force_come_back(model: nn.Module, batches: list[Batch]) -> None:
    modes_fx.set_plan(model, SkipPlan.uniform(text=0.25, vision=0.5))
    layer_importance(model, batches[:1], "paper")
    assert optimized_state(model).runtime.bounds_in_force.tolist() == [[0.25, 0.5]] * 2
    modes_fx.set_plan(model, None)


def test_an_unknown_mode_is_refused_with_the_known_ones(model: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match=r"'fast'; known: reference, paper"):
        layer_importance(model, batches, "fast")
