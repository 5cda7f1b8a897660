"""Decode steps compared by the experts that they read: what is measured is what an eager model says, token by token."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.errors import CalibrationError
from modes_fx.measure.compare import CONTENDERS, compare
from modes_fx.measure.compare.contenders import taking_part
from modes_fx.measure.compare.decoding import DecodeObjective
from tests import oracle, tiny
from tests.calib.conftest import with_answers, without_labels

pytestmark = pytest.mark.usefixtures("without_inductor")
CALIBRATION, TEST = [with_answers(1)], [with_answers(4)]


def decoded_by_hand(batch: dict[str, Tensor], bounds: Tensor | None) -> tuple[list[Tensor], int]:
    """Log-probabilities of the answer tokens and the experts that decode steps read, of an eager model in float64."""
    model, read = tiny.make().double(), 0
    model.set_experts_implementation("eager")
    first = int((batch["labels"] != -100).any(0).nonzero()[0])
    prefilling = True

    def hook(layer: int) -> Any:
        def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal read
            hidden, ids, weights = args
            if prefilling:
                return args
            keep = weights >= (0.0 if bounds is None else bounds[layer, 0])
            read += len(ids[keep].unique())
            return hidden, ids, weights * keep

        return silence

    for layer, experts in enumerate(oracle.experts_of(model)):
        experts.register_forward_pre_hook(hook(layer))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in without_labels(batch).items()}
    prompt = {name: value[:, :first] if value.shape == inputs["input_ids"].shape else value for name, value in inputs.items()}
    with torch.no_grad():
        said = model(**prompt, use_cache=True)
        columns, prefilling = [said.logits[:, -1]], False
        for end in range(first + 1, inputs["input_ids"].shape[1]):
            mask, ids = inputs["attention_mask"][:, :end], inputs["input_ids"][:, end - 1 : end]
            places = (mask.sum(1, keepdim=True) - 1 + model.model.rope_deltas).expand(3, -1, -1)
            said = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=said.past_key_values)
            columns.append(said.logits[:, -1])
    answers = (batch["labels"] != -100).nonzero().tolist()
    return [columns[column - first][row].log_softmax(-1) for row, column in answers], read


def test_it_measures_what_an_eager_model_does_step_by_step(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm)
    objective, bounds = DecodeObjective(vlm, TEST), torch.full((2, 2), 0.4)
    stock, read = decoded_by_hand(TEST[0], None)
    skipped, fewer = decoded_by_hand(TEST[0], bounds)
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(stock, skipped, strict=True)) / len(stock)
    found = objective.evaluate(bounds)
    assert objective.experts_read == read
    assert found.skip_ratio == pytest.approx(1 - fewer / read)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert kl > 0
    nothing = objective.scores(None)
    assert nothing.skip_ratio == {"all": 0.0, "decode": 0.0}
    assert int(nothing.kl_S.count_nonzero()) == 0
    assert objective.scores(torch.full((2, 2), math.inf)).skip_ratio == {"all": 1.0, "decode": 1.0}


@pytest.mark.wide
def test_rules_are_compared_at_equal_numbers_of_experts_read(vlm: nn.Module) -> None:
    rules = ("oea", "sere", "batch_threshold", "batch_tempered", "reduce_k")
    found = compare(vlm, CALIBRATION, TEST, (0.2, 0.9), rules, phase="decode", tolerance=0.05)
    assert found.phase == "decode"
    rows = {(row.rule, row.target): row for row in found.rows}
    assert list(rows) == [(rule, target) for rule in rules for target in (0.2, 0.9)]
    for (rule, target), row in rows.items():
        if row.status == "unreachable":
            assert (rule, target) == ("sere", 0.9)  # it reads each token's first at least
            assert row.largest < 0.9
            continue
        assert row.skipped["calibration"] >= target
        assert set(row.skipped) == {"calibration", "all", "decode"}
    assert rows["sere", 0.2].skipped["decode"] == 0.0  # no pair is dropped
    assert rows["batch_tempered", 0.2].point["gamma"] in CONTENDERS["batch_tempered"].gammas


def test_contenders_of_one_rule_have_tables_of_their_own(vlm: nn.Module) -> None:
    found = compare(vlm, CALIBRATION, TEST, (0.05,), ("sere", "sere_2", "sere_3"), phase="decode", tolerance=0.05)
    one, two, three = found.rows
    assert one.largest > two.largest > three.largest == 0.0  # with all 3 of a token's experts primary, none moves


def test_each_phase_has_its_rules() -> None:
    prefill, decode = set(taking_part("prefill")), set(taking_part("decode"))
    assert prefill | decode == set(CONTENDERS)
    assert decode - prefill == {"oea", "sere", "sere_2", "sere_3", "batch_threshold", "batch_tempered"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rules": ("oea",), "phase": "prefill"}, "oea: nothing to compare in prefill. Rules that can be: random, reduce_k"),
        ({"rules": ("mc_moe",)}, "mc_moe: nothing to compare in decode"),
        ({"phase": "both"}, "Unknown phase 'both'; known: prefill, decode"),
        ({"timed": True}, "compare decode steps without"),
        ({"test": [with_answers(2, side="right")]}, "Batch 0 is padded on the right"),
    ],
)
def test_what_makes_no_sense_is_refused(vlm: nn.Module, changes: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"calibration": CALIBRATION, "test": TEST, "rules": ("threshold",), "phase": "decode", **changes}
    with pytest.raises(CalibrationError, match=match):
        compare(vlm, targets=(0.5,), **given)


def test_answers_that_nothing_decodes_are_refused(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm)
    batch = TEST[0]
    short = {**batch, "labels": torch.where(torch.arange(batch["labels"].shape[1]) == batch["labels"].shape[1] - 1, 5, -100)}
    short["labels"] = short["labels"].expand_as(batch["labels"])
    with pytest.raises(CalibrationError, match="answers of one token"):
        DecodeObjective(vlm, [short])
    beside, alone = DecodeObjective(vlm, [short, batch]), DecodeObjective(vlm, [batch])
    assert beside.experts_read == alone.experts_read > 0
    pictured = {**batch, "labels": batch["input_ids"].clone()}
    with pytest.raises(CalibrationError, match="pictures behind the beginning of its longest answer"):
        DecodeObjective(vlm, [pictured])
