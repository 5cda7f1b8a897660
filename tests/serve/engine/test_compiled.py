"""Under vLLM's own torch.compile, which is its default: the same as without, and another target compiles nothing."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.serve.engine import models
from tests.serve.engine.conftest import make_engine, pairs, ratios, set_target


@pytest.mark.slow
def test_compiled_as_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = models.save("qwen3_moe", tmp_path)
    settings = {"plan": str(models.PLAN.save(tmp_path / "plan.json")), "target": 0.5, "decode_target": 0.0}
    prompts = models.prompts(3, 24)
    compiled, eager = (
        make_engine(folder, settings=settings, dtype="float32", enforce_eager=each, max_num_batched_tokens=256)
        for each in (False, True)
    )
    models.logprobs(compiled, prompts)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    seen = {}
    for target, decode in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):
        before = [pairs(llm) for llm in (compiled, eager)]
        for llm in (compiled, eager):
            set_target(llm, target, decode)
        torch.testing.assert_close(*(models.logprobs(llm, prompts) for llm in (compiled, eager)), atol=1e-4, rtol=1e-4)
        mine, other = (ratios(old, pairs(llm)) for old, llm in zip(before, (compiled, eager), strict=True))
        assert mine == pytest.approx(other, abs=0.005)
        seen[target, decode] = mine
    assert seen[0.5, 0.0]["text prefill"] > 0.2 < seen[0.0, 0.5]["text decode"]
    assert set(seen[0.0, 0.0].values()) == {0.0}
    assert counters["stats"]["unique_graphs"] == graphs
