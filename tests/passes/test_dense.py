"""Which linear layers become ``modes_fx.dense``, and that they compute the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modes_fx.kernels.cpu.ops import FEW_ROWS
from tests import harness
from tests.passes.near_misses import HIDDEN, dispatch, inputs

DENSE = torch.ops.modes_fx.dense.default


def run(layer: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> tuple[Tensor, Tensor, int]:
    """Return what a layer computes beside a dispatch once that is rewritten, what it did before, and how many are ours."""
    routed = inputs()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), dispatch(*routed)

    seen: list[Any] = []

    def note(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        seen.extend(harness.targets(module))
        return module.forward

    out, _ = harness.compiled_block(function, "compact", harness.FixedRuntime(), note, **options)(x)
    return out, layer(x), seen.count(DENSE)


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, 9, bias, dtype=dtype)


def rows(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, FEW_ROWS])
def test_layers_that_meet_few_rows_are_ours(count: int, bias: bool, dtype: torch.dtype) -> None:
    out, wanted, ours = run(linear(bias, dtype), rows(count, dtype), dynamic=False)
    assert ours == 1
    assert (out - wanted).abs().max() <= (1e-6 if dtype is torch.float32 else 2**-7) * wanted.abs().max()


@torch.no_grad()
def test_they_may_meet_few_rows_where_the_number_varies() -> None:
    layer, many = linear(), rows(FEW_ROWS + 1)
    torch._dynamo.mark_dynamic(many, 1)
    out, wanted, ours = run(layer, many)
    assert ours == 1
    assert out.equal(wanted), "ATen's own product"


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (linear(), rows(FEW_ROWS + 1)),
        (linear(dtype=torch.float64), rows(1, torch.float64)),
        (linear(dtype=torch.float16), rows(1, torch.float16)),
        (lambda x: nn.functional.linear(x, torch.ones(HIDDEN, 9).T), rows(1)),
        (lambda x: nn.functional.linear(x, torch.ones(HIDDEN)), rows(1)),
    ],
    ids=["many rows", "float64", "float16", "along the outer dimension", "a vector"],
)
def test_others_are_left_as_they_are(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    out, wanted, ours = run(layer, x, dynamic=False)
    assert ours == 0
    assert out.equal(wanted)


def test_under_autocast_and_with_gradients_they_are_left_as_they_are() -> None:
    layer = linear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(layer, rows(1), dynamic=False)[2] == 0
    out, _, ours = run(layer, rows(1).requires_grad_(), dynamic=False)
    assert ours == 0
    assert out.requires_grad


@torch.no_grad()
def test_a_graph_without_a_routing_site_is_left_as_it_is() -> None:
    layer, seen = linear(), []

    def note(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        seen.extend(harness.targets(module))
        return module.forward

    harness.compiled_block(layer, "compact", harness.FixedRuntime(), note, dynamic=False)(rows(1))
    assert seen == [nn.functional.linear]
