"""Batches: labels on exactly the answer in every family's template, padding, shards, and images opened late."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaProcessor

import modes_fx
from modes_fx import demo
from modes_fx.calib import Objective
from modes_fx.calib.search import data_hash
from modes_fx.data import Sample, make_batches
from modes_fx.data.chat import tokenizer_of
from modes_fx.errors import CalibrationError
from tests.data import families
from tests.data.families import FAMILIES, Family
from tests.data.layouts import picture, png

IGNORED = -100
ANSWERS = ("A cat.", "no, it is not: 5 € - naïve", "D", "user assistant model\nsystem", "end")  # also words of the templates


def samples_for(family: Family) -> list[Sample]:
    pictures = [(picture(0),), (picture(1), picture(2)), (), (picture(3),), ()]
    questions = ("What is in the picture?", "Is it?", "Text alone, A or D?", "  A cat.  ", "Is it the end?")
    rows = zip(questions, ANSWERS, pictures, strict=True)
    return [Sample(str(i), q, a, images if family.images else ()) for i, (q, a, images) in enumerate(rows)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    chosen = FAMILIES[request.param]
    return chosen, chosen.make()


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answer_and_the_end_of_its_turn(family: tuple[Family, Any], side: str) -> None:
    style, processor = family
    samples = samples_for(style)
    batches = list(make_batches(samples, processor, 3, padding_side=side))
    in_order = [s for s in samples if s.images] + [s for s in samples if not s.images]
    rows = [(batch, row) for batch in batches for row in range(len(batch["labels"]))]
    assert len(rows) == len(samples)
    tokenizer = tokenizer_of(processor)
    for sample, (batch, row) in zip(in_order, rows, strict=True):
        labels, ids, mask = batch["labels"][row], batch["input_ids"][row], batch["attention_mask"][row]
        places = (labels != IGNORED).nonzero().flatten()
        assert torch.equal(labels[places], ids[places])
        assert bool(mask[places].all())
        assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
        assert tokenizer.decode(labels[places]).strip() == sample.answer + style.end
        before = tokenizer.decode(ids[: places[0]])
        assert before.rstrip().endswith(style.before.rstrip())
        assert sample.question.strip() in before
        if tokenizer.bos_token_id is not None:
            assert int((ids[mask == 1] == tokenizer.bos_token_id).sum()) <= 1
            assert int(ids[mask == 1][0] == tokenizer.bos_token_id) == int((ids == tokenizer.bos_token_id).sum())
    ragged = [bool((batch["attention_mask"][:, 0 if side == "left" else -1] == 0).any()) for batch in batches]
    assert ragged[0]


def test_images_take_their_tokens(family: tuple[Family, Any]) -> None:
    style, processor = family
    batches = list(make_batches(samples_for(style), processor, 8))
    assert ["pixel_values" in batch for batch in batches] == ([True, False] if style.images else [False])
    assert len(batches[0]["labels"]) == (3 if style.images else 5)


@pytest.fixture(scope="module")
def demo_model() -> tuple[Any, Any]:
    return demo.load(torch.float32)


def demo_samples(count: int = 2) -> tuple[list[demo.Sample], list[Sample]]:
    drawn = demo.make_samples("calibration", count)
    return drawn, [Sample(str(i), s.question, s.answer, (s.image,)) for i, s in enumerate(drawn)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_demos_batches_are_the_demos(demo_model: tuple[Any, Any], side: str) -> None:
    drawn, samples = demo_samples()
    wanted = demo.collate(drawn, demo_model[1], padding_side=side)
    (found,) = make_batches(samples, demo_model[1], len(samples), padding_side=side)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.usefixtures("without_inductor")
def test_batches_calibrate_the_demo_model(demo_model: tuple[Any, Any]) -> None:
    model, processor = demo_model
    _, samples = demo_samples(1)
    batches = make_batches(samples, processor, 4)
    modes_fx.optimize(model)
    try:
        objective = Objective(model, batches)
        assert objective.answer_tokens == sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        assert objective.accuracy > 0.5
        bounds = torch.full((objective.num_layers, 2), 0.2)
        evaluation = objective.evaluate(bounds)
        assert 0 < evaluation.skip_ratio < 1
        assert evaluation.kl > 0
    finally:
        modes_fx.restore(model)


def test_samples_are_batched_in_order_and_iterated_alike_each_time(demo_model: tuple[Any, Any]) -> None:
    _, samples = demo_samples()
    batches = make_batches(samples, demo_model[1], 5)
    first, again = list(batches), list(batches)
    assert [len(batch["labels"]) for batch in first] == [5, 5, 5, 1]
    assert len(batches) == 4
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert data_hash(batches) == data_hash(make_batches(samples, demo_model[1], 5))
    assert data_hash(batches) != data_hash(make_batches(samples[1:], demo_model[1], 5))


def test_answers_of_like_length_share_a_batch(demo_model: tuple[Any, Any]) -> None:
    _, samples = demo_samples()

    def lengths(by_answer: bool) -> list[int]:
        batches = make_batches(samples, demo_model[1], 5, by_answer=by_answer)
        return [length for batch in batches for length in (batch["labels"] != IGNORED).sum(1).tolist()]

    assert lengths(True) == sorted(lengths(False)) != lengths(False)


def test_shards_are_the_batches_of_one_process_dealt_out(demo_model: tuple[Any, Any]) -> None:
    _, samples = demo_samples(1)
    samples = [replace(sample, images=()) if index % 3 == 0 else sample for index, sample in enumerate(samples)]
    whole = list(make_batches(samples, demo_model[1], 2))
    shards = [list(make_batches(samples, demo_model[1], 2, shard=(rank, 3))) for rank in range(3)]
    for rank, shard in enumerate(shards):
        assert len(shard) == len(whole[rank::3])
        for batch, alone in zip(shard, whole[rank::3], strict=True):
            assert batch.keys() == alone.keys()
            assert all(torch.equal(batch[key], alone[key]) for key in batch)
    assert len(make_batches(samples[:1], demo_model[1], 2, shard=(1, 2))) == 0


def text(tokenizer: Any, labels: Tensor) -> str:
    return str(tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True))


def test_images_are_opened_a_batch_at_a_time() -> None:
    opened: list[int] = []

    def opener(number: int) -> Callable[[], bytes]:
        def read() -> bytes:
            opened.append(number)
            return png(number)

        return read

    samples = [Sample(str(number), "What?", "A cat.", (opener(number),)) for number in range(6)]
    batches = make_batches(samples, FAMILIES["llava"].make(), 2)
    assert opened == []
    iterator = iter(batches)
    next(iterator)
    assert opened == [0, 1]
    next(iterator)
    assert opened == [0, 1, 2, 3]
    list(batches)
    assert opened == [0, 1, 2, 3, *range(6)]


def test_floating_arguments_take_the_dtype_asked_for() -> None:
    sample = Sample("0", "What?", "A cat.", (picture(0),))
    (batch,) = make_batches([sample], FAMILIES["llava"].make(), dtype=torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_template_variables_reach_the_template() -> None:
    tokenizer = FAMILIES["kimi"].make()
    tokenizer.chat_template = "{{ 'deep: ' if thinking else 'fast: ' }}" + tokenizer.chat_template
    sample = Sample("0", "What?", "A cat.")
    (batch,) = make_batches([sample], tokenizer, template_kwargs={"thinking": True})
    assert tokenizer.decode(batch["input_ids"][0]).startswith("deep: ")


def test_todays_date_stays_out_of_the_prompt() -> None:
    tokenizer = FAMILIES["gpt-oss"].make()
    (batch,) = make_batches([Sample("0", "What?", "A cat.")], tokenizer)
    assert "It is 2025-01-01." in tokenizer.decode(batch["input_ids"][0])


def test_a_tokenizer_without_padding_pads_behind_the_mask_and_stays_as_it_was() -> None:
    tokenizer = FAMILIES["deepseek"].make()
    assert tokenizer.pad_token is None
    samples = [Sample("0", "What?", "A cat."), Sample("1", "What is in the picture?", "D")]
    (batch,) = make_batches(samples, tokenizer)
    assert tokenizer.pad_token is None
    hidden = batch["attention_mask"] == 0
    assert bool(hidden.any())
    assert set(batch["input_ids"][hidden].tolist()) == {tokenizer.eos_token_id}
    assert bool((batch["labels"][hidden] == IGNORED).all())


def broken(template: str) -> Any:
    tokenizer = FAMILIES["kimi"].make()
    tokenizer.chat_template = template
    return tokenizer


LOUD = "{% for m in messages %}{{ m.content | upper if m.role == 'assistant' else m.content }}{% endfor %}"
CUTTING = "{% for m in messages %}{{ m.role + ': ' + m.content.split('</think>')[-1] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "sample", "match"),
    [
        (
            None,
            Sample("7", "What?", "cat"),
            r"chat template of TokenizersBackend cannot write sample 7: .* as strings: ValueError",
        ),
        ("{{ messages[0].content }}", Sample("7", "What?", "cat"), "writes the answer 0 times"),
        ("{{ messages[-1].content }}", Sample("7", "What?", "cat"), "leaves the question out"),
        (LOUD, Sample("7", "What?", "cat"), "writes the answer 0 times"),
        (CUTTING, Sample("7", "What?", "so</think>cat"), "changes the answer of sample 7: expected 'so</think>cat'"),
        ("{{ raise_exception('no assistants') }}", Sample("7", "What?", "cat"), "no assistants"),
        (families.KIMI, Sample("7", "What?", "cat", (picture(0),)), "Sample 7 has images, but TokenizersBackend .*takes none"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str | None, sample: Sample, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        make_batches([sample], broken(template))


def test_a_template_that_leaves_images_out_is_given_strings_or_refused() -> None:
    sample = Sample("7", "What?", "cat", (picture(0),))
    processor = FAMILIES["llava"].make()
    processor.chat_template = families.KIMI.replace("{{ part.text }}", "{{ part.text or '' }}")
    (batch,) = make_batches([sample], processor)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4
    processor.image_token = None
    processor.tokenizer.image_token = None
    with pytest.raises(CalibrationError, match="leaves the images out"):
        make_batches([sample], processor)


def test_an_answer_that_the_tokenizer_cannot_write_is_refused(demo_model: tuple[Any, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"sample 7 decode to '<\|unknown\|>' instead of 'zebra'"):
        make_batches([Sample("7", "which digit ?", "zebra", (picture(0),))], demo_model[1])


def test_a_sample_that_the_processor_refuses_is_named() -> None:
    sample = Sample("7", "What is this <image>?", "A cat.", (picture(0),))
    with pytest.raises(CalibrationError, match="LlavaProcessor cannot process the samples 7"):
        list(make_batches([sample], FAMILIES["llava"].make()))


def test_a_processor_that_takes_images_in_one_list_gets_them_so() -> None:
    class Flat(LlavaProcessor):
        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            if images and isinstance(images[0], list):
                raise ValueError("Invalid image type.")
            return super().__call__(images=images, text=text, **kwargs)

    processor = FAMILIES["llava"].make()
    samples = samples_for(FAMILIES["llava"])[:2]
    (wanted,) = make_batches(samples, processor)
    processor.__class__ = Flat
    (found,) = make_batches(samples, processor)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_truncation_is_noticed() -> None:
    processor = FAMILIES["llama-3"].make()
    long = Sample("7", "What? " * 50, "A cat.")
    batches = make_batches([long], processor)
    processor.model_max_length = 20
    original = type(processor).__call__

    class Truncating(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs, truncation=True)

    processor.__class__ = Truncating
    with pytest.raises(CalibrationError, match=r"sample 7 other last tokens .* Check that it does not truncate"):
        list(batches)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"shard": (2, 2)}, {"shard": (-1, 2)}, {"padding_side": "middle"}])
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"Needed: batch_size|padding_side must be"):
        make_batches([Sample("0", "What?", "A cat.")], FAMILIES["kimi"].make(), **options)
