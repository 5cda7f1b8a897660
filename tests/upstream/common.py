"""transformers' own model tests on optimised models: what a stock model passes, an optimised one passes.

``make test-upstream`` fetches and runs them; no other run of pytest collects this file, whose name is no test's. Each test runs
on models that are optimised, with nothing skipped, as soon as they are put into evaluation mode; what fails, on stock ones too.
"""

import random
import unittest
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import modes_fx
from modes_fx.models.layers import find_moe_layers
from modes_fx.optimize import is_optimized
from tests import harness
from tests.upstream.case import FAMILIES, case_of

CASES = {family: case_of(family) for family in FAMILIES}
TESTS = [
    (family, name)
    for family, case in CASES.items()
    for name in unittest.TestLoader().getTestCaseNames(case)
    # the same again with more of torch's attention kernels; a dozen ways to give a dtype, of no concern here and long
    if not (name.endswith("sdpa_kernels") or name == "test_bc_torch_dtype")
]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "name"), TESTS)
def test_what_stock_passes_passes_optimized(family: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        optimize_in_eval(patch)
        optimized = failure(family, name)
    if optimized and (stock := failure(family, name)):  # only then does it matter
        pytest.skip(f"stock: {stock}")
    if optimized:
        pytest.fail(optimized, pytrace=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_optimized_when_they_are_put_into_evaluation_mode(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize_in_eval(monkeypatch)
    models = [kind(CASES[family].model_tester.get_config()) for kind in CASES[family].all_model_classes]
    assert len(models) == 2
    assert all(is_optimized(model.eval()) for model in models)


def failure(family: str, name: str) -> str:
    """Run one of transformers' tests; return why it did not pass."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    result = unittest.TestResult()
    CASES[family](name).run(result)
    return "\n".join(reason for _, reason in (*result.failures, *result.errors, *result.skipped))


def optimize_in_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimise each model with MoE layers when its ``eval`` is called, and run its graphs without Inductor."""
    harness.compile_with(monkeypatch, harness.uncompiled)
    stock = PreTrainedModel.eval

    def optimized(model: PreTrainedModel) -> PreTrainedModel:
        stock(model)
        return modes_fx.optimize(model) if find_moe_layers(model) and not is_optimized(model) else model

    monkeypatch.setattr(PreTrainedModel, "eval", optimized)
