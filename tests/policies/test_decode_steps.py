"""Rules of decode steps in a whole model: prefills keep all, and each step computes, and reads, what the oracle says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import modes_fx
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies.oea import open_tables
from modes_fx.policies.sere import primary_tables
from tests import harness, oracle, tiny
from tests.wide import beyond

pytestmark = pytest.mark.usefixtures("without_inductor")

EXPERTS, LAYERS, STEPS = 6, 2, 3
RULES = ("oea", "sere")
KEEP_ALL = {"oea": float("inf"), "sere": 0.0}


def plan(rule: str, level: float) -> SkipPlan:
    tables: Any = open_tables(LAYERS, EXPERTS)
    if rule == "sere":
        alike = torch.rand(LAYERS, EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1)) * 2
        tables = primary_tables(alike.tolist(), 1)
    return SkipPlan((PlanPoint(None, level, level),), rule=rule, tables=tables)


def ask(model: Any, rows: int = 4) -> list[Tensor]:
    """Logits of a prompt and of some steps behind it, of tokens that are the same for every model."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 59, (rows, 5 + STEPS), generator=draw)
    with torch.no_grad():
        said = model(input_ids=ids[:, :5], attention_mask=torch.ones(rows, 5).long(), use_cache=True)
        found = [said.logits]
        for end in range(6, 6 + STEPS):
            mask = torch.ones(rows, end).long()
            said = model(input_ids=ids[:, end - 1 : end], attention_mask=mask, past_key_values=said.past_key_values)
            found.append(said.logits)
    return found


class Judge:
    """An eager model whose experts are given what the oracle decides, and what it has them read in each step."""

    def __init__(self, made: SkipPlan) -> None:
        self.model, self.read, self.kept = tiny.make(), [], 0
        self.model.set_experts_implementation("eager")
        tables, bounds = made.table_tensors(LAYERS), made.bounds(LAYERS)

        def hook(layer: int) -> Any:
            def change(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                hidden, ids, weights = args
                bound_T = bounds[layer, 0].expand(len(ids))
                decoding = len(ids) <= 4
                if not decoding:
                    return args
                if made.rule == "sere":
                    ids = oracle.reroute(weights, ids, bound_T, tables[layer])
                left = oracle.decide(made.rule, weights, ids, bound_T, tables[layer])
                self.read.append((layer, len(ids[~left.isnan()].unique())))
                self.kept += int((~left.isnan()).sum())
                return hidden, ids, left.nan_to_num().to(weights.dtype)

            return change

        for layer, experts in enumerate(oracle.experts_of(self.model)):
            experts.register_forward_pre_hook(hook(layer))


@pytest.mark.parametrize("region", beyond({"moe"}, ["moe", "model"], str))
@pytest.mark.parametrize("rule", RULES)
def test_a_model_decodes_as_the_oracle_and_new_levels_compile_nothing(vlm: nn.Module, rule: str, region: Any) -> None:
    levels = {"oea": (1.0, 2.0), "sere": (1e9, 0.8)}[rule]
    modes_fx.optimize(vlm, plan(rule, levels[0]), region=region)
    graphs = []
    for level in levels:
        made = plan(rule, level)
        judge = Judge(made)
        wanted = ask(judge.model)
        modes_fx.set_plan(vlm, made)
        with modes_fx.stats(vlm).reset() as stats, stats.experts_read() as read:
            actual = ask(vlm)
        for mine, theirs in zip(actual, wanted, strict=True):
            assert harness.relative_error(mine, theirs, torch.ones(mine.shape[:2]).bool()) < 1e-4
        assert int(stats.pairs_kept[..., 1].sum()) == judge.kept
        assert stats.skip_ratio(phase="prefill") == 0.0
        if region == "moe":
            assert [(layer, count) for layer, phase, count in read if phase == "decode"] == judge.read
        graphs.append(modes_fx.report(vlm).graphs)
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("rule", RULES)
def test_at_level_0_nothing_changes_bit_by_bit(vlm: nn.Module, rule: str) -> None:
    modes_fx.optimize(vlm)
    before = ask(vlm)
    modes_fx.optimize(vlm, plan(rule, KEEP_ALL[rule]))
    with modes_fx.stats(vlm) as stats:
        after = ask(vlm)
    assert stats.skip_ratio() == 0.0
    for mine, theirs in zip(after, before, strict=True):
        assert mine.equal(theirs)


def test_fewer_experts_are_read_the_higher_the_level(vlm: nn.Module) -> None:
    for rule, levels in {"oea": (float("inf"), 2.0, 1.0), "sere": (0.0, 0.8, 1e9)}.items():
        modes_fx.optimize(vlm, plan(rule, levels[0]))
        counts = []
        for level in levels:
            modes_fx.set_plan(vlm, plan(rule, level))
            with modes_fx.stats(vlm).experts_read() as read:
                ask(vlm)
            counts.append(sum(count for _, phase, count in read if phase == "decode"))
        assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("rule", RULES)
def test_a_bare_graph_which_knows_of_no_phase_refuses_them(rule: str) -> None:
    run = torch.compile(tiny.make(), backend="modes_fx", options={"plan": plan(rule, 1.0)})
    with pytest.raises(BackendCompilerFailed, match=rf"PlanError.*'{rule}' is about decode steps.*optimize"):
        run(input_ids=torch.tensor([[3, 4, 5]]))
