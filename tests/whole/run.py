"""Run a case: an optimised model's answers, pairs routed and pairs kept against the oracle's."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import modes_fx
from modes_fx.models.layers import find_moe_layers
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.plan.budget import budget_of
from modes_fx.policies.batch_threshold import slack_tables
from modes_fx.policies.chance import seed_tables
from tests import harness, tiny
from tests.families import pictures
from tests.families.test_vision import ORACLE_DTYPE, told_by
from tests.whole.case import FREE, SEEING, TABLED, Call, Case, Plan, Stage
from tests.whole.judge import Judge, Steered, Undecided

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}
"""Of logits, relative to the largest."""
SPECIAL = sorted({tiny.IMAGE, tiny.VISION_START, tiny.VISION_END, 63, *range(pictures.AUDIO, pictures.END + 1)})
Inputs = dict[str, Any]


@dataclasses.dataclass
class Answer:
    """What a call gave: logits of each forward [B, S, V], the tokens generated."""

    logits: list[Tensor]
    tokens: Tensor | None = None


@functools.lru_cache(maxsize=64)
def stock_of(stage: Stage) -> nn.Module:
    """Return a stage's model, as transformers makes it."""
    if stage.family in TABLED:
        return TABLED[stage.family].build()
    return tiny.make(FREE[stage.family], DTYPES[stage.dtype], layers=1 if stage.dtype == "bfloat16" else None)


@functools.lru_cache(maxsize=64)
def optimised(stage: Stage) -> nn.Module:
    """Return it optimised."""
    model = copy.deepcopy(stock_of(stage))
    with pytest.MonkeyPatch.context() as patch:
        if not stage.inductor:
            harness.compile_with(patch, harness.uncompiled)
        plan = plan_of(stage, Plan(0.0, 0.0))
        settings: Any = {name: getattr(stage, name) for name in ("region", "dispatch", "dynamic")}
        return modes_fx.optimize(model, plan, **settings)


def plan_of(stage: Stage, plan: Plan) -> SkipPlan:
    """Return the plan; decode steps may have a target to themselves."""
    found = find_moe_layers(stock_of(stage))
    layers, experts = len(found), found[0].num_experts
    rows = tuple(plan.alpha[layer % len(plan.alpha)] for layer in range(layers)) if stage.rule != "reduce_k" else None
    points = [PlanPoint(plan.budget or 0.25, plan.text, plan.vision, plan.gamma)]
    if plan.decode is not None:
        points.append(PlanPoint(0.95, *plan.decode, plan.gamma))
    more: dict[str, Any] = {}
    if stage.rule == "diep":
        draw = torch.Generator().manual_seed(1)
        table = torch.rand(layers, experts, experts, generator=draw) + 0.5
        more["tables"] = tuple(tuple(map(tuple, each.tolist())) for each in table)
    elif stage.rule == "batch_threshold":
        more["tables"] = slack_tables(layers, experts, 0.5)
    elif stage.rule == "random":
        more["tables"] = seed_tables(layers, 3)
    if plan.budget is not None:
        quantiles = tuple((torch.linspace(0, 1, 9) ** 2 * 0.8).tolist())
        more |= {"mode": "budget", "weights": ((quantiles, quantiles),) * layers}
    return SkipPlan(tuple(points), rows, rule=stage.rule, **more)


def inputs_of(stage: Stage, call: Call) -> tuple[Inputs, Tensor | None]:
    """Return a call's arguments, and the classes that it states where the model cannot know them, int64 [B, S]."""
    draw = torch.Generator().manual_seed(call.seed)
    seen = any(images for _, images, _ in call.rows)
    if stage.family in TABLED and stage.family.startswith("vision/") and seen:
        return _redrawn(TABLED[stage.family].inputs(), call, draw), None
    if stage.family in SEEING:
        return tiny.batch([tiny.image_row(*row, draw) for row in call.rows], side=call.side, seed=call.seed), None
    lengths = [before + 4 * images + behind for before, images, behind in call.rows]
    inputs = tiny.batch([torch.randint(2, 59, (length,), generator=draw).tolist() for length in lengths], side=call.side)
    if not seen or stage.family.startswith("vision/"):
        return inputs, None
    visual = torch.rand(inputs["input_ids"].shape, generator=draw) < 0.4
    return inputs, torch.where(inputs["attention_mask"] == 0, 2, visual.long())


