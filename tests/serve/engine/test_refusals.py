"""What a server refuses to start with: one line that says what to do."""

from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsFp8
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from modes_fx.demo import CHECKPOINT
from modes_fx.errors import ModesFxError, PlanError, ServingError
from modes_fx.plan import SkipPlan
from modes_fx.serve.worker import _experts_of
from tests.serve.engine.conftest import make_engine, worker_of
from tests.serve.engine.models import save


@pytest.mark.parametrize(
    ("settings", "changes", "error", "said"),
    [
        ({"plan": "missing.json"}, {}, PlanError, r"missing\.json"),
        ({"target": 0.5}, {}, ServingError, 'with a "plan"'),
        ({"plan": "PLAN", "rule": "x"}, {}, ServingError, "Unknown setting 'rule'.*known: plan, target, decode_target"),
        ({"plan": "PLAN", "target": 0.6}, {}, PlanError, r"no target 0\.6"),
        ({"plan": "PLAN"}, {"enable_lora": True}, ServingError, "LoRA"),
        ({"plan": "PLAN"}, {"enable_prompt_embeds": True}, ServingError, "prompt embeddings"),
        ({"plan": "PLAN"}, {"model": "olmoe"}, PlanError, "made for another model"),
    ],
)  # fmt: skip
def test_before_any_weights_are_loaded(
    settings: dict[str, Any], changes: dict[str, Any], error: type[ModesFxError], said: str, plan_file: Path, tmp_path: Path
) -> None:
    given = {key: str(plan_file) if value == "PLAN" else value for key, value in settings.items()}
    other = changes.get("model")
    model = CHECKPOINT if other is None else save(other, tmp_path)
    with pytest.raises(error, match=said) as raised:
        make_engine(model, settings=given, **{key: value for key, value in changes.items() if key != "model"})
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("stock")  # which sets up process groups for experts, too: there is one set for all engines
def test_a_model_without_experts(tmp_path: Path) -> None:
    plan = SkipPlan.uniform(text=0.1, vision=0.1).save(tmp_path / "plan.json")
    with pytest.raises(ServingError, match="LlamaForCausalLM has no MoE layers in vLLM: there is nothing to skip"):
        make_engine(save("dense", tmp_path), settings={"plan": str(plan)})


@pytest.mark.parametrize("experts", [CPUExpertsFp8, CutlassExpertsFp8])
def test_experts_that_would_compute_what_is_dropped(experts: type, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer_of(stock)
    monkeypatch.setattr(layer._quant_method.moe_kernel.impl, "fused_experts", object.__new__(experts))
    with pytest.raises(ServingError, match=rf"{layer.layer_name} computes its experts by {experts.__name__}, which would"):
        _experts_of(layer)


def test_kernels_that_route_by_themselves(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer_of(stock)
    monkeypatch.setattr(layer._quant_method, "moe_kernel", None)
    with pytest.raises(ServingError, match="by UnquantizedFusedMoEMethod, which would compute what is skipped"):
        _experts_of(layer)


def test_routers_that_choose_more_than_experts(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer_of(stock)
    monkeypatch.setattr(layer, "router", object.__new__(ZeroExpertRouter))
    with pytest.raises(ServingError, match="routes by ZeroExpertRouter"):
        _experts_of(layer)


def _layer_of(llm: Any) -> Any:
    return next(module for module in worker_of(llm).get_model().modules() if hasattr(module, "routed_experts"))
