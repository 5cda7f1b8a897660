"""Settings that every test shares."""

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from hypothesis import settings
from torch import nn

import modes_fx
from tests import harness, tiny

settings.register_profile("same", deadline=None, derandomize=True, database=None)  # the same examples every time
settings.load_profile("same")
torch.set_num_threads(1)
torch._inductor.config.compile_threads = 1  # a pool of workers takes longer to start than the tiny kernels to compile


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


@pytest.fixture
def vlm() -> Iterator[nn.Module]:
    """A fresh tiny vision-language model in float32."""
    model = tiny.make()
    yield model
    if getattr(model, "_modes_fx", None) is not None:
        modes_fx.restore(model)
