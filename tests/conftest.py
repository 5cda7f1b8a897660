"""Settings that every test shares."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # without an NVIDIA GPU; Triton asks when torch imports it

import pytest
import torch
from hypothesis import settings
from torch import nn

import modes_fx
from tests import harness, quick_torch, tiny

settings.register_profile("same", deadline=None, derandomize=True, database=None)  # the same examples every time
settings.load_profile("same")
quick_torch.quicken()
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from tests import triton_interpreter

    triton_interpreter.quicken()


def pytest_collection_finish() -> None:
    quick_torch.freeze_imports()


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
