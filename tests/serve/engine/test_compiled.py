"""Under vLLM's own torch.compile, which is its default: the same as without, and another target compiles nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from vllm import SamplingParams

from modes_fx.plan import PlanPoint, SkipPlan
from tests.serve.engine import models
from tests.serve.engine.conftest import make_engine, pairs, ratios, set_target

PLAN = SkipPlan(
    points=(PlanPoint(0.0, 0.0, 0.0), PlanPoint(0.5, 0.11, 0.0)),
    alpha=((0.5, 0.5), (0.6, 0.5)),
    layers=("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
)


def logprobs(llm: Any, prompts: torch.Tensor) -> torch.Tensor:
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row} for row in prompts.tolist()], sampling, use_tqdm=False)
    return torch.tensor([[next(iter(step.values())).logprob for step in each.outputs[0].logprobs] for each in outputs])


@pytest.mark.slow
def test_compiled_as_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = models.save("qwen3_moe", tmp_path)
    settings = {"plan": str(PLAN.save(tmp_path / "plan.json")), "target": 0.5, "decode_target": 0.0}
    prompts = torch.randint(2, models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    compiled, eager = (
        make_engine(folder, settings=settings, dtype="float32", enforce_eager=each, max_num_batched_tokens=256)
        for each in (False, True)
    )
    logprobs(compiled, prompts)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    seen = {}
    for target, decode in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):
        before = [pairs(llm) for llm in (compiled, eager)]
        for llm in (compiled, eager):
            set_target(llm, target, decode)
        torch.testing.assert_close(*(logprobs(llm, prompts) for llm in (compiled, eager)), atol=1e-4, rtol=1e-4)
        mine, other = (ratios(old, pairs(llm)) for old, llm in zip(before, (compiled, eager), strict=True))
        assert mine == pytest.approx(other, abs=0.005)
        seen[target, decode] = mine
    assert seen[0.5, 0.0]["text prefill"] > 0.2 < seen[0.0, 0.5]["text decode"]
    assert set(seen[0.0, 0.0].values()) == {0.0}
    assert counters["stats"]["unique_graphs"] == graphs
