"""One case of the whole way: a model, how it is optimised, a plan and a call, all drawn; a case is its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any, Literal

from hypothesis import strategies as st

from tests import tiny
from tests.families.text import TEXT
from tests.families.vision import VISION, WRAPPERS

Cache = Literal["none", "dynamic", "static"]
Way = Literal["forward", "generate"]

TABLED = {f"text/{family.name}": family for family in TEXT} | {
    f"vision/{family.name}": family for family in (*VISION, *WRAPPERS)
}
FREE = {f"tiny/{name}": name for name in tiny.FAMILIES}
"""Families that take any number of pictures in any row, and any rule and region; tabled ones bring their pictures with them."""
SEEING = {"tiny/qwen3_vl_moe", "tiny/glm4v_moe"}
FAMILIES = (*FREE, *(name for name, family in TABLED.items() if not family.expected.startswith("rejected")))

RULES = ("threshold", "batch_threshold", "reduce_k", "naee", "naee_top2", "diep", "random", "mc_moe")
REGIONS = ("moe", "layer", "model")
CACHES: tuple[Cache, ...] = ("none", "dynamic", "static")
OBSERVABLE = {"tiny/qwen3_vl_moe", "tiny/glm4v_moe", "tiny/qwen3_moe", "tiny/qwen2_moe", "tiny/mixtral", "tiny/olmoe"}
"""Families whose attention runs as sdpa in layers of the usual form, so that a rule that protects tokens can watch it."""
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9, math.inf)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model as it was optimised; many plans and calls share it.

    Attributes:
        family: One of ``FAMILIES``.
        dtype: In bfloat16 there is one MoE layer: what a second one routes by is rounded differently on each way.
        region: See ``modes_fx.optimize``; so are ``dispatch`` and ``rule``.
        dynamic: See ``modes_fx.optimize``; True is cheap, as it makes fewer graphs.
        inductor: Whether Inductor compiles the rewritten graphs, or they run as they are.
        cache: The kind of cache of all its calls; None for any.
    """

    family: str
    dtype: str = "float32"
    region: str = "moe"
    dispatch: str = "compact"
    rule: str = "threshold"
    dynamic: bool | None = True
    inductor: bool = False
    cache: Cache | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Thresholds.

    Attributes:
        alpha: (text, vision) of each MoE layer, from the first again where there are more layers.
        gamma: See ``PlanPoint``; so are ``text`` and ``vision``.
        decode: The two of decode steps; None where they have none of their own.
        budget: The target that prefills are kept at; None for fixed thresholds.
    """

    text: float = 0.2
    vision: float = 0.4
    alpha: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    gamma: float = 1.0
    decode: tuple[float, float] | None = None
    budget: float | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """What a model is asked.

    Attributes:
        rows: For each sequence the text tokens before its pictures, the pictures, the text tokens behind them. A tabled family
            that sees has two sequences with a picture each if any is drawn; one that does not is told which tokens are visual.
        side: Of the padding.
        way: Forwards, or ``generate``.
        cache: Its kind.
        steps: Decode steps behind the first forward; tokens behind the first, of ``generate``.
        seed: Of tokens and pixels.
    """

    rows: tuple[tuple[int, int, int], ...] = ((2, 0, 2),)
    side: str = "left"
    way: Way = "forward"
    cache: Cache = "none"
    steps: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """All of it."""

    stage: Stage
    plan: Plan
    call: Call

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read what ``str`` wrote."""
        said = json.loads(text)
        plan, call = ({key: _tuples(value) for key, value in said[part].items()} for part in ("plan", "call"))
        return cls(Stage(**said["stage"]), Plan(**plan), Call(**call))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def pool(seed: int, size: int = 9) -> list[Stage]:
    """Draw the stages of one run; every family, rule and region comes up for some seed.

    One in three has a family that takes any rule, one in six bfloat16, one is compiled by Inductor. Each kind of cache makes
    graphs of its own in wider regions, and graphs are what a run takes its time for: there all calls of a stage have one kind.
    """
    draw, stages = random.Random(seed), []
    for number in range(size):
        if number % 3:
            stages.append(Stage(draw.choice(FAMILIES)))
            continue
        family, region = draw.choice(tuple(FREE)), draw.choice(REGIONS)
        dtype = "bfloat16" if number % 6 else "float32"
        watched = family in OBSERVABLE and dtype == "float32"
        rule = draw.choice([rule for rule in RULES if rule != "mc_moe" or watched])
        dispatch, dynamic = draw.choice(("compact", "static")), draw.choice((None, True))
        cache = None if region == "moe" else draw.choice(CACHES)
        stages.append(Stage(family, dtype, region, dispatch, rule, dynamic, inductor=number == 0, cache=cache))
    return stages


def _keeps_all(stage: Stage) -> bool:
    """Return whether a stage can be compared with stock alone: no oracle sees into a loop that was converted."""
    return stage.family in TABLED and TABLED[stage.family].expected == "converted"


def plans(stage: Stage) -> st.SearchStrategy[Plan]:
    """Draw thresholds that a stage can be given."""
    if stage.rule == "reduce_k":
        return st.builds(
            Plan,
            *[st.sampled_from((0.0, 1.0, 2.0, math.inf))] * 2,
            decode=st.none() | st.tuples(*[st.sampled_from((0.0, 1.0, math.inf))] * 2),
        )
    if _keeps_all(stage):
        return st.just(Plan(0.0, 0.0))
    level = st.sampled_from(LEVELS)
    importance = st.sampled_from((1.0, 0.5, 2.0, 0.0))
    steered = stage.rule == "threshold" and stage.family in FREE
    return st.builds(
        Plan,
        level,
        level,
        st.lists(st.tuples(importance, importance), min_size=1, max_size=3).map(tuple),
        st.sampled_from((1.0, 0.5, 0.0)),
        st.none() | st.tuples(level, level),
        st.none() | st.sampled_from((0.27, 0.53, 0.81)) if steered else st.none(),
    )


def calls(stage: Stage) -> st.SearchStrategy[Call]:
    """Draw a call that a stage can be asked."""
    sides = ("left",) if _keeps_all(stage) else ("left", "right")  # stock has answers for padding, which nobody reads
    row = st.tuples(st.integers(1, 5), st.integers(0, 2), st.integers(1, 5))
    return st.builds(
        Call,
        st.lists(row, min_size=1, max_size=3).map(tuple),
        st.sampled_from(sides),
        st.sampled_from(("forward", "generate")),
        st.sampled_from(CACHES if stage.cache is None else (stage.cache,)),
        st.integers(0, 3),
        st.integers(0, 99),
    )


def cases(stages: list[Stage]) -> st.SearchStrategy[Case]:
    """Draw cases on some stages."""
    return st.sampled_from(stages).flatmap(lambda stage: st.builds(Case, st.just(stage), plans(stage), calls(stage)))
