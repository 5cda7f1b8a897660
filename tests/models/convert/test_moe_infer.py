"""What is particular to blocks with a ``moe_infer``: gates that cannot be traced, hooks, Inductor's code."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from tests import tiny
from tests.harness import logits, plan_of, relative_error
from tests.models.convert import remote
from tests.models.convert.cases import CASES, Oracle, random_bounds

CASE = CASES["deepseek"]
INPUTS = tiny.text_batch()
REAL = torch.ones(2, 9, dtype=torch.bool)


class HostGate(remote.SigmoidGate):
    """A router that goes by way of the host, so that its block cannot be traced as one graph."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().forward(hidden_states)
        return torch.from_numpy(ids.cpu().numpy()), weights


@pytest.mark.usefixtures("without_inductor")
def test_a_router_that_cannot_be_traced_runs_in_front_of_the_compiled_dispatch() -> None:
    model = CASE.make()
    for block in CASE.blocks(model):
        block.gate.__class__ = HostGate
    stock = logits(model, INPUTS)
    modes_fx.optimize(model)
    assert len(modes_fx.report(model).converted) == 2
    assert relative_error(logits(model, INPUTS), stock, REAL) <= 1e-5
    bounds = random_bounds(CASE, INPUTS, seed=1)
    oracle = Oracle(CASE, bounds)
    modes_fx.set_plan(model, plan_of(bounds))
    with modes_fx.stats(model) as stats:
        assert relative_error(logits(model, INPUTS), oracle(INPUTS), REAL) <= 5e-5
    assert stats.pairs_kept.sum(dim=(1, 2)).tolist() == oracle.kept
    modes_fx.restore(model)
    assert logits(model, INPUTS).equal(stock)


@pytest.mark.usefixtures("without_inductor")
def test_hooks_on_a_block_are_called() -> None:
    model = CASE.make()
    CASE.blocks(model)[0].register_forward_hook(lambda module, args, output: 2 * output)
    stock = logits(model, INPUTS)
    modes_fx.optimize(model)
    assert relative_error(logits(model, INPUTS), stock, REAL) <= 1e-5


@pytest.mark.usefixtures("without_inductor")
def test_a_forward_of_another_thread_may_end_meanwhile() -> None:
    model = modes_fx.optimize(CASE.make())
    stock = logits(model, INPUTS)
    others: list[Tensor] = []

    def run_another(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(logits(model, INPUTS)))
            thread.start()
            thread.join()

    model.get_output_embeddings().register_forward_pre_hook(run_another)
    assert logits(model, INPUTS).equal(stock)
    assert others[0].equal(stock)


@pytest.mark.usefixtures("without_inductor")
def test_batches_of_many_sizes_end_in_a_few_graphs() -> None:
    model = modes_fx.optimize(CASE.make())
    for rows, length in ((2, 9), (1, 7), (3, 5), (1, 1)):
        logits(model, tiny.text_batch(rows, length))
    graphs = modes_fx.report(model).graphs
    assert graphs <= 4  # as for blocks that need no conversion: the first sizes, one sequence, any sizes; one token
    for rows, length in ((1, 12), (4, 4), (1, 30), (2, 31)):
        logits(model, tiny.text_batch(rows, length))
    assert modes_fx.report(model).graphs == graphs


@pytest.mark.wide
def test_inductors_code_gives_the_oracles_logits() -> None:
    bounds = random_bounds(CASE, INPUTS, seed=1)
    oracle = Oracle(CASE, bounds)
    model = modes_fx.optimize(CASE.make(), plan_of(bounds))
    with modes_fx.stats(model) as stats:
        assert relative_error(logits(model, INPUTS), oracle(INPUTS), REAL) <= 5e-5
    assert stats.pairs_kept.sum(dim=(1, 2)).tolist() == oracle.kept


def test_older_code_without_shared_experts_is_known_too() -> None:
    class Config:
        hidden_size, moe_intermediate_size, n_routed_experts, num_experts_per_tok = 8, 4, 4, 2
        n_group, topk_group, norm_topk_prob, routed_scaling_factor, n_shared_experts = 1, 1, False, 1.0, None

    block = remote.DeepseekBlock(Config)
    found = modes_fx.models.layers.find_moe_layers(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": block})])}))
    assert [(layer.name, layer.block) for layer in found] == [("layers.0.mlp.experts", block)]


@pytest.mark.usefixtures("without_inductor")
def test_inspecting_tells_what_optimising_does_and_leaves_an_optimised_model_so() -> None:
    model = CASE.make()
    inspected = modes_fx.inspect(model)
    assert [(site.status, site.top_k, site.num_experts) for site in inspected.sites] == [("converted", 3, 8)] * 2
    assert {(site.hidden_size, site.expert_width, site.parameters) for site in inspected.sites} == {(32, 16, 8 * 3 * 32 * 16)}
    optimised = logits(modes_fx.optimize(model), INPUTS)
    assert modes_fx.inspect(model).sites == inspected.sites
    assert logits(model, INPUTS).equal(optimised)
    bare = modes_fx.inspect(CASE.make().to("meta"))
    assert [replace(site, detail="") for site in bare.sites] == list(inspected.sites)
