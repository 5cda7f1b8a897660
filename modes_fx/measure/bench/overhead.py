"""What modes-fx adds around the generated code of a decode step.

With every pair kept, two clocks run in each region: one around its compiled call, one around the code that Inductor generated
for it. Between them lie dynamo's guards, the look-up of the layer and its thresholds, and AOTAutograd's wrapper. With the
modality ids that the watch on the stack makes, timed on their own, that is all a step has beside its work. They wait for
no device: on a GPU they tell the host's time, and that of the step alone waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from modes_fx.attach.regions import Region as CompiledRegion
from modes_fx.measure.timing import now
from modes_fx.measure.twins import Setting, stock_twin
from modes_fx.modality import token_modality
from modes_fx.models.layers import Region
from modes_fx.optimize import optimize, optimized_state, restore

_WARM_UP = 5


@dataclass(frozen=True)
class Overhead:
    """Medians over decode steps, in microseconds.

    Attributes:
        region: What is compiled.
        step_us: A whole step of the stack.
        regions_us: Around the generated code of all regions: guards, look-ups, wrappers.
        modality_us: Making the modality ids.
        share: Of the step, both.
    """

    region: Region
    step_us: float
    regions_us: float
    modality_us: float
    share: float


class _Clock:
    """Adds up the seconds of the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def measure(stack: Any, region: Region, arguments: Callable[[int], dict[str, Any]], steps: int, classes: Tensor) -> Overhead:
    """Measure decode steps of a stack; it stays as it was.

    Args:
        stack: Decoder layers.
        region: What to compile.
        arguments: Given a number, returns fresh arguments of a decode step.
        steps: Steps to time.
        classes: int64 [1, 1], the token's class.
    """
    from torch._inductor import compile_fx

    model: Any = stock_twin(stack, Setting("grouped_mm"))
    inside, outside, watched = _Clock(), _Clock(), _Clock()
    compile_graph = compile_fx.compile_fx

    def compile_timed(*args: Any, **kwargs: Any) -> Any:
        generated: Any = compile_graph(*args, **kwargs)
        return inside.around(generated)

    optimize(model, region=region)
    around_regions = mock.patch.object(CompiledRegion, "run_compiled", outside.around(CompiledRegion.run_compiled))
    try:
        for watch in optimized_state(model).watches:
            vars(watch)["_forward"] = watched.around(watch._forward)
        whole, around, ids = [], [], []
        with around_regions, mock.patch.object(compile_fx, "compile_fx", compile_timed), token_modality(classes):
            for index in range(-_WARM_UP, steps):
                given = arguments(index)
                inside.seconds = outside.seconds = watched.seconds = 0.0
                started = now(classes.device)
                model(**given)
                seconds = now(classes.device) - started
                if not inside.seconds:
                    raise RuntimeError("no call of the code that Inductor generated was seen: it is reached another way now")
                if index >= 0:
                    whole.append(1e6 * seconds)
                    around.append(1e6 * (outside.seconds - inside.seconds))
                    ids.append(1e6 * watched.seconds)
    finally:
        restore(model)
    step, regions, modality = (statistics.median(column) for column in (whole, around, ids))
    return Overhead(region, step, regions, modality, (regions + modality) / step)