def _redrawn(inputs: Inputs, call: Call, draw: torch.Generator) -> Inputs:
    """Return a batch with other text, its padding on the side that the call wants."""
    ids = inputs["input_ids"]
    text = (ids >= 2) & (ids < pictures.AUDIO)
    inputs = {**inputs, "input_ids": torch.where(text, torch.randint(2, pictures.AUDIO, ids.shape, generator=draw), ids)}
    if call.side == "left":
        return inputs
    shifts = [int((mask == 0).sum()) for mask in inputs["attention_mask"]]
    return {
        name: torch.stack([row.roll(-shift) for row, shift in zip(value, shifts, strict=True)])
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "decoder_input_ids"
        else value
        for name, value in inputs.items()
    }


def ask(model: nn.Module, call: Call, inputs: Inputs, dtype: torch.dtype) -> Answer:
    """Make a call."""
    asked: Any = model
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None  # of the call before
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    if call.way == "generate":
        static = {"cache_implementation": "static", "disable_compile": True} if call.cache == "static" else {}
        said = asked.generate(
            **given, max_new_tokens=call.steps + 1, do_sample=False, suppress_tokens=SPECIAL, eos_token_id=None,
            use_cache=call.cache != "none", output_logits=True, return_dict_in_generate=True, pad_token_id=tiny.PAD, **static,
        )  # fmt: skip
        return Answer([each.unsqueeze(1) for each in said.logits], said.sequences)
    length = given["input_ids"].shape[1]
    if call.cache == "static":
        given["past_key_values"] = StaticCache(config=asked.config.get_text_config(), max_cache_len=length + call.steps)
    draw = torch.Generator().manual_seed(call.seed + 1)
    with torch.no_grad():
        said = asked(**given, use_cache=call.cache != "none")
        found, mask = [said.logits], given["attention_mask"]
        for _ in range(call.steps if call.cache != "none" else 0):
            ids = torch.randint(2, 59, (len(mask), 1), generator=draw)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            said = asked(input_ids=ids, attention_mask=mask, past_key_values=said.past_key_values, use_cache=True)
            found.append(said.logits)
    return Answer(found)


def told(stage: Stage, call: Call, inputs: Inputs, stated: Tensor | None) -> Any:
    """Return what the oracle is told of each forward; see ``Oracle``."""
    ids = inputs["input_ids"]
    classes = torch.where(inputs["attention_mask"] == 0, 2, (ids == tiny.IMAGE).long()) if stated is None else stated
    first = told_by(inputs) if stage.family.startswith("vision/") else None
    batch, length = ids.shape

    def tell(name: str, tokens: int) -> tuple[Tensor, int]:
        if tokens == batch and call.cache != "none" and "vision_tower" not in name:
            return torch.zeros(batch, dtype=torch.int64), 1
        if call.cache == "none" and stated is not None and tokens > batch * length:  # the statement is of another shape
            return _grown(torch.where(classes == 2, 2, 0), tokens), 0
        if tokens % (batch * length) == 0 or first is not None:
            return first(name, tokens) if first is not None and tokens <= batch * length else (_grown(classes, tokens), 0)
        return _grown(classes, tokens), 0

    return tell


def _grown(classes: Tensor, tokens: int) -> Tensor:
    new = tokens // len(classes) - classes.shape[1]
    return torch.cat([classes, torch.zeros(len(classes), new, dtype=torch.int64)], dim=1).reshape(-1)


@contextlib.contextmanager
def _stated(classes: Tensor | None) -> Iterator[None]:
    with modes_fx.token_modality(classes) if classes is not None else contextlib.nullcontext():
        yield


