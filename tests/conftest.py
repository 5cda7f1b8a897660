"""Settings that every test shares."""

import gc
import logging
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # without an NVIDIA GPU; Triton asks when torch imports it

import pytest
import torch
import torch._dynamo.guards
import torch._inductor.config
from hypothesis import settings
from torch import nn

import modes_fx
from tests import harness, tiny

settings.register_profile("same", deadline=None, derandomize=True, database=None)  # the same examples every time
settings.load_profile("same")
torch.set_num_threads(1)
# pytest listens to loggers that do not propagate, and torch writes a trace of every graph as soon as someone listens
logging.getLogger("torch.__trace").propagate = True
torch._inductor.config.compile_threads = 1  # a pool of workers takes longer to start than the tiny kernels to compile
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # a time for the log, measured by emptying the processor's caches
torch._dynamo.guards.get_verbose_code_part = lambda code, _: code  # a line of source for the log, for each guard
torch._dynamo.config.log_compilation_metrics = False
if hasattr(torch._dynamo.config, "side_effect_replay_policy"):  # not in 2.11
    torch._dynamo.config.side_effect_replay_policy = "silent"  # else the stack of each side effect is formatted, for the log
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from tests import triton_interpreter

    triton_interpreter.quicken()


def pytest_collection_finish() -> None:
    """Keep what is imported out of Python's searches for garbage: they would take a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forget all graphs, for a test of what shares dynamo's cache with others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimise as ever, but run the rewritten graphs as they are: compiling them takes seconds."""
    harness.compile_with(monkeypatch, harness.uncompiled)


@pytest.fixture(scope="module")
def optimized_once() -> Iterator[nn.Module]:
    """One optimised model for the tests of a file, its graphs run without Inductor."""
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        model = modes_fx.optimize(tiny.make())
        harness.logits(model, tiny.mixed_batch())  # its graphs are made while Inductor is kept out
        yield model
    modes_fx.restore(model)


@pytest.fixture
def optimized_vlm(optimized_once: nn.Module) -> nn.Module:
    """The model that a file's tests share, with all kept and nothing counted yet."""
    modes_fx.set_plan(optimized_once, None)
    modes_fx.stats(optimized_once).reset()
    return optimized_once


@pytest.fixture
def vlm() -> Iterator[nn.Module]:
    """A fresh tiny vision-language model in float32."""
    model = tiny.make()
    yield model
    if getattr(model, "_modes_fx", None) is not None:
        modes_fx.restore(model)


@pytest.fixture(scope="module")
def optimized_text() -> Iterator[nn.Module]:
    """One optimised text model for tests that change its plan alone."""
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        model = modes_fx.optimize(tiny.make("qwen3_moe"))
    yield model
    modes_fx.restore(model)
