"""One of two processes that share models: ``python -m tests.sharding.worker GROUP RANK FOLDER``; ``conftest`` starts both.

What each check finds is left in ``FOLDER/RANK.pt``, by the check's name.
"""

import contextlib
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils._pytree import tree_map_only
from transformers.distributed import DistributedConfig, expert_parallel

import modes_fx
from modes_fx.calib import Objective, layer_importance
from modes_fx.errors import ModesFxError
from modes_fx.graph.backend import rewrite
from modes_fx.plan import SkipPlan
from tests import harness, oracle, quick_torch, tiny
from tests.calib.conftest import with_answers
from tests.policies.test_optimized import plan as plan_of_rule

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
MIXED = tiny.mixed_batch(seed=5)
POISONED = SkipPlan.uniform(text=0.45, vision=0.45)
FEW = tiny.text_batch(rows=1, length=5, seed=3)
RULES = ("naee", "naee_top2", "diep", "random", "batch_threshold")
SHARED = {"tp_size": 2, "tp_plan": "auto"}
SENT = {**SHARED, "ep_size": 2, "ep_implementation": "all_to_all"}
Check = Callable[[Path], dict[str, Any]]
CHECKS: dict[str, dict[str, Check]] = {"held": {}, "sent": {}}
"""By group: tokens that both processes hold; tokens that travel, or that each has of its own, and what is refused."""


def own_batch(rank: int) -> dict[str, Tensor]:
    """A batch for one process alone."""
    return tiny.mixed_batch(seed=7 + rank)


