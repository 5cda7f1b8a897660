"""What quantise_experts refuses, by name and before it changes anything."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from modes_fx.errors import ModelError, NoRoutingSiteError
from modes_fx.quantise import quantise_experts
from tests import tiny
from tests.models.convert.cases import CASES
from tests.quantise.models import plain


def assert_refused(model: nn.Module, error: type[Exception], match: str, **how: Any) -> None:
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    with pytest.raises(error, match=match):
        quantise_experts(model, **{"bits": 4, **how})
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert_refused(plain(), ModelError, r'pip install "modes-fx\[quantise\]"')


def test_other_numbers_of_bits_and_group_sizes() -> None:
    assert_refused(plain(), ModelError, "8 or 4 bits, not 3", bits=3)
    assert_refused(plain(), ModelError, "32, 64, 128 weights, not 48", group_size=48)


def test_models_and_experts_that_cannot_be_stored_so() -> None:
    pytest.importorskip("torchao", reason="quantised experts need torchao")
    assert_refused(tiny.dense(), NoRoutingSiteError, "no MoE layer")
    assert_refused(CASES["deepseek"].make(), ModelError, "does not hold its experts' weights stacked", bits=8)
    assert_refused(tiny.make("qwen3_moe"), ModelError, "16 inputs and 32 outputs.*multiples of 32")
    assert_refused(plain("gpt_oss"), ModelError, "stores its weights transposed.*bits=8")
    assert_refused(quantise_experts(plain(), 8), ModelError, "is Int8Tensor, torch.float32 on cpu; plain")
    with torch.device("meta"):
        empty = tiny.qwen3_moe(moe_intermediate_size=32)
    assert_refused(empty, ModelError, "on meta; plain floating-point weights on the CPU")
