"""Batches of few shapes measure what they did before, and nothing that a device computes is read between forwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from modes_fx.calib import Objective, layer_importance
from modes_fx.calib.objective import Answers, at_answers, divergence_of_rows
from modes_fx.calib.shapes import in_few_shapes
from tests.calib.conftest import Batch, with_answers


def of_length(length: int, seed: int = 0, **more: Any) -> Batch:
    ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return {"input_ids": ids, "labels": labels, **more}


@pytest.fixture
def of_many_lengths() -> list[Batch]:
    return [with_answers(3), *(of_length(length, length) for length in (10, 9, 8, 6, 5))]


def shapes(batches: list[Any]) -> set[torch.Size]:
    return {batch["labels"].shape for batch in batches}


def test_lengths_grow_by_a_quarter_at_most() -> None:
    found = in_few_shapes([of_length(length) for length in (100, 50, 81, 60, 10, 100, 12)])
    assert [batch["labels"].shape[1] for batch in found] == [100, 60, 100, 60, 12, 100, 12]


def test_padding_is_behind_masked_and_no_answer() -> None:
    short = of_length(8, mm_token_type_ids=torch.ones(2, 8, dtype=torch.int64), pixel_values=torch.rand(8, 3))
    _, padded = in_few_shapes([of_length(10), short])
    assert padded["attention_mask"].tolist() == [[1] * 8 + [0] * 2] * 2
    assert padded["labels"][:, 8:].eq(-100).all()
    assert padded["mm_token_type_ids"][:, 8:].eq(0).all()
    assert padded["pixel_values"] is short["pixel_values"]
    for name in ("input_ids", "labels"):
        assert padded[name][:, :8].equal(short[name])


@pytest.mark.parametrize(
    "more", [{"position_ids": torch.arange(8).expand(2, 8)}, {"attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)}]
)
def test_batches_with_positions_or_other_masks_stay(more: dict[str, Tensor]) -> None:
    batch = of_length(8, **more)
    assert in_few_shapes([of_length(10), batch])[1] is batch


def test_what_is_measured_stays(model: nn.Module, of_many_lengths: list[Batch]) -> None:
    few = in_few_shapes(of_many_lengths)
    assert len(shapes(few)) < len(shapes(of_many_lengths))
    one, other = (Objective(model, batches) for batches in (of_many_lengths, few))
    assert (one.answer_tokens, one.accuracy) == (other.answer_tokens, other.accuracy)
    bounds = torch.full((2, 2), 0.3)
    wanted, actual = one.evaluate(bounds), other.evaluate(bounds)
    assert 0 < actual.kl == pytest.approx(wanted.kl, rel=1e-4)
    ratios = actual.skip_ratio, actual.skip_ratio_text, actual.skip_ratio_vision
    assert ratios == (wanted.skip_ratio, wanted.skip_ratio_text, wanted.skip_ratio_vision)


def test_importance_off_the_cpu_is_the_cpus(
    model: nn.Module, of_many_lengths: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = layer_importance(model, of_many_lengths)
    seen: set[torch.Size] = set()
    own = Answers.__call__

    def call(self: Answers, batch: Batch, *, grad: bool = False) -> Any:
        seen.add(batch["labels"].shape)
        return own(self, batch, grad=grad)

    monkeypatch.setattr(Answers, "ready", lambda self, batches: in_few_shapes(list(batches)))  # as elsewhere than on a CPU
    monkeypatch.setattr(Answers, "__call__", call)
    actual = layer_importance(model, of_many_lengths)
    assert seen == shapes(in_few_shapes(of_many_lengths))
    assert torch.tensor(actual.kl).allclose(torch.tensor(wanted.kl), rtol=1e-3, atol=1e-7)
    assert actual.answer_tokens == wanted.answer_tokens


def test_nothing_is_read_between_forwards() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    logits, reference = mode.from_tensor(torch.randn(2, 3, 8)), mode.from_tensor(torch.randn(3, 8))
    with pytest.raises(DataDependentOutputException):
        float(logits.sum())  # what reads is refused
    labels = torch.tensor([[-100, 3, 4], [-100, -100, 5]])
    found, right = at_answers(logits, labels)
    loss = divergence_of_rows(reference, found).sum(dtype=torch.float64)
    assert isinstance(loss, FakeTensor)
    assert (found.shape, right.shape, loss.shape) == ((3, 8), (2,), ())


def test_answers_are_found_in_the_logits() -> None:
    labels = torch.tensor([[-100, 3, 4], [-100, -100, 5]])
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), 8).float()
    logits[1, 2] = logits[1, 2].roll(1)
    found, right = at_answers(logits, labels)
    assert found.argmax(1).tolist() == [3, 4, 6]
    assert right.tolist() == [True, False]
