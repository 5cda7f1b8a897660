"""One vLLM for the tests of this folder, and the same model in transformers beside it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="make test-vllm runs these in an environment of their own")

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that tests see the worker
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import modes_fx
from modes_fx.demo import CHECKPOINT, Sample, make_samples
from modes_fx.models import embedded
from modes_fx.plan import PlanPoint, SkipPlan, describe_model
from modes_fx.serve.thresholds import Thresholds
from tests import harness

LAYERS = tuple(f"model.language_model.layers.{index}.mlp.experts" for index in range(8))
NONE, HALF, MOST = 0.0, 0.5, 0.75


def demo_plan() -> SkipPlan:
    """A plan with other thresholds in each layer, the more of text the deeper, the less of vision."""
    from transformers import AutoConfig

    return SkipPlan(
        points=(PlanPoint(NONE, 0.0, 0.0), PlanPoint(HALF, 0.004, 0.008), PlanPoint(MOST, 0.01, 0.016)),
        alpha=tuple(((12 - index) / 68, (5 + index) / 68) for index in range(8)),
        layers=LAYERS,
        model=describe_model(AutoConfig.from_pretrained(CHECKPOINT)),
    )


def make_engine(model: Any, *, settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Start a vLLM, with the plug-in's settings if there are any."""
    from vllm import LLM

    given = {
        "dtype": "bfloat16",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 26,
        "enforce_eager": True,
        "disable_log_stats": False,
        **changes,
    }
    return LLM(model=str(model), additional_config={"modes_fx": settings} if settings else {}, **given)


IN_CHUNKS: dict[str, Any] = {
    "max_num_batched_tokens": 160,  # two prompts with an image: more come in chunks, and beside requests that decode
    "max_num_seqs": 16,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
    "enable_prefix_caching": False,
}


@dataclass
class Asked:
    """A question as both take it."""

    text: str
    images: tuple[Any, ...]

    @property
    def prompt(self) -> str:
        pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(self.images)
        return f"<|im_start|>user\n{pictures}{self.text}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def for_vllm(self) -> dict[str, Any]:
        return {"prompt": self.prompt} | ({"multi_modal_data": {"image": list(self.images)}} if self.images else {})


def asked(samples: Sequence[Sample]) -> list[Asked]:
    return [Asked(sample.question, (sample.image,)) for sample in samples]


@dataclass
class Answer:
    ids: list[int]
    logprobs: list[float]
    leads: list[float]  # of each token before the next best


def answer(llm: Any, questions: Sequence[Asked], tokens: int = 16) -> list[Answer]:
    """Let vLLM answer, greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, logprobs=2)
    outputs = llm.generate([each.for_vllm for each in questions], sampling, use_tqdm=False)
    return [_answer_of(output.outputs[0]) for output in outputs]


def _answer_of(output: Any) -> Answer:
    found = [sorted((each.logprob for each in step.values()), reverse=True) for step in output.logprobs]
    own = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
    return Answer(list(output.token_ids), own, [first - second for first, second, *_ in found])


@dataclass
class Reference:
    """The model in transformers, optimised by ``modes_fx``; its graphs run without Inductor."""

    model: nn.Module
    processor: Any

    def answer(self, questions: Sequence[Asked], tokens: int = 16) -> list[list[int]]:
        """Answer greedily, one by one: in a batch, those that have ended would go on being counted."""
        return [self._answer(question, tokens) for question in questions]

    def _answer(self, question: Asked, tokens: int) -> list[int]:
        inputs = self.processor(text=[question.prompt], images=list(question.images) or None, return_tensors="pt")
        with torch.inference_mode():
            ids: Tensor = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answer: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return answer


@pytest.fixture(scope="session", autouse=True)
def _look_at_models_here() -> Iterator[None]:
    """vLLM looks at each class of models in a process of its own, which imports all that this one has imported."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="session", autouse=True)
def _process_groups_stay() -> Iterator[None]:
    """An engine that is collected, or refused, would end the process groups of all others in this process."""
    from vllm.v1.engine import core

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "cleanup_dist_env_and_memory", lambda: None)
        yield


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_plan().save(tmp_path_factory.mktemp("plan") / "plan.json")


@pytest.fixture(scope="session")
def served(plan_file: Path) -> Any:
    """The embedded model in vLLM with the plan."""
    return make_engine(CHECKPOINT, settings={"plan": str(plan_file), "target": MOST, "decode_target": HALF}, **IN_CHUNKS)


@pytest.fixture(scope="session")
def stock() -> Any:
    """The same without."""
    return make_engine(CHECKPOINT, **IN_CHUNKS)


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    from transformers import AutoProcessor

    model, _ = embedded.load()
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        modes_fx.optimize(model)
        yield Reference(model, AutoProcessor.from_pretrained(CHECKPOINT))
    modes_fx.restore(model)


@pytest.fixture(scope="session")
def questions() -> list[Asked]:
    return asked(make_samples("test", 8))


def worker_of(llm: Any) -> Any:
    """Return the worker of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def thresholds_of(llm: Any) -> Thresholds:
    return worker_of(llm).modes_fx_set_target.__self__._thresholds


def set_target(llm: Any, target: float, decode_target: float) -> None:
    llm.collective_rpc("modes_fx_set_target", args=(target, decode_target))


def ratios(before: list[int], after: list[int]) -> dict[str, float]:
    """Return the skip ratio of what two calls of ``modes_fx_pairs`` differ by, by modality and phase."""
    grown = [new - old for new, old in zip(after, before, strict=True)]
    names = ("text prefill", "text decode", "vision prefill", "vision decode")
    return {name: 1 - grown[2 * i + 1] / grown[2 * i] for i, name in enumerate(names) if grown[2 * i]}


def pairs(llm: Any) -> list[int]:
    (counted,) = llm.collective_rpc("modes_fx_pairs")
    return counted


@contextlib.contextmanager
def batches_of(llm: Any) -> Iterator[list[list[int]]]:
    """Note the classes of the tokens of each batch that the engine runs."""
    thresholds, noted = thresholds_of(llm), []
    begin = thresholds.begin

    def noting(classes: Tensor, padded: int) -> None:
        noted.append(classes.tolist())
        begin(classes, padded)

    thresholds.begin = noting
    try:
        yield noted
    finally:
        del thresholds.begin
