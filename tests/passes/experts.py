"""Check any family's experts in any form of the dispatch, against its own eager loop over experts in float64."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import harness, oracle

TOKENS = 7
OTHER_TOKENS = (3, 12)


@dataclass(frozen=True, repr=False)
class Routed:
    """What a router hands to experts: [T, H], int64 [T, K], [T, K]."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> "Routed":
        return Routed(self.hidden.to(dtype), self.ids, self.weights.to(dtype))


def check_experts(
    experts: nn.Module,
    hidden_size: int,
    stock_form: str,
    dispatch: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    dynamic: bool = False,
) -> None:
    """Check identity at 0, the oracle's output above it, the pairs kept, an empty call, and experts that nothing keeps.

    Args:
        experts: The module that transformers' decorator serves; left as it is.
        hidden_size: Width of the rows that it takes; ``MoeLayer.hidden_size`` knows.
        stock_form: ``"grouped_mm"`` or ``"batched_mm"``.
        dispatch: ``"compact"``, ``harness.ATEN`` or ``"static"``.
        dtype: In which the experts compute.
        device: On which they do.
        dynamic: Whether one graph takes any number of tokens; several are tried then.
    """
    experts = copy.deepcopy(experts).to(device, dtype)
    experts.config._experts_implementation = stock_form
    num_experts = len(next(iter(experts.parameters())))
    runtime = harness.FixedRuntime()
    run = harness.compiled_block(experts, dispatch, runtime, dynamic=dynamic)
    for tokens in (TOKENS, *OTHER_TOKENS) if dynamic else (TOKENS,):
        _check(run, experts, runtime, _routed(tokens, num_experts, hidden_size).to(dtype), device)
    (graph,) = runtime.graphs
    wanted_record = ("rewritten", "", stock_form, harness.dispatch_of(dispatch))
    assert [(r.status, r.code, r.form, r.dispatch) for r in graph] == [wanted_record]


def _check(run: Callable[..., Tensor], experts: nn.Module, runtime: harness.FixedRuntime, routed: Routed, device: str) -> None:
    classes = _classes(len(routed.ids))
    runtime.token_classes = classes.to(device)
    num_experts, dtype = len(next(iter(experts.parameters()))), routed.hidden.dtype
    given = [tensor.to(device) for tensor in (routed.hidden, routed.ids, routed.weights)]
    for bounds in ([0.0, 0.0, 0.0], [0.3, 0.45, math.inf], [math.inf] * 3):
        runtime.bounds = torch.tensor(bounds, device=device)
        runtime.recorded.clear()
        keep = oracle.at_least(routed.weights, torch.tensor(bounds)[classes])
        wanted = _eager(experts, routed, keep)
        victims = sorted(set(range(num_experts)) - set(routed.ids[keep].tolist()))
        assert (num_experts - 1 in victims) == (bounds[2] > 0)  # what padding alone asks for
        with torch.no_grad():
            out = run(*given).cpu()
            poisoned = _run_poisoned(run, experts, victims, given).cpu()
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        for result in (out, poisoned):
            assert result.isfinite().all()
            assert (result.double() - wanted).abs().max() <= tolerance * max(wanted.abs().max().item(), 1.0)
        assert len(runtime.recorded) == 2
        for pairs in runtime.recorded:
            assert pairs.cpu().equal(keep.flatten().nonzero()[:, 0])
        assert bool(keep.any()) or not out.any()


def _classes(tokens: int) -> Tensor:
    """Text, vision, padding, and so on."""
    return torch.arange(tokens) % 3


def _routed(tokens: int, num_experts: int, hidden_size: int, top_k: int = 2) -> Routed:
    """Route all tokens at random, and no token but padding to the last expert."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, num_experts - 1, generator=generator).topk(top_k).indices
    ids[_classes(tokens) == 2, 0] = num_experts - 1
    weights = torch.rand(tokens, top_k, generator=generator) * 0.6 + 0.1
    return Routed(torch.randn(tokens, hidden_size, generator=generator), ids, weights)


def _eager(experts: nn.Module, routed: Routed, keep: Tensor) -> Tensor:
    exact = copy.deepcopy(experts).cpu().double()
    exact.config._experts_implementation = "eager"
    wide = routed.to(torch.float64)
    with torch.no_grad():
        return exact(wide.hidden, wide.ids, torch.where(keep, wide.weights, 0.0))


def _run_poisoned(run: Callable[..., Tensor], experts: nn.Module, victims: list[int], given: list[Tensor]) -> Tensor:
    """Run with NaN in all that belongs to some experts."""
    before = copy.deepcopy(experts.state_dict())
    for parameter in experts.parameters():
        if parameter.dim() >= 2:
            parameter[victims] = math.nan
    out = run(*given)
    experts.load_state_dict(before)
    return out
