"""All rules on a tiny model: each reaches its target or says that it cannot, and what is reported is what happened."""

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import modes_fx
from modes_fx.calib import Objective
from modes_fx.errors import CalibrationError, ModesFxError, PlanError
from modes_fx.measure.compare import Comparison, Row, compare, mean_row
from modes_fx.measure.compare.contenders import contender, taking_part
from modes_fx.measure.compare.samples import SampleObjective
from modes_fx.models.layers import find_moe_layers
from modes_fx.policies import RULES, Rule, register
from tests import harness, oracle, tiny
from tests.calib.conftest import oracle_kl, with_answers, without_labels

CALIBRATION, TEST = [with_answers(1), with_answers(2, side="right"), with_answers(3)], [with_answers(4), with_answers(5)]
search_module = importlib.import_module("modes_fx.calib.search")  # `modes_fx.calib.search` is the function of that name
TARGETS, TOLERANCE = (0.5, 0.75), 0.04
PREFILL, KEEPS_RANK_1 = taking_part("prefill"), ("naee_top2", "top_p", "entropy_k")


@pytest.fixture(scope="module")
def compared() -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        model = tiny.make()
        before = harness.model_state(model)
        found = compare(model, CALIBRATION, TEST, TARGETS, grid_size=4, tolerance=TOLERANCE)
        assert harness.model_state(model) == before
    return found


def row_of(compared: Comparison, rule: str, target: float) -> Row:
    return next(row for row in compared.rows if (row.rule, row.target) == (rule, target))


@pytest.mark.slow
def test_every_rule_has_a_row_for_every_target(compared: Comparison) -> None:
    assert [(row.rule, row.target) for row in compared.rows] == [(name, target) for name in PREFILL for target in TARGETS]
    assert compared.samples == 6


@pytest.mark.slow
@pytest.mark.parametrize("rule", PREFILL)
def test_a_rule_is_tuned_to_its_target(compared: Comparison, rule: str) -> None:
    for target in TARGETS:
        row = row_of(compared, rule, target)
        if rule in KEEPS_RANK_1 and target > 2 / 3:
            assert row.status == "unreachable"
            assert row.largest == pytest.approx(2 / 3)  # of 3 experts, the first stays
            assert not row.metrics
            continue
        assert row.skipped["calibration"] >= target
        if row.status == "reached":
            assert row.skipped["calibration"] <= target + TOLERANCE
        elif rule == "reduce_k":  # it skips thirds
            assert row.skipped["calibration"] in (pytest.approx(2 / 3), 1.0)
        else:  # a share above 1 drops a whole layer at once
            assert rule in ("naee", "diep")
            assert target > 2 / 3
            assert row.skipped["calibration"] < 1.0


@pytest.mark.slow
def test_thresholds_measure_what_the_oracle_does(compared: Comparison) -> None:
    row = row_of(compared, "threshold", 0.5)
    bounds = torch.full((2, 2), row.point["tau_text"])
    kl, routed, kept = oracle_kl(TEST, bounds)
    assert row.metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert row.skipped["all"] == row.skipped["prefill"] == pytest.approx(1 - int(kept.sum()) / int(routed.sum()))
    assert row.skipped["text"] == pytest.approx(1 - int(kept[:, 0].sum()) / int(routed[:, 0].sum()))


@pytest.mark.slow
def test_intervals_hold_their_metric(compared: Comparison) -> None:
    for row in compared.rows:
        for name, (low, high) in row.intervals.items():
            assert low - 1e-12 <= row.metrics[name] <= high + 1e-12


@pytest.mark.usefixtures("without_inductor")
def test_scores_are_the_samples_own(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm)
    whole, bounds = Objective(vlm, TEST), torch.full((2, 2), 0.4)
    each = SampleObjective(vlm, TEST)
    scores, sums = each.scores(bounds), whole.evaluate(bounds)
    assert float(scores.kl_S.sum() / scores.tokens_S.sum()) == pytest.approx(sums.kl)
    assert scores.skip_ratio["vision"] == sums.skip_ratio_vision
    assert scores.tokens_S.tolist() == [1, 2, 3] * 2
    stock, skipped = oracle.Oracle(tiny.make(), None), oracle.Oracle(tiny.make(), bounds)
    flips = []
    for batch in TEST:
        best = [m(tiny.classes(batch), **without_labels(batch), use_cache=False).logits.argmax(-1) for m in (stock, skipped)]
        changed = (best[0] != best[1])[:, :-1] & (batch["labels"][:, 1:] != -100)
        flips += changed.sum(1).tolist()
    assert scores.flips_S.tolist() == flips
    assert int(each.scores(None).kl_S.count_nonzero()) == 0


