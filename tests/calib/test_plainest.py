"""Plans against each token's k largest weights, on a tiny model whose every token has three."""

import pytest

from modes_fx.calib import Objective
from modes_fx.calib.plainest import Worse, worse_than_reduce_k
from modes_fx.optimize import is_optimized, optimize, restore
from modes_fx.plan import PlanPoint, SkipPlan
from tests import tiny
from tests.calib.conftest import with_answers

DATA = [with_answers(3), with_answers(4)]


def point(target: float, ratio: float, kl: float) -> PlanPoint:
    return PlanPoint(target, 0.1, 0.1, 0.0, {"calibration": ratio, "held_out": ratio}, {"calibration": kl, "held_out": kl})


@pytest.mark.usefixtures("without_inductor")
def test_points_that_lose_more_at_their_ratio_are_named() -> None:
    model = tiny.make()
    optimize(model, SkipPlan.reduce_k(1))
    one = Objective(model, DATA).evaluate(SkipPlan.reduce_k(1).bounds(2))
    restore(model)
    loss = one.kl
    assert one.skip_ratio == pytest.approx(2 / 3)
    assert loss > 0

    plan = SkipPlan((point(0.6, 0.6, 2 * loss), point(0.67, 0.67, 2 * loss), point(0.7, 0.7, 2 * loss)))
    assert worse_than_reduce_k(model, plan, DATA) == (
        Worse(0.6, 2 * loss, 0.6, 1, loss),  # keeping one weight skips even more
        Worse(0.67, 2 * loss, 0.67, 1, loss),  # or half a point less
    )  # beyond that nothing is left to keep
    assert worse_than_reduce_k(model, SkipPlan((point(0.6, 0.6, loss / 2),)), DATA) == ()
    assert not is_optimized(model)
