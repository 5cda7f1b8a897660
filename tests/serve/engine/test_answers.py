"""What a vLLM with the plug-in answers: what transformers answers with the same plan, and what stock answers with none."""

from typing import Any

import pytest

import modes_fx
from tests.serve.engine.conftest import (
    HALF,
    MOST,
    NONE,
    Asked,
    Reference,
    answer,
    batches_of,
    demo_plan,
    pairs,
    ratios,
)

TIE = 0.06
"""Logits are bfloat16: of two that lie closer than this, rounding decides which is larger."""


@pytest.mark.parametrize(("target", "decode"), [(MOST, HALF), (HALF, MOST), (HALF, NONE)])
def test_the_same_answers_and_ratios_as_in_transformers(
    served: Any, reference: Reference, questions: list[Asked], target: float, decode: float
) -> None:
    served.collective_rpc("modes_fx_set_target", args=(target, decode))
    modes_fx.set_plan(reference.model, demo_plan(), target, decode_target=decode)
    before = pairs(served)
    found = answer(served, questions)
    with modes_fx.stats(reference.model).reset() as stats:
        wanted = reference.answer(questions)
    other = [index for index, each in enumerate(found) if each.ids != wanted[index]]
    assert [index for index in other if found[index].closest > TIE] == []
    assert len(other) <= 0.05 * len(questions)
    for name, ratio in ratios(before, pairs(served)).items():
        modality, phase = name.split()
        assert ratio == pytest.approx(stats.skip_ratio(modality=modality, phase=phase), abs=0.01), name
