"""f and g on data, against an oracle that computes both token by token."""

import math
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import modes_fx
from modes_fx.calib import Objective, layer_importance
from modes_fx.calib.objective import divergence_of_rows, optimized
from modes_fx.calib.routing import bin_centres, bin_of
from modes_fx.errors import CalibrationError, NotOptimizedError
from modes_fx.optimize import optimized_state
from modes_fx.plan import SkipPlan
from tests import harness, oracle, tiny
from tests.calib.conftest import Batch, oracle_kl, with_answers, without_labels

INF = math.inf


def test_nothing_skipped_costs_nothing(model: nn.Module, batches: list[Batch]) -> None:
    evaluation = Objective(model, batches).evaluate(torch.zeros(2, 2))
    assert evaluation.kl == 0.0
    assert (evaluation.skip_ratio, evaluation.skip_ratio_text, evaluation.skip_ratio_vision) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_kl_and_ratios_are_the_oracles(model: nn.Module, batches: list[Batch], seed: int) -> None:
    bounds = oracle.random_bounds(tiny.make(), tiny.classes(batches[0]), seed=seed, **without_labels(batches[0]))
    kl, routed, kept = oracle_kl(batches, bounds)
    evaluation = Objective(model, batches).evaluate(bounds)
    assert evaluation.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert evaluation.skip_ratio == pytest.approx(1 - int(kept.sum()) / int(routed.sum()))
    assert evaluation.skip_ratio_text == pytest.approx(1 - int(kept[:, 0].sum()) / int(routed[:, 0].sum()))
    assert evaluation.skip_ratio_vision == pytest.approx(1 - int(kept[:, 1].sum()) / int(routed[:, 1].sum()))


def test_everything_skipped_is_a_ratio_of_one(model: nn.Module, batches: list[Batch]) -> None:
    evaluation = Objective(model, batches).evaluate(torch.full((2, 2), INF))
    assert evaluation.skip_ratio == 1.0
    assert evaluation.kl == pytest.approx(oracle_kl(batches, torch.full((2, 2), INF))[0], rel=1e-4)


def test_answer_tokens_are_the_labels(model: nn.Module, batches: list[Batch]) -> None:
    objective = Objective(model, batches)
    assert objective.answer_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches) == 12
    assert objective.num_layers == 2


def test_a_sample_is_right_if_all_its_answer_tokens_are_the_likeliest(model: nn.Module) -> None:
    batch = with_answers(3)
    predicted = harness.logits(tiny.make(), without_labels(batch)).argmax(-1)
    right = {**batch, "labels": torch.where(batch["labels"] != -100, predicted.roll(1, dims=1), -100)}
    assert Objective(model, [right]).accuracy == 1.0
    last = int(batch["attention_mask"][2].nonzero()[-1])
    right["labels"][2, last] = (right["labels"][2, last] + 1) % tiny.VOCABULARY
    assert Objective(model, [right]).accuracy == pytest.approx(2 / 3)


