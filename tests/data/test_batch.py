"""Prompts: what of a batch is given to ``generate``."""

import pytest
import torch

from modes_fx.data.batch import before_answers, prompts_of
from modes_fx.errors import CalibrationError
from tests.calib.conftest import with_answers

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_prompt_is_whole_and_ends_where_its_own_answer_begins(side: str) -> None:
    """The rows' answers have one, two and three tokens."""
    batch = with_answers(0, side=side)
    batch["positions"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    prompts = prompts_of(batch, CPU)
    assert "labels" not in prompts
    assert prompts["pixel_values"].equal(batch["pixel_values"])
    for row, (labels, mask) in enumerate(zip(batch["labels"], batch["attention_mask"], strict=True)):
        of_prompt = mask.bool() & (labels == -100)
        kept = prompts["attention_mask"][row].bool()
        assert kept.sum() == of_prompt.sum()
        assert kept[-int(of_prompt.sum()) :].all()  # padded on the left
        for name in ("input_ids", "positions"):
            assert prompts[name][row][kept].equal(batch[name][row][of_prompt])
    assert prompts["attention_mask"][:, 0].any()  # no column of padding alone


def test_a_batch_without_a_mask_gets_one() -> None:
    batch = with_answers(0)
    lengths = batch["attention_mask"].sum(dim=1)
    assert not (lengths == lengths[0]).all()
    del batch["attention_mask"]
    mask = prompts_of(batch, CPU)["attention_mask"]
    answers = torch.tensor([1, 2, 3])
    assert mask.sum(dim=1).equal(batch["labels"].shape[1] - answers)


def test_a_batch_of_answers_alone_is_refused() -> None:
    batch = with_answers(0)
    with pytest.raises(CalibrationError, match="holds no prompt"):
        prompts_of({**batch, "labels": batch["input_ids"]}, CPU)


def test_what_is_decoded_is_cut_where_the_first_answer_begins() -> None:
    batch = with_answers(0)
    prompts = before_answers(batch, CPU)
    assert "labels" not in prompts
    assert prompts["input_ids"].equal(batch["input_ids"][:, :-3])
    assert prompts["pixel_values"].equal(batch["pixel_values"])