def victims() -> list[list[int]]:
    """The experts of each layer that nothing keeps under ``poisoned``'s thresholds."""
    kept: list[set[int]] = [set(), set()]
    model = tiny.make("qwen3_moe")
    judge = oracle.Oracle(model, POISONED.bounds(2), torch.float32)
    for layer, experts in enumerate(oracle.experts_of(judge.model)):

        def note(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            _, ids, weights = (*args, *kwargs.values())
            kept[layer] |= set(ids[weights > 0].tolist())

        experts.register_forward_pre_hook(note, with_kwargs=True)
    inputs = FEW
    judge(tiny.classes(inputs), **inputs, use_cache=False)
    return [sorted(set(range(6)) - each) for each in kept]


def check(group: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[group][function.__name__] = function
        return function

    return add


def sharded(family: str = "qwen3_vl_moe", **config: Any) -> nn.Module:
    """A tiny model, sharded as ``from_pretrained`` does it before it reads weights.

    transformers cannot read a shard of this family's checkpoints, which hold the experts transposed.
    """
    model = tiny.make(family)
    made, _, mesh = type(model).prepare_distribute_model(DistributedConfig(**config))
    return type(model).maybe_distribute_model(model, made, mesh).eval()


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    with modes_fx.stats(model) as stats:
        logits = harness.logits(model, inputs)
    return {"logits": logits, "routed": stats.pairs_routed, "kept": stats.pairs_kept}


def optimized_answer(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    modes_fx.optimize(model, PLAN, **options)
    sites = [(site.status, site.form, site.dispatch, site.num_experts) for site in modes_fx.report(model).sites]
    return {**answer(model, inputs), "sites": sites}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ModesFxError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def rows_sent() -> Iterator[list[int]]:
    """Note how many rows this process hands to each all-to-all of hidden states."""
    sent: list[int] = []
    send = expert_parallel.all_to_all_single_autograd

    def noted(rows: Tensor, *args: Any) -> Tensor:
        sent.append(len(rows))
        return send(rows, *args)

    expert_parallel.all_to_all_single_autograd = noted
    try:
        yield sent
    finally:
        expert_parallel.all_to_all_single_autograd = send


@check("held")
def tensor_parallel(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe", distributed_config=DistributedConfig(**SHARED)).eval()
    inputs = tiny.text_batch()
    found = {form: optimized_answer(model, inputs, dispatch=form) for form in ("compact", "static")}
    return {**found, "generated": generated(model, inputs), "graphs": modes_fx.report(model).graphs}


@check("held")
def experts_from_pretrained(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `enable_expert_parallel`
        config = DistributedConfig(tp_size=2, tp_plan="auto", enable_expert_parallel=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe", distributed_config=config).eval()
    found = optimized_answer(model, tiny.text_batch())
    return {**found, "generated": generated(model, tiny.text_batch())}


def generated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**inputs, max_new_tokens=5, do_sample=False)


@check("held")
def all_reduce(folder: Path) -> dict[str, Any]:
    """Experts in two processes that hold the same tokens: every region and both dispatches, and one graph around the model."""
    model = sharded(**SHARED, ep_size=2)
    stock = harness.logits(model, MIXED)
    found: dict[str, Any] = {"stock": stock}
    for region, form in (("moe", "compact"), ("moe", "static"), ("layer", "compact"), ("model", "static")):
        found[f"{region}, {form}"] = optimized_answer(model, MIXED, region=region, dispatch=form)
    modes_fx.set_plan(model, None)
    found["nothing skipped"] = harness.logits(model, MIXED)
    found["restored"] = harness.logits(modes_fx.restore(model), MIXED)
    return found


@check("held")
def one_graph(folder: Path) -> dict[str, Any]:
    """``torch.compile`` around the model: its graph as it is, and as the pass leaves it."""
    model, inputs, seen = modes_fx.optimize(sharded("qwen3_moe", **SHARED, ep_size=2), PLAN), tiny.text_batch(), []

    def passed(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append([(site.status, site.gemms, site.layer) for site in rewrite(module)])
        return module.forward

    found: dict[str, Any] = {}
    for name, backend in (("as it is", "eager"), ("passed", passed)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        with modes_fx.stats(model) as stats, torch.no_grad():
            logits = compiled(**inputs, use_cache=False).logits
        found[name] = {"logits": logits, "routed": stats.pairs_routed, "kept": stats.pairs_kept}
        stats.reset()
    return {**found, "sites": seen}


@check("held")
def rows_computed(folder: Path) -> dict[str, Any]:
    """What reaches the GEMMs, and that experts which nothing keeps are not touched: they hold NaN."""
    log = harness.GemmLog()
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, log)
        for form in ("compact", "static"):
            model = modes_fx.optimize(sharded("qwen3_moe", **SHARED, ep_size=2), POISONED, dispatch=form)
            first = 3 * dist.get_rank()
            for experts, unused in zip(oracle.experts_of(model), victims(), strict=True):
                mine = [expert - first for expert in unused if first <= expert < first + 3]
                for weight in experts.parameters():
                    weight.data.to_local()[mine] = math.nan
            log.clear()
            found[form] = {**answer(model, FEW), "rows": list(log.rows), "computed": list(log.computed)}
    return found


@check("held")
def rules(folder: Path) -> dict[str, Any]:
    """Rules that weigh a token's pairs against each other, or need tables of all experts."""
    model = sharded(**SHARED, ep_size=2)
    return {rule: answer(modes_fx.optimize(model, plan_of_rule(rule, 0.5)), MIXED) for rule in RULES}


@check("sent")
def all_to_all(folder: Path) -> dict[str, Any]:
    """The tokens travel, between processes that hold the same ones: each sends its share."""
    model = sharded(**SENT)
    with rows_sent() as stock_sent:
        stock = harness.logits(model, MIXED)
    found: dict[str, Any] = {"stock": stock, "stock sent": stock_sent}
    for form in ("compact", "static"):
        modes_fx.optimize(model, PLAN, dispatch=form)
        with rows_sent() as sent:
            found[form] = {**answer(model, MIXED), "sent": sent}
    found["one token"] = harness.logits(model, {"input_ids": MIXED["input_ids"][:1, -1:]})
    modes_fx.set_plan(model, SkipPlan.uniform(text=math.inf, vision=math.inf))
    found["nothing"] = harness.logits(model, MIXED)
    found["region"] = refusal(lambda: modes_fx.optimize(model, PLAN, region="layer"))
    found["restored"] = harness.logits(modes_fx.restore(model), MIXED)
    return found


@check("sent")
def in_parts(folder: Path) -> dict[str, Any]:
    """``torch.compile`` around the model, where stock reads sizes from the host in every layer."""
    model = modes_fx.optimize(sharded("qwen3_moe", **SENT), PLAN)
    torch._dynamo.reset()
    with torch.no_grad():
        return {"logits": torch.compile(model, backend="eager")(**tiny.text_batch(), use_cache=False).logits}


@check("sent")
def data_parallel(folder: Path) -> dict[str, Any]:
    """Each process has tokens of its own: their experts in the other, or all weights in both (FSDP2)."""
    mine = own_batch(dist.get_rank())
    model = sharded(fsdp_size=2, ep_size=2)
    with rows_sent() as sent:
        found: dict[str, Any] = {"experts": {**optimized_answer(model, mine), "sent": sent}}
    found["mc_moe"] = answer(modes_fx.optimize(model, plan_of_rule("mc_moe", 0.5)), mine)
    found["fsdp"] = optimized_answer(sharded(fsdp_size=2), mine)
    before, after = tiny.make(), tiny.make()
    modes_fx.optimize(before, PLAN)
    for each in (before, after):
        for layer in each.model.language_model.layers:
            fully_shard(layer)
        fully_shard(each)
    found["optimised first"] = answer(before, mine)
    found["sharded first"] = optimized_answer(after, mine)
    return found


class Elsewhere(expert_parallel.AllReduceEP):
    """Somebody's own way to bring tokens to experts."""


@check("sent")
def refusals(folder: Path) -> dict[str, Any]:
    expert_parallel.EPImplementationInterface.register("elsewhere", Elsewhere)
    unknown = sharded(**SHARED, ep_size=2, ep_implementation="elsewhere")
    model = sharded(**SHARED, ep_size=2)
    batch = with_answers(0)
    wrapped = FullyShardedDataParallel(tiny.make("qwen3_moe"), device_id=torch.device("cpu"))
    return {
        "implementation": refusal(lambda: modes_fx.optimize(unknown, PLAN)),
        "stock runs on": harness.logits(unknown, MIXED),
        "importance": refusal(lambda: layer_importance(model, [batch])),
        "objective": refusal(lambda: Objective(modes_fx.optimize(model, PLAN), [batch])),
        "mc_moe": refusal(lambda: modes_fx.optimize(model, plan_of_rule("mc_moe", 0.5))),
        "prepack": refusal(lambda: modes_fx.optimize(model, PLAN, prepack=True)),
        "bare backend": bare_backend(),
        "pipeline": refusal(lambda: modes_fx.optimize(sharded("qwen3_moe", pp_size=2), PLAN)),
        "fsdp": refusal(lambda: modes_fx.optimize(wrapped, PLAN)),
        "inside fsdp": refusal(lambda: modes_fx.optimize(wrapped.module, PLAN)),
    }


def bare_backend() -> str:
    torch._dynamo.reset()
    report = modes_fx.GraphReport()
    compiled = torch.compile(sharded("qwen3_moe", **SHARED, ep_size=2), backend="modes_fx", options={"report": report})
    with torch.no_grad():
        compiled(**tiny.text_batch(), use_cache=False)
    return ", ".join(sorted({f"{site.status} {site.code}: {site.detail}" for site in report.sites}))


def main(group: str, rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    quick_torch.quicken()
    quick_torch.freeze_imports()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        found = {}
        for name, function in CHECKS[group].items():
            sys.stderr.write(f"{time.process_time():.0f} s of CPU time: {name}\n")  # shown where a process fails or hangs
            found[name] = function(folder)
    plain = functools.partial(tree_map_only, Tensor, lambda tensor: tensor.detach().clone())
    torch.save(plain(found), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