def test_text_alone_has_no_ratio_of_vision(model: nn.Module) -> None:
    ids = tiny.text_batch(1, 6)["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 3
    evaluation = Objective(model, [{"input_ids": ids, "labels": labels}]).evaluate(torch.full((2, 2), 0.3))
    assert math.isnan(evaluation.skip_ratio_vision)
    assert 0 < evaluation.skip_ratio == evaluation.skip_ratio_text


def test_bounds_and_recording_in_force_come_back(model: nn.Module, batches: list[Batch]) -> None:
    modes_fx.set_plan(model, SkipPlan.uniform(text=0.1, vision=0.2))
    Objective(model, batches).evaluate(torch.full((2, 2), INF))
    assert optimized_state(model).runtime.bounds_in_force.tolist() == torch.tensor([[0.1, 0.2]] * 2).tolist()
    assert not modes_fx.stats(model).recording
    modes_fx.set_plan(model, None)


def test_weights_are_counted_by_layer_and_modality_like_the_oracles(model: nn.Module, batches: list[Batch]) -> None:
    recorder = Objective(model, batches).routing_weights()
    stock = oracle.Oracle(tiny.make(), None)
    for batch in batches:
        stock(tiny.classes(batch), **without_labels(batch))
    flat = torch.cat([tiny.classes(batch).reshape(-1) for batch in batches])
    for modality in range(2):
        for layer in range(2):
            wanted = torch.cat(stock.weights[layer])[flat == modality].flatten().sort().values
            found = bin_centres().repeat_interleave(recorder.counts[layer, modality])
            torch.testing.assert_close(found, wanted.double(), rtol=2**-7, atol=0)
        assert recorder.pairs[modality] == int(stock.routed[:, modality].sum())


def test_a_bin_holds_what_its_centre_stands_for() -> None:
    weights = torch.rand(1000) ** 4
    centres = bin_centres()[bin_of(weights)]
    torch.testing.assert_close(centres, weights.double(), rtol=2**-8, atol=0)
    assert not set(centres.float().tolist()) & set(weights.bfloat16().tolist())
    assert bin_of(torch.tensor([0.0, -1.0])).tolist() == [0, 0]


@pytest.mark.usefixtures("without_inductor")
def test_the_unskipped_answers_keep_the_models_dtype_and_say_their_size(batches: list[Batch]) -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        with optimized(tiny.make(dtype=dtype)) as model:
            objective = Objective(model, batches[:1])
            assert objective.reference_bytes == 6 * tiny.VOCABULARY * size
            assert objective.evaluate(torch.zeros(2, 2)).kl == 0.0


@pytest.mark.usefixtures("without_inductor")
def test_a_model_that_accelerate_spreads_is_measured_like_a_whole_one(batches: list[Batch]) -> None:
    bounds = torch.tensor([[0.3, 0.4], [0.5, 0.2]])
    spread = tiny.make()
    for module in (spread, *spread.model.language_model.layers):  # as `device_map` does, here with one device
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    with optimized(tiny.make()) as whole, optimized(spread):
        assert Objective(spread, batches).evaluate(bounds) == Objective(whole, batches).evaluate(bounds)


def test_divergence_is_the_kl_of_the_rows() -> None:
    p, q = torch.randn(5, 9), torch.randn(5, 9)
    wanted = torch.nn.functional.kl_div(q.log_softmax(1).double(), p.log_softmax(1).double(), reduction="sum", log_target=True)
    assert float(divergence_of_rows(p, q).sum()) == pytest.approx(float(wanted), rel=1e-6)
    assert divergence_of_rows(p.bfloat16(), p.bfloat16()).eq(0).all()


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "at least one batch"),
        ([{"input_ids": torch.ones(1, 2)}], "Batch 0 needs `labels`"),
        ([with_answers(0), {"labels": torch.ones(3)}], "Batch 1 needs `labels`"),
        ([{"labels": torch.full((1, 3), -100)}], "Batch 0 has no answer token"),
        ([{"labels": torch.tensor([[5, -100, -100]])}], "Batch 0 has no answer token"),
        ([3], "Batch 0 needs `labels`"),
    ],
)
def test_unusable_data_is_refused_by_its_number(model: nn.Module, batches: list[Any], match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        Objective(model, batches)


def test_a_stock_model_is_refused(batches: list[Batch]) -> None:
    with pytest.raises(NotOptimizedError):
        Objective(tiny.make(), batches)


def test_labels_of_another_shape_than_the_tokens_are_an_error_that_names_both(model: nn.Module, batches: list[Batch]) -> None:
    wrong = {**batches[0], "labels": batches[0]["labels"][:, 1:]}
    with pytest.raises(CalibrationError, match=r"labels of shape .* for input_ids of shape"):
        Objective(model, [wrong])


@pytest.mark.usefixtures("without_inductor")
def test_a_model_with_another_rule_is_not_calibrated_with_thresholds(batches: list[Batch]) -> None:
    reduced = modes_fx.optimize(tiny.make(), modes_fx.SkipPlan.reduce_k(1))
    with pytest.raises(CalibrationError, match="reduce_k"):
        layer_importance(reduced, batches)
