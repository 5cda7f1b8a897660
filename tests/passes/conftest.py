"""One experts module for each form of the dispatch, traced once for all tests of the pass."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from tests import harness, oracle, tiny

TOP_K, EXPERTS, HIDDEN = 3, 6, 32
STOCK = ("grouped_mm", "batched_mm")
DISPATCHES = [
    ("grouped_mm", "compact"),
    ("grouped_mm", harness.ATEN),
    ("grouped_mm", "static"),
    ("batched_mm", "compact"),
    ("batched_mm", "static"),
]
FORMS = [(*both, dtype) for both in DISPATCHES for dtype in (torch.float32, torch.bfloat16)]


def form_id(form: tuple[str, str, torch.dtype]) -> str:
    return f"{form[0]}-{form[1]}-{str(form[2])[6:]}".replace(", ", "-")


@dataclass(repr=False)
class Form:
    """The experts of a tiny model, their dispatch rewritten in one form, with any number of tokens.

    One trace serves every number of tokens above 1.
    """

    stock_form: str
    dispatch: str
    dtype: torch.dtype
    experts: nn.Module = field(init=False)
    runtime: harness.FixedRuntime = field(default_factory=lambda: harness.FixedRuntime())
    log: harness.GemmLog = field(default_factory=harness.GemmLog)

    def __post_init__(self) -> None:
        self.experts = oracle.experts_of(tiny.make("olmoe", self.dtype))[1]
        self.experts.config._experts_implementation = self.stock_form
        self._run = harness.compiled_block(self.experts, self.dispatch, self.runtime, self.log)

    @property
    def traced(self) -> int:
        return len(self.runtime.graphs)

    @property
    def skips_rows(self) -> bool:
        """Whether a dropped pair costs no row of a GEMM; else its row reads the matrices of another pair."""
        return (self.stock_form, self.dispatch) != ("batched_mm", "static")

    @property
    def kept(self) -> list[int]:
        """The pairs kept in the last call, in ascending order."""
        (pairs,) = self.runtime.recorded
        return pairs.tolist()

    def __call__(self, routing: "Routing", bounds: Tensor, classes: Tensor | None = None) -> Tensor:
        self.log.clear()
        self.runtime.recorded.clear()
        self.runtime.bounds, self.runtime.token_classes = bounds, classes
        inputs = (routing.hidden, routing.ids, routing.weights)
        if len(routing.ids) > 1:
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            out = self._run(*inputs)
        assert all(record.status == "rewritten" for graph in self.runtime.graphs for record in graph)
        return out

    def stock(self, routing: "Routing") -> Tensor:
        with torch.no_grad():
            return self.experts(routing.hidden, routing.ids, routing.weights)


@dataclass(repr=False)
class Routing:
    """What a router hands to the experts."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def random(cls, tokens: int, dtype: torch.dtype, seed: int = 0) -> "Routing":
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(tokens, EXPERTS, generator=generator)
        weights, ids = torch.topk(logits.softmax(-1), TOP_K)
        return cls(torch.randn(tokens, HIDDEN, generator=generator).to(dtype), ids, weights.to(dtype))


def expected(experts: nn.Module, routing: Routing, keep_TK: Tensor) -> Tensor:
    """Compute kept pairs one by one, in float64."""
    up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    result = torch.zeros(routing.hidden.shape, dtype=torch.float64)
    for token, rank in keep_TK.nonzero().tolist():
        expert = routing.ids[token, rank]
        gate, value = (up[expert] @ routing.hidden[token].double()).chunk(2)
        rows = down[expert] @ (gate * torch.sigmoid(gate) * value)
        result[token] += routing.weights[token, rank].double() * rows
    return result.detach()


def tolerance(dtype: torch.dtype) -> float:
    """Error allowed, relative to the largest output: bfloat16 rounds each of some five steps to 2**-8."""
    return 1e-5 if dtype is torch.float32 else 0.02


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(actual).all()
    assert (actual.double() - wanted.double()).abs().max() <= tolerance(dtype) * max(wanted.abs().max().item(), 1.0)


_made: dict[tuple[str, str, torch.dtype], Form] = {}


@pytest.fixture(params=FORMS, ids=form_id)
def form(request: pytest.FixtureRequest) -> Form:
    if request.param not in _made:
        _made[request.param] = Form(*request.param)
    return _made[request.param]
