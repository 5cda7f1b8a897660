"""Long steps: each says once, as it begins, what it is."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import modes_fx
from modes_fx.calib import Importance, layer_importance, search
from modes_fx.cli.terminal import Bars, errors, steps_shown
from modes_fx.data.batch import Batch
from modes_fx.demo import CHECKPOINT
from modes_fx.measure.compare import routing_statistics
from modes_fx.models.loading import load
from tests import harness, tiny
from tests.models.convert.cases import CASES


def batch() -> Batch:
    inputs = tiny.mixed_batch()
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return {**inputs, "labels": labels}


def _search(model: nn.Module) -> Any:
    rows = ((0.5, 0.5),) * len(modes_fx.report(model).sites)
    return search(model, [batch()], Importance(rows, rows, "reference", 1), [0.3], gammas=[0.0], grid_size=3)


STEPS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "importance": (lambda model: layer_importance(model, [batch()], method="naive"), "importance of each layer"),
    "search": (_search, "search for thresholds"),
    "reference": (_search, "the unskipped model answers"),
    "routing": (_search, "routing weights"),
    "statistics": (lambda model: routing_statistics(model, [batch()]), "statistics of the routing"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_long_step_of_an_optimised_model_says_what_it_is_once(
    optimized_vlm: nn.Module, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    step, words = STEPS[name]
    with caplog.at_level(logging.INFO, "modes_fx"):
        step(optimized_vlm)
    assert sum(record.getMessage().startswith(words) for record in caplog.records) == 1
    assert all(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.usefixtures("without_inductor")
def test_tracing_and_converting_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "modes_fx"):
        modes_fx.restore(modes_fx.optimize(CASES["jetmoe"].make()))
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "JetMoeForCausalLM: tracing 2 MoE layers"
    assert said[1].startswith("converting 2 MoE blocks")
    assert said[-1] == "JetMoeForCausalLM: 2 of 2 routing sites rewritten"


def test_compiling_says_so(vlm: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    modes_fx.optimize(vlm)
    with caplog.at_level(logging.INFO, "modes_fx"):
        harness.logits(vlm, tiny.mixed_batch())
    assert any("compiling a graph of" in record.getMessage() for record in caplog.records)


def test_loading_and_building_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "modes_fx"):
        load(str(CHECKPOINT))
        modes_fx.inspect(CHECKPOINT)
    said = [text for record in caplog.records if "torchvision" not in (text := record.getMessage())]  # where it is missing
    assert said[:2] == [f"loading the qwen3_vl_moe model {CHECKPOINT}", "building the qwen3_vl_moe model without its weights"]


def test_the_command_line_shows_each_step_once_and_hears_no_more_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, shown = logging.getLogger("modes_fx.somewhere"), []
    before = logging.getLogger("modes_fx").level
    monkeypatch.setattr(errors, "print", lambda text, **how: shown.append((text, how["style"])))
    with Bars():
        logger.info("a step of %d", 3)
        logger.info("a step of %d", 3)
        logger.warning("mind")
        logger.debug("detail")
    assert shown == [("a step of 3", "dim"), ("mind", "yellow")]
    with steps_shown():
        logger.info("a step of %d", 3)
    logger.info("later")
    assert [text for text, _ in shown] == ["a step of 3", "mind", "a step of 3"]
    assert logging.getLogger("modes_fx").level == before
