"""The embedded data and checkpoint: what they promise, on the files that ship."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from modes_fx import demo
from modes_fx.demo.canvas import SPLITS, source_digits
from modes_fx.demo.data import IGNORED
from modes_fx.demo.questions import KINDS, WORDS

N_VISUAL = 64


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return demo.load()


@pytest.fixture(scope="module")
def processor(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def samples():
    return demo.make_samples("test", 6, seed=1, questions_per_image=len(KINDS))


def answer_of(tokenizer, labels_S):
    """The labelled tokens as text, without the one that ends an answer."""
    return tokenizer.decode(labels_S[labels_S != IGNORED], skip_special_tokens=True)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_splits_share_no_source_image(one, other):
    pixels = [{image.tobytes() for image in source_digits(split)[0]} for split in (one, other)]
    assert not pixels[0] & pixels[1]


def test_equal_arguments_give_equal_samples():
    first, again = (demo.make_samples("calibration", 4, seed=7) for _ in range(2))
    assert [(s.question, s.answer, s.kind) for s in first] == [(s.question, s.answer, s.kind) for s in again]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("split", "seed"), [("calibration", 8), ("test", 7)])
def test_seed_and_split_change_the_images(split, seed):
    base, other = demo.make_samples("calibration", 1, seed=7), demo.make_samples(split, 1, seed=seed)
    assert base[0].image.tobytes() != other[0].image.tobytes()


def test_a_longer_draw_begins_with_the_shorter_one():
    short, long = demo.make_samples("test", 2), demo.make_samples("test", 3)
    assert [s.question for s in long[: len(short)]] == [s.question for s in short]


def test_every_kind_is_asked_and_every_word_is_known(samples):
    assert {sample.kind for sample in samples} == set(KINDS)
    assert {word for s in samples for word in f"{s.question} {s.answer}".split()} <= set(WORDS)


def test_images_are_small_rgb(samples):
    assert {(sample.image.size, sample.image.mode) for sample in samples} == {((64, 64), "RGB")}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="pass one of train, calibration, validation, test"):
        demo.make_samples("dev", 1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_are_the_answers(samples, processor, padding_side):
    batch = demo.collate(samples, processor, padding_side=padding_side)
    labels_BS = batch["labels"]
    assert labels_BS.dtype == torch.int64
    assert labels_BS.shape == batch["input_ids"].shape
    assert [answer_of(processor.tokenizer, labels) for labels in labels_BS] == [s.answer for s in samples]
    assert all(labels[labels != IGNORED][-1] == processor.tokenizer.eos_token_id for labels in labels_BS)
    assert torch.equal(labels_BS[labels_BS != IGNORED], batch["input_ids"][labels_BS != IGNORED])
    assert processor.tokenizer.unk_token_id not in batch["input_ids"]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_on_the_side_asked_for(samples, processor, padding_side):
    mask_BS = demo.collate(samples, processor, padding_side=padding_side)["attention_mask"]
    assert (mask_BS == 0).any()
    full, ragged = (-1, 0) if padding_side == "left" else (0, -1)
    assert mask_BS[:, full].all()
    assert not mask_BS[:, ragged].all()


@pytest.mark.parametrize("answers", [True, False])
def test_visual_tokens_are_expanded_and_marked(samples, processor, answers):
    batch = demo.collate(samples, processor, answers=answers)
    is_visual_BS = batch["mm_token_type_ids"] == 1
    assert (is_visual_BS.sum(1) == N_VISUAL).all()
    assert torch.equal(is_visual_BS, batch["input_ids"] == processor.image_token_id)
    assert batch["image_grid_thw"].tolist() == [[1, 16, 16]] * len(samples)
    assert len(batch["pixel_values"]) == 256 * len(samples)


def test_prompts_stop_where_answers_begin(samples, processor):
    prompts, full = (demo.collate(samples, processor, padding_side="right", answers=a) for a in (False, True))
    assert "labels" not in prompts
    for prompt, prompt_mask, ids, labels in zip(
        prompts["input_ids"], prompts["attention_mask"], full["input_ids"], full["labels"], strict=True
    ):
        length = int(prompt_mask.sum())
        assert torch.equal(prompt[:length], ids[:length])
        assert int((labels != IGNORED).nonzero()[0]) == length


def test_padding_side_must_be_a_side(samples, processor):
    with pytest.raises(ValueError, match="got 'middle'"):
        demo.collate(samples, processor, padding_side="middle")


def test_the_checkpoint_lies_in_the_hubs_form(loaded):
    model, _ = loaded
    stored = load_file(demo.CHECKPOINT / "model.safetensors")
    config, processor = (json.loads((demo.CHECKPOINT / name).read_text()) for name in ("config.json", "processor_config.json"))
    experts = model.model.language_model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        turned = stored[f"model.language_model.layers.0.mlp.experts.{name}"].transpose(1, 2)
        assert torch.equal(turned, getattr(experts, name))
    assert config["text_config"]["norm_topk_prob"] is True
    assert processor["processor_class"] == "Qwen3VLProcessor"
    assert processor["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"


def test_checkpoint_is_small_and_of_the_real_class(loaded):
    model, _ = loaded
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert sum(file.stat().st_size for file in demo.CHECKPOINT.iterdir()) < 12e6


@torch.inference_mode()
def test_checkpoint_answers_the_test_split(loaded):
    model, processor = loaded
    batch = demo.collate(demo.make_samples("test", 8, seed=2), processor)
    labels_BS = batch.pop("labels")[:, 1:]
    predicted_BS = model(**batch).logits[:, :-1].argmax(-1)
    correct_B = ((predicted_BS == labels_BS) | (labels_BS == IGNORED)).all(1)
    assert len(correct_B) == 64
    assert correct_B.float().mean() >= 0.85


@torch.inference_mode()
def test_generation_is_greedy_and_ends_itself(loaded):
    model, processor = loaded
    samples = demo.make_samples("test", 1, seed=3)
    batch = demo.collate(samples, processor, answers=False)
    generated_BS = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    texts = processor.batch_decode(generated_BS, skip_special_tokens=True)
    assert sum(text == sample.answer for text, sample in zip(texts, samples, strict=True)) >= 6
