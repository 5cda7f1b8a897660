"""Every family under a ``torch.compile`` around the model: the oracle's answers and pairs, and no other breaks than stock."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import modes_fx
from modes_fx.graph.backend import rewrite
from modes_fx.passes.site import SiteRecord
from tests import oracle
from tests.families.family import Family
from tests.families.test_vision import ORACLE_DTYPE, told_by
from tests.families.text import TEXT
from tests.families.vision import VISION
from tests.harness import logits, plan_of, relative_error
from tests.wide import FAMILIES

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "without_inductor"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # stock's own graph breaks
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo's own, in masks by vmap
]

COMPUTED = [family for family in (*TEXT, *VISION) if not family.expected.startswith("rejected")]


def cases() -> list[Any]:
    marks = {True: pytest.mark.wide, False: pytest.mark.slow}
    return [pytest.param(family, id=family.name, marks=marks[family.name in FAMILIES]) for family in COMPUTED]


class Rewriting:
    """A backend that runs the pass, as Inductor's hook does, and then the graph as it is."""

    def __init__(self) -> None:
        self.sites: list[SiteRecord] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.sites.extend(rewrite(module))
        return module.forward


def compiled(model: nn.Module, backend: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, set[str]]:
    """Return the logits of a model under ``torch.compile``, and what broke its graph."""
    torch._dynamo.reset()
    counters.clear()
    found = logits(torch.compile(model, backend=backend), inputs)
    return found, {reason.partition("\n")[0] for reason in counters["graph_break"]}


@pytest.mark.parametrize("family", cases())
def test_what_is_compiled_around_a_model_skips_what_the_oracle_skips(family: Family) -> None:
    stock, inputs = family.build(), family.inputs()
    sees = "attention_mask" in inputs
    model = copy.deepcopy(stock)
    unskipped, stock_breaks = compiled(copy.deepcopy(stock), "eager", inputs)
    real = inputs["attention_mask"] == 1 if sees and unskipped.shape[:2] == inputs["input_ids"].shape else None
    real = torch.ones(unskipped.shape[:2]) == 1 if real is None else real
    backend = Rewriting()
    if family.expected == "converted":  # no oracle hooks a loop: what is called from Python is tested against it elsewhere
        modes_fx.optimize(model, modes_fx.SkipPlan.uniform(text=0.9, vision=0.9))
        with modes_fx.stats(model) as by_block:
            expected = logits(model, inputs)
        wanted = by_block.pairs_routed, by_block.pairs_kept
    else:
        told: Any = told_by(inputs) if sees else torch.zeros_like(inputs["input_ids"])
        dtype = ORACLE_DTYPE.get(family.name, torch.float64)
        bounds = oracle.random_bounds(stock, told, seed=7, dtype=dtype, **inputs)
        judge = oracle.Oracle(stock, bounds, dtype)
        expected, wanted = judge(told, **inputs, use_cache=False).logits, (judge.routed, judge.kept)
        modes_fx.optimize(model, plan_of(bounds))
    with modes_fx.stats(model).reset() as stats:
        actual, breaks = compiled(model, backend, inputs)
    assert relative_error(actual, expected, real) <= 2e-5
    assert stats.pairs_routed.equal(wanted[0])
    assert stats.pairs_kept.equal(wanted[1])
    assert stats.skip_ratio() > 0
    assert breaks <= stock_breaks
    assert {site.status for site in backend.sites} == {"rewritten"}
    assert len(backend.sites) >= len(modes_fx.report(model).rewritten) or breaks  # a graph of one layer serves others too
