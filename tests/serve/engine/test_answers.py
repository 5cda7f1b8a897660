"""What a vLLM with the plug-in answers: what transformers answers with the same plan, and what stock answers with none."""

from itertools import chain
from typing import Any

import pytest

import modes_fx
from tests.serve.engine.conftest import (
    HALF,
    MOST,
    NONE,
    Answer,
    Asked,
    Reference,
    answer,
    batches_of,
    demo_plan,
    pairs,
    ratios,
    set_target,
)

TIE = 0.13
"""Two steps of bfloat16 between 8 and 16, where the largest logits lie: of two as close, rounding decides which is larger."""


def parting(found: Answer, wanted: list[int]) -> float:
    """Return by how much vLLM preferred the token at which two answers part; 0 where they do not."""
    for lead, token, other in zip(found.leads, found.ids, wanted, strict=False):
        if token != other:
            return lead
    return 0.0 if len(found.ids) == len(wanted) else float("inf")


def check_same(found: list[Answer], wanted: list[list[int]]) -> None:
    """All answers are the same, but for ties, which are few."""
    others = {i: parting(*both) for i, both in enumerate(zip(found, wanted, strict=True)) if both[0].ids != both[1]}
    assert {i: lead for i, lead in others.items() if lead > TIE} == {}
    assert len(others) <= 0.05 * len(found)


@pytest.mark.parametrize(("target", "decode"), [(MOST, HALF), (HALF, NONE)])
def test_the_same_answers_and_ratios_as_in_transformers(
    served: Any, reference: Reference, questions: list[Asked], target: float, decode: float
) -> None:
    set_target(served, target, decode)
    modes_fx.set_plan(reference.model, demo_plan(), target, decode_target=decode)
    before = pairs(served)
    found = answer(served, questions)
    with modes_fx.stats(reference.model).reset() as stats:
        wanted = reference.answer(questions)
    check_same(found, wanted)
    seen = ratios(before, pairs(served))
    assert set(seen) == {"text prefill", "text decode", "vision prefill"}
    for name, ratio in seen.items():
        modality, phase = name.split()
        assert ratio == pytest.approx(stats.skip_ratio(modality=modality, phase=phase), abs=0.01), name


def test_prompts_came_in_chunks_and_beside_requests_that_decode(served: Any, questions: list[Asked]) -> None:
    with batches_of(served) as batches:
        answer(served, questions[:16])
    assert any({1, 2} <= set(classes) for classes in batches)  # visual tokens of prompts, and generated ones
    visual = [classes.count(1) for classes in batches]
    assert sum(visual) == 16 * 64
    assert any(count % 64 for count in visual)  # an image over two batches


def test_thresholds_of_0_are_stock_bit_by_bit(served: Any, stock: Any, questions: list[Asked]) -> None:
    set_target(served, NONE, NONE)
    before = pairs(served)
    found, wanted = answer(served, questions), answer(stock, questions)
    assert [each.ids for each in found] == [each.ids for each in wanted]
    assert [each.logprobs for each in found] == [each.logprobs for each in wanted]
    assert set(ratios(before, pairs(served)).values()) == {0.0}


def test_several_images_and_none(served: Any, reference: Reference, questions: list[Asked]) -> None:
    images = [questions[8 * index].images[0] for index in range(6)]
    mixed = [
        Asked("which digit is in A1 ?", (images[0], images[1])),
        Asked("how many digits are shown ?", ()),
        Asked("what is shown in row B ?", (images[2], images[3])),
        Asked("which colour is in C3 ?", (images[4],)),
        Asked("which digits are in row A ?", ()),
    ]
    set_target(served, MOST, HALF)
    modes_fx.set_plan(reference.model, demo_plan(), MOST, decode_target=HALF)
    with batches_of(served) as batches:
        found = answer(served, mixed)
    check_same(found, reference.answer(mixed))
    assert list(chain.from_iterable(batches)).count(1) == 5 * 64


def test_each_modality_and_phase_has_thresholds_of_its_own(served: Any, questions: list[Asked]) -> None:
    skipped = {}
    for target, decode in ((MOST, MOST), (MOST, NONE), (NONE, MOST)):
        set_target(served, target, decode)
        before = pairs(served)
        answer(served, questions[:8])
        skipped[target, decode] = ratios(before, pairs(served))
    assert skipped[MOST, NONE]["text decode"] == 0.0 < skipped[MOST, MOST]["text decode"]
    assert (
        skipped[NONE, MOST]["text decode"] > 0.0 == skipped[NONE, MOST]["text prefill"] == skipped[NONE, MOST]["vision prefill"]
    )
    assert skipped[MOST, NONE]["vision prefill"] == skipped[MOST, MOST]["vision prefill"] > 0.3
