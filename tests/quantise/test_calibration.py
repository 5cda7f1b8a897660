"""A plan is searched for on a quantised model as on any, and its journal tells the widths apart."""

import pytest

import modes_fx
from modes_fx.calib import layer_importance, search
from modes_fx.calib.trials import weights_hash
from tests.calib.conftest import with_answers, without_labels
from tests.harness import logits

pytest.importorskip("torchao", reason="quantised experts need torchao")
from tests.quantise.models import plain, quantised


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("bits", [8, 4])
def test_importance_and_search(bits: int) -> None:
    model, batches = modes_fx.optimize(quantised(bits)), [with_answers(1), with_answers(2)]
    plan = search(model, batches, layer_importance(model, batches), targets=(0.5,), grid_size=5)
    assert plan.point(0.5).realised["calibration"] >= 0.5
    modes_fx.set_plan(model, plan, 0.5)
    with modes_fx.stats(model).reset() as stats:
        for batch in batches:
            logits(model, without_labels(batch))
    assert stats.skip_ratio() == pytest.approx(plan.point(0.5).realised["calibration"])


def test_the_hash_of_the_weights_tells_widths_apart() -> None:
    hashes = [weights_hash(model) for model in (plain(), quantised(8), quantised(4), quantised(4))]
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3]
