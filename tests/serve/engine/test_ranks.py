"""A model over two processes: each finds the thresholds of its layers by their names, and the pairs are counted once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.engine import models
from tests.serve.engine.conftest import make_engine, pairs

PROMPTS = models.prompts(3, 24)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    plan = models.PLAN.save(folder / "plan.json")
    return {"model": models.save("qwen3_moe", folder), "settings": {"plan": str(plan), "target": 0.5}, "dtype": "float32"}


@pytest.fixture(scope="module")
def alone(given: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    llm = make_engine(**given)
    return models.logprobs(llm, PROMPTS), pairs(llm)


@contextlib.contextmanager
def over_ranks(given: dict[str, Any], **changes: Any) -> Iterator[Any]:
    llm = make_engine(**given, **changes)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # its processes; now, while there is somewhere to log to


def check_as_alone(llm: Any, alone: tuple[torch.Tensor, list[int]]) -> list[list[int] | None]:
    """The same answers, pairs and, with another target, nothing skipped; return what each rank counted."""
    torch.testing.assert_close(models.logprobs(llm, PROMPTS), alone[0], atol=1e-4, rtol=1e-4)
    counted: list[list[int] | None] = llm.collective_rpc("modes_fx_take_pairs")
    assert [sum(numbers) for numbers in zip(*filter(None, counted), strict=True)] == alone[1]
    assert 0.2 < 1 - alone[1][1] / alone[1][0] < 0.8
    llm.collective_rpc("modes_fx_set_target", args=(0.0, 0.0))
    models.logprobs(llm, PROMPTS)
    for each in filter(None, llm.collective_rpc("modes_fx_take_pairs")):
        assert each[::2] == each[1::2]
    return counted


def test_tensor_parallel(given: dict[str, Any], alone: tuple[torch.Tensor, list[int]]) -> None:
    with over_ranks(given, tensor_parallel_size=2) as llm:
        first, second = check_as_alone(llm, alone)
    assert first == alone[1]
    assert second is None


def test_pipeline_parallel(
    given: dict[str, Any], alone: tuple[torch.Tensor, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, vLLM 0.32 runs stages of compiled models alone, where it has warmed up; here without Inductor."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    uncompiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    with over_ranks(given, pipeline_parallel_size=2, **uncompiled) as llm:
        first, second = check_as_alone(llm, alone)
    assert first is not None is not second
    assert first[0] == second[0] == alone[1][0] / 2  # one layer each
    assert first[1] != second[1]