def check(case: Case) -> tuple[int, int]:
    """Run a case.

    Returns:
        Pairs routed and pairs kept.

    Raises:
        AssertionError: The optimised model answers, or counts, otherwise than the oracle.
        Undecided: Stock cannot do what the case asks for, or it may end one way or the other.
    """
    stage, call = case.stage, case.call
    if (call.way, call.cache, call.side) == ("generate", "static", "right"):
        raise Undecided("some families' masks over a static cache do not tell padding behind a sequence")
    (inputs, stated), dtype = inputs_of(stage, call), DTYPES[stage.dtype]
    torch.manual_seed(0)
    stock = stock_of(stage)
    try:
        ask(stock, call, inputs, dtype)
    except Exception as error:
        raise Undecided(
            f"stock cannot: {stage.family} {call.way} {call.cache}: {type(error).__name__} {str(error)[:60]}"
        ) from error
    judge = _judge(case, dtype)
    judge._told = told(stage, call, inputs, stated)
    expected = ask(judge.model, call, inputs, judge.dtype)

    model, plan = optimised(stage), plan_of(stage, case.plan)
    modes_fx.set_plan(model, plan, plan.targets[0], decode_target=plan.targets[-1])
    with modes_fx.stats(model).reset() as stats, _stated(stated):
        actual = ask(model, call, inputs, dtype)
    _compare(actual, expected, inputs, TOLERANCE[stage.dtype])
    # No oracle sees into a loop that was converted: its cases keep all.
    routed, kept = (judge.routed, judge.kept) if len(judge.routed) else (stats.pairs_routed,) * 2
    assert stats.pairs_routed.equal(routed), f"routed {stats.pairs_routed.tolist()}, not {routed.tolist()}"
    assert stats.pairs_kept.equal(kept), f"kept {stats.pairs_kept.tolist()}, not {kept.tolist()}"
    return int(routed.sum()), int(kept.sum())


def _judge(case: Case, dtype: torch.dtype) -> Judge:
    stage, plan = case.stage, plan_of(case.stage, case.plan)
    layers = len(find_moe_layers(stock_of(stage)))
    phased = torch.stack([plan.bounds(layers, plan.targets[0]), plan.bounds(layers, plan.targets[-1])])
    steered = None
    if case.plan.budget is not None:
        budget = budget_of(plan, layers, phased, case.plan.budget)
        rows, shares = budget._rows_LGC[..., :2].double().tolist(), budget._shares_LGM.double().tolist()
        steered = Steered(rows, shares, case.plan.budget, feedback=stage.region != "model")
    name = stage.family.partition("/")[2]
    precise = dtype if stage.dtype == "bfloat16" else ORACLE_DTYPE.get(name, torch.float64)
    return Judge(
        stock_of(stage), stage.rule, phased, precise, plan.table_tensors(layers) if plan.tables else [None] * layers, steered
    )


def _compare(actual: Answer, expected: Answer, inputs: Inputs, tolerance: float) -> None:
    assert len(actual.logits) == len(expected.logits)
    real = inputs["attention_mask"] == 1
    for step, (found, wanted) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        mine = real if found.shape[:2] == real.shape else torch.ones(found.shape[:2]) == 1
        largest = float(wanted.double()[mine].abs().max())
        error = float((found.double() - wanted.double())[mine].abs().max()) / largest
        assert error <= tolerance, f"forward {step}: {error:.2g} off"
        if actual.tokens is not None and expected.tokens is not None:
            at = real.shape[1] + step
            if not actual.tokens[:, at].equal(expected.tokens[:, at]):
                best = wanted.double()[:, 0].index_fill(1, torch.tensor(SPECIAL), -math.inf).topk(2, dim=1).values
                assert float((best[:, 0] - best[:, 1]).min()) <= 2 * tolerance * largest, "another token"
                raise Undecided("two tokens alike")