@pytest.mark.slow
def test_a_mean_over_models_spans_them(compared: Comparison) -> None:
    row = row_of(compared, "naee", 0.5)
    worse = replace(row, metrics={**row.metrics, "kl": row.metrics["kl"] + 1.0}, status="overshot")
    both = mean_row([row, worse])
    assert (both.models, both.status) == (2, "overshot")
    assert both.metrics["kl"] == pytest.approx(row.metrics["kl"] + 0.5)
    assert both.spread["kl"] == (row.metrics["kl"], worse.metrics["kl"])
    assert both.intervals["kl"] == (0.0, pytest.approx(both.metrics["kl"] + 12.7062 * 0.5))  # t of 1, standard error 1 / 2
    assert both.intervals["score"] == (row.metrics["score"],) * 2
    none = mean_row([row, replace(row, status="unreachable", largest=0.3, metrics={}, skipped={})])
    assert (none.status, none.largest, none.metrics) == ("unreachable", 0.3, {})
    assert mean_row([row]) is row


@pytest.mark.usefixtures("without_inductor")
def test_a_registered_rule_takes_part(vlm: nn.Module) -> None:
    register("above", Rule(lambda weights_TK, bound_T: weights_TK >= bound_T.unsqueeze(1), 0.0, math.inf))
    try:
        found = compare(vlm, CALIBRATION, TEST, (0.5,), ("above", "threshold"), tolerance=TOLERANCE)
    finally:
        del RULES["above"]
    mine, same = found.rows
    assert mine.metrics == same.metrics
    assert not mine.speed


def test_a_rule_whose_tables_nobody_knows_is_refused() -> None:
    register("tabled", Rule(lambda weights_TK, bound_T, table_E: weights_TK > 0, 0.0, 1.0))
    try:
        with pytest.raises(PlanError, match="'tabled' asks for tables"):
            contender("tabled").tables(None)  # type: ignore[arg-type]
    finally:
        del RULES["tabled"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rules": ("magic",)}, ModesFxError, "Unknown rule 'magic'; known: random, reduce_k"),
        ({"targets": (1.5,)}, CalibrationError, r"targets in \[0, 1\]"),
        ({"rules": ()}, CalibrationError, "needs a rule"),
        ({"grid_size": 1}, CalibrationError, "grid_size >= 2"),
        ({"tolerance": math.nan}, CalibrationError, "tolerance >= 0"),
        ({"importance_mode": "guess"}, CalibrationError, "Unknown mode 'guess'"),
        ({"calibration": []}, CalibrationError, "There are no calibration data"),
        ({"test": []}, CalibrationError, "There are no test data"),
        ({"test": [without_labels(TEST[0])]}, CalibrationError, "test data cannot be used. Batch 0 needs `labels`"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compare(tiny.make(), **{"calibration": CALIBRATION, "test": TEST, **changes})


def test_rules_that_a_model_cannot_run_are_left_out_unless_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make()
    model.set_attn_implementation("eager")  # all that GPT-OSS has
    with pytest.raises(CalibrationError, match=r"mc_moe: .*runs as \['eager'\].*naee"):
        compare(model, CALIBRATION, TEST, rules=("reduce_k", "mc_moe"))
    with caplog.at_level("WARNING"), pytest.raises(CalibrationError, match="no test data"):
        compare(model, CALIBRATION, [])
    assert "left out: mc_moe. A rule that protects" in caplog.text


@pytest.mark.usefixtures("without_inductor")
def test_an_optimised_model_is_refused(vlm: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="optimised already"):
        compare(modes_fx.optimize(vlm), CALIBRATION, TEST)


@pytest.mark.usefixtures("without_inductor")
def test_reduce_k_knows_k_of_blocks_whose_router_is_not_traced(vlm: nn.Module) -> None:
    for layer in find_moe_layers(vlm):
        add_hook_to_module(layer.block, ModelHook())
    assert {site.top_k for site in modes_fx.report(modes_fx.optimize(vlm)).sites} == {0}
    modes_fx.restore(vlm)
    (row,) = compare(vlm, CALIBRATION, TEST, (0.6,), ("reduce_k",)).rows
    assert row.point["tau_text"] == 1.0
    assert row.skipped["all"] == pytest.approx(2 / 3)


@pytest.mark.usefixtures("without_inductor")
def test_only_targets_out_of_reach_become_rows_of_that_kind(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(rules: tuple[str, ...]) -> Comparison:
        return compare(vlm, CALIBRATION, TEST, (0.9,), rules, grid_size=2)

    low = [0.0, 0.01]
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "score_grid", lambda *of: low)
        (row,) = searched(("dmt",)).rows
        assert (row.status, row.metrics) == ("unreachable", {})
        assert 0.0 <= row.largest < 0.5
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "score_grid", lambda *of: [0.2, 0.1])
        with pytest.raises(CalibrationError, match="ascend"):
            searched(("dmt",))
