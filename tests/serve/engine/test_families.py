"""Text families: tiny random models answer as in transformers with the same thresholds, and skip as much."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

import modes_fx
from modes_fx.plan import SkipPlan
from tests import harness
from tests.serve.engine import models
from tests.serve.engine.conftest import make_engine, pairs, ratios

THRESHOLDS = {"qwen3_moe": 0.2, "olmoe": 0.15, "mixtral": 0.45, "gpt_oss": 0.45, "deepseek_v3": 0.8}
"""About the middle of what each family's routers give."""


LENGTH = {"deepseek_v3": 1}
"""Without a plan, vLLM and transformers differ on tiny latent attention; over one token, attention changes nothing."""

BACKEND = {"deepseek_v3": "CPU_MLA"}
"""On processors with AMX vLLM prefers one that refuses float32."""


@pytest.mark.parametrize("family", THRESHOLDS)
def test_as_in_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.save(family, tmp_path)
    plan = SkipPlan.uniform(text=THRESHOLDS[family], vision=0.0)
    prompts = torch.arange(2, 50).repeat(LENGTH.get(family, 8)).view(-1, 48).T
    settings = {"plan": str(plan.save(tmp_path / "plan.json"))}
    llm = make_engine(folder, settings=settings, dtype="float32", attention_backend=BACKEND.get(family))
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in prompts.tolist()],
        SamplingParams(max_tokens=1, temperature=0, logprobs=0),
        use_tqdm=False,
    )
    found = torch.tensor([each.outputs[0].cumulative_logprob for each in outputs])
    skipped = ratios([0] * 8, pairs(llm))["text prefill"]
    harness.compile_with(monkeypatch, harness.uncompiled)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        whole = model(prompts).logits[:, -1].log_softmax(-1).amax(-1)
        with modes_fx.stats(modes_fx.optimize(model, plan)) as stats:
            wanted = model(prompts).logits[:, -1].log_softmax(-1).amax(-1)
    assert 0.2 < skipped < 0.8
    assert skipped == pytest.approx(stats.skip_ratio(), abs=0.01)
    assert (found - wanted).abs().median() < 1e-4 < 0.1 * (found - whole).abs().median()
