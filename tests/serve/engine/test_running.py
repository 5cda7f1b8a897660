"""A server while it runs: other targets, cached prefixes, what it counts and reports, and what a dropped pair never touches."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from modes_fx.demo import CHECKPOINT
from modes_fx.errors import PlanError
from modes_fx.plan import SkipPlan
from modes_fx.serve.metrics import report_with_log
from modes_fx.serve.plugin import register
from tests.serve.engine.conftest import (
    HALF,
    IN_CHUNKS,
    MOST,
    NONE,
    Asked,
    answer,
    make_engine,
    pairs,
    ratios,
    set_target,
    thresholds_of,
    worker_of,
)


def counted(modality: str, phase: str, kept: str) -> float:
    labels = {"modality": modality, "phase": phase, "kept": kept}
    return REGISTRY.get_sample_value("modes_fx_pairs_total", labels) or 0.0


def test_another_target_is_in_force_at_once(served: Any, questions: list[Asked]) -> None:
    seen = {}
    for target in (MOST, NONE, HALF, MOST):
        set_target(served, target, target)
        before = pairs(served)
        answer(served, questions[:4])
        seen[target] = ratios(before, pairs(served))
    for name in seen[MOST]:
        assert seen[NONE][name] == 0.0 < seen[HALF][name] < seen[MOST][name]


def test_a_target_that_the_plan_lacks_changes_nothing(served: Any) -> None:
    set_target(served, HALF, NONE)
    before = thresholds_of(served).bounds.clone()
    with pytest.raises(PlanError, match=r"no target 0\.9; its targets: 0, 0\.5, 0\.75"):
        set_target(served, MOST, 0.9)
    assert torch.equal(thresholds_of(served).bounds, before)


def test_pairs_are_logged_and_counted_once(served: Any, questions: list[Asked]) -> None:
    set_target(served, MOST, HALF)
    served.llm_engine.do_log_stats()  # whatever other tests left
    names = [(modality, phase) for modality in ("text", "vision") for phase in ("prefill", "decode")]
    old = {(*name, kept): counted(*name, kept) for name in names for kept in ("true", "false")}
    before = pairs(served)
    answer(served, questions[:4])
    grown = [new - old for new, old in zip(pairs(served), before, strict=True)]
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.modes_fx")
    logger.addHandler(listener)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        served.llm_engine.do_log_stats()
        served.llm_engine.do_log_stats()  # nothing new: no line
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    for index, name in enumerate(names):
        routed, kept = grown[2 * index : 2 * index + 2]
        assert counted(*name, "true") - old[(*name, "true")] == kept
        assert counted(*name, "false") - old[(*name, "false")] == routed - kept
    assert grown[4] == 4 * 64 * 8 * 8  # visual tokens, layers, experts a token
    assert len(said) == 1
    assert f"{1 - sum(grown[1::2]) / sum(grown[::2]):.1%} of pairs skipped" in said[0]
    assert "vision prefill" in said[0]


def test_being_registered_twice_changes_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    before = EngineArgs.create_engine_config, AsyncLLM.do_log_stats
    register()
    report_with_log()
    assert (EngineArgs.create_engine_config, AsyncLLM.do_log_stats) == before


def test_without_settings_nothing_is_touched(stock: Any) -> None:
    worker = worker_of(stock)
    assert not hasattr(worker, "modes_fx_pairs")
    layers = [module for module in worker.get_model().modules() if hasattr(module, "routed_experts")]
    assert len(layers) == 8
    for layer in layers:
        assert "select_experts" not in vars(layer.router)
        assert "apply" not in vars(layer.routed_experts.quant_method.moe_kernel.fused_experts)
    assert "_preprocess" not in vars(worker.model_runner)


def test_cached_prefixes_have_the_same_answers_and_skip_the_same(plan_file: Path, questions: list[Asked]) -> None:
    llm = make_engine(
        CHECKPOINT,
        settings={"plan": str(plan_file), "target": MOST},
        **{**IN_CHUNKS, "enable_prefix_caching": True, "max_num_batched_tokens": 512, "block_size": 32},
    )
    alike = [Asked(text, questions[0].images) for text in ("which digit is in A1 ?", "which digit is in B2 ?")]
    first = [answer(llm, [each])[0] for each in alike]
    before = pairs(llm)
    again = [answer(llm, [each])[0] for each in alike]
    after = pairs(llm)
    assert [each.ids for each in again] == [each.ids for each in first]
    assert before[4] == (64 + 3) * 8 * 8  # the image whole, then what lies beyond the second block of 32
    assert after[4] == before[4] + 2 * 3 * 8 * 8


def test_poisoned_experts_reach_no_output(tmp_path: Path, questions: list[Asked]) -> None:
    plan = SkipPlan.uniform(text=math.inf, vision=math.inf).save(tmp_path / "nothing.json")
    llm = make_engine(CHECKPOINT, settings={"plan": str(plan)}, **IN_CHUNKS)
    clean = answer(llm, questions[:4])
    for layer in worker_of(llm).get_model().modules():
        if hasattr(layer, "routed_experts"):
            for weight in layer.routed_experts.parameters():
                weight.data.fill_(math.nan)
    assert answer(llm, questions[:4]) == clean
    assert set(ratios([0] * 8, pairs(llm)).values()) == {1.0}
    assert all(math.isfinite(logprob) for each in clean for logprob in each.logprobs)
