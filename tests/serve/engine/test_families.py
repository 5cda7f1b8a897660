"""Text families: tiny random models answer as in transformers with the same thresholds, and skip as much."""

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("family", THRESHOLDS)
def test_as_in_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.save(family, tmp_path)
    plan = SkipPlan.uniform(text=THRESHOLDS[family], vision=0.0)
    prompts = torch.randint(2, models.VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(0))
    llm = make_engine(folder, settings={"plan": str(plan.save(tmp_path / "plan.json"))}, dtype="float32", max_num_batched_tokens=512)
    found = llm.generate(
        [{"prompt_token_ids": row} for row in prompts.tolist()],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    skipped = ratios([0] * 8, pairs(llm))
    harness.compile_with(monkeypatch, harness.uncompiled)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    modes_fx.optimize(model, plan)
    with modes_fx.stats(model) as stats, torch.inference_mode():
        wanted = model(prompts).logits.float().log_softmax(-1)
    modes_fx.restore(model)
    with torch.inference_mode():
        whole = model(prompts).logits.float().log_softmax(-1)
    assert 0.2 < skipped["text prefill"] < 0.8
    assert skipped["text prefill"] == pytest.approx(stats.skip_ratio(), abs=0.01)
    mine = torch.tensor([_of_prompt(output) for output in found])
    targets = prompts[:, 1:, None]
    theirs, unskipped = (each[:, :-1].gather(2, targets).squeeze(2) for each in (wanted, whole))
    assert (mine - theirs).abs().median() < 1e-3 < 0.1 * (mine - unskipped).abs().median()


def _of_prompt(output: Any) -> list[float]:
    steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [step[token].logprob for token, step in steps]
