"""What is taken into a GEMM's program, and near misses that are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from modes_fx.passes.epilogue import Epilogue, epilogue_of, point_behind_changes

ROWS, COLUMNS, EXPERTS = 4, 6, 3


def found(work: Callable[..., Any]) -> tuple[Epilogue, fx.Node]:
    """Return what is taken of ``work(product, bias, row_ids)``, and the node that it returns."""
    module = fx.symbolic_trace(work)
    given = torch.randn(ROWS, COLUMNS), torch.randn(EXPERTS, COLUMNS), torch.zeros(ROWS, dtype=torch.int64)
    Keeping(module).run(*given)
    gemm, _, row_ids, *body = module.graph.nodes
    point_behind_changes(body[:-1])
    output: Any = body[-1].args[0]
    return epilogue_of(gemm, body[:-1], row_ids), output


class Keeping(ShapeProp):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


def clamped(y: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    y.add_(bias[ids])
    return (y[..., 1::2].clamp(min=-7.0, max=7.0) + 1) * F.silu(y[..., ::2].clamp(max=float("inf")))


@pytest.mark.parametrize(
    ("work", "parts", "biased"),
    [
        (lambda y, bias, ids: F.relu(y).square(), "", False),
        (lambda y, bias, ids: torch.pow(y + bias[ids], 2).neg(), "", True),
        (lambda y, bias, ids: F.gelu(y.chunk(2, dim=-1)[0], approximate="tanh") * y.chunk(2, dim=-1)[1], "halves", False),
        (lambda y, bias, ids: torch.tanh(y[:, :3] / 4.0) * y[:, 3:].float().to(torch.float32), "halves", False),
        (clamped, "interleaved", True),
    ],
)
def test_all_of_it_is_taken(work: Callable[..., Any], parts: str, biased: bool) -> None:
    epilogue, output = found(work)
    assert epilogue.end is output
    assert (epilogue.parts, epilogue.bias is not None) == (parts, biased)
    assert epilogue.text.splitlines()[-1].startswith("return v")


@pytest.mark.parametrize(
    "work",
    [
        lambda y, bias, ids: y.sum(1, keepdim=True) * y,  # over a row
        lambda y, bias, ids: y.chunk(3, dim=-1)[0] * y.chunk(3, dim=-1)[1],
        lambda y, bias, ids: y.chunk(2, dim=0)[0],  # over rows
        lambda y, bias, ids: y[..., 1:4] * y[..., ::2],
        lambda y, bias, ids: torch.add(y, bias[ids], alpha=2),
        lambda y, bias, ids: y * bias[0],
        lambda y, bias, ids: y.double(),
        lambda y, bias, ids: (y.relu(), y),
    ],
)
def test_near_misses_are_left_alone(work: Callable[..., Any]) -> None:
    epilogue, _ = found(work)
    assert (epilogue.text, epilogue.nodes) == ("", ())
    assert epilogue.end.op == "placeholder"


def test_what_others_use_is_as_far_as_it_goes() -> None:
    def work(y: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        z = torch.sigmoid(y)
        return z * z.sum(1, keepdim=True)

    assert found(work)[0].text.splitlines() == ["v0 = tl.sigmoid(a)", "return v0"]


def test_what_is_changed_in_place_while_others_see_it_is_left_alone() -> None:
    def work(y: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        half = y[:, :3]
        y.mul_(2.0)
        return half * y[:, 3:]

    assert found(work)[0].nodes == ()
