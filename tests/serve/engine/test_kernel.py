"""vLLM's own CPU kernel on kept pairs, against float64, with the experts that nobody keeps poisoned."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vllm._custom_ops import cpu_prepack_moe_weight

from modes_fx.serve import cpu_experts

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 40, 64, 32, 8, 4


class Case:
    def __init__(self, tokens: int, kept: float, poisoned: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
        self.w1 = (torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5).bfloat16()
        self.w2 = (torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * INNER**-0.5).bfloat16()
        self.ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.int()
        self.weights = torch.rand(tokens, TOP_K, generator=generator)
        self.keep = (torch.rand(tokens, TOP_K, generator=generator) < kept) & (self.ids >= poisoned)
        self.w1[:poisoned] = self.w2[:poisoned] = math.nan

    def wanted(self) -> Tensor:
        total = torch.zeros(self.x.shape, dtype=torch.float64)
        for token, rank in self.keep.nonzero().tolist():
            expert = self.ids[token, rank]
            gate, up = (self.w1[expert].double() @ self.x[token].double()).chunk(2)
            total[token] += self.weights[token, rank].double() * (self.w2[expert].double() @ (F.silu(gate) * up))
        return total

    def found(self) -> Tensor:
        w1, w2 = (cpu_prepack_moe_weight(each, "vec") for each in (self.w1, self.w2))
        output = torch.full_like(self.x, math.nan)
        ids = torch.where(self.keep, self.ids, EXPERTS)
        weights = torch.where(self.keep, self.weights, 0)
        torch.ops.modes_fx.serve_cpu_experts(
            output, self.x, w1, w2, None, None, weights, ids, "silu", "vec", False, EXPERTS
        )  # fmt: skip
        return output


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
@pytest.mark.parametrize(("kept", "poisoned"), [(1.0, 0), (0.5, 0), (0.5, 3), (0.1, 5), (0.0, EXPERTS)])
def test_kept_pairs_alone_are_computed(tokens: int, kept: float, poisoned: int) -> None:
    case = Case(tokens, kept, poisoned)
    torch.testing.assert_close(case.found().double(), case.wanted(), atol=0.03, rtol=0.03)


def test_a_call_that_keeps_all_is_vllms_own() -> None:
    case, seen = Case(TOKENS, 1.0), []

    def kernel(output: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        seen.append((hidden.data_ptr(), weights.data_ptr(), ids.data_ptr()))

    given: tuple[Any, ...] = (case.x, case.weights, case.ids)
    cpu_experts.dispatch_kept(kernel, torch.empty_like(case.x), *given, EXPERTS)
    assert seen == [tuple(each.data_ptr() for each in given)]
