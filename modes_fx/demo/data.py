"""Samples of the demo task, and their batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from modes_fx import data
from modes_fx.demo.canvas import SPLITS, Canvas, draw
from modes_fx.demo.questions import KINDS, ask

IGNORED = -100  # the label that cross-entropy skips, torch's own default


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        image: RGB, 64x64; the questions of one canvas share the object.
        question: what the user asks.
        answer: one to nine words separated by spaces.
        kind: which of the kinds of question it is.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str


def make_samples(split: str, n_images: int, seed: int = 0, questions_per_image: int = 8) -> list[Sample]:
    """Draw canvases of one split and ask about them; equal arguments give equal samples.

    Args:
        split: "train", "calibration", "validation" or "test"; no source image belongs to two of them.
        n_images: canvases to draw.
        seed: another seed gives other canvases.
        questions_per_image: asked of each canvas; no kind twice until all kinds have had their turn.

    Returns:
        `n_images * questions_per_image` samples, canvas by canvas.

    Raises:
        ValueError: if there is no such split.
    """
    return [sample for index in range(n_images) for sample in draw_samples(split, index, seed, questions_per_image)]


def draw_samples(split: str, index: int, seed: int, questions: int) -> list[Sample]:
    """Draw the canvas of one index and ask about it; see `make_samples`."""
    if split not in SPLITS:
        raise ValueError(f"No split {split!r} in the demo's data; pass one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return _ask_several(draw(split, rng), questions, rng)


def as_data(samples: Sequence[Sample]) -> list[data.Sample]:
    """Return samples as those that are read from files."""
    return [data.Sample(f"{index}", each.question, each.answer, (each.image,)) for index, each in enumerate(samples)]


def _ask_several(canvas: Canvas, n_questions: int, rng: np.random.Generator) -> list[Sample]:
    samples: list[Sample] = []
    while len(samples) < n_questions:
        for kind in rng.permutation(KINDS):
            pair = ask(canvas, str(kind), rng)
            if pair is not None and len(samples) < n_questions:
                samples.append(Sample(canvas.image, *pair, kind=str(kind)))
    return samples


def conversation(sample: Sample, answer: bool = True) -> list[dict[str, Any]]:
    """A sample as messages of a chat: the image, the question and, unless left out, the answer."""
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    return messages


def collate(
    samples: Sequence[Sample], processor: ProcessorMixin, *, padding_side: str = "left", answers: bool = True
) -> dict[str, Tensor]:
    """Batch samples into the model's forward inputs, through the processor's chat template.

    Args:
        samples: B samples.
        processor: the demo's, or any that takes text and images and has a chat template.
        padding_side: "left", as generation wants, or "right".
        answers: with the answers and their labels; without them the prompts end where an answer would begin.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids` int64 [B, S] (type 1 marks visual tokens), `pixel_values`
        float32 [P, C], `image_grid_thw` int64 [B, 3] and, with answers, `labels` int64 [B, S]: -100 everywhere but on
        the answer and the token that ends it.

    Raises:
        ValueError: if there are no samples, or padding_side is neither side.
    """
    if not samples:
        raise ValueError("No samples to collate; pass at least one.")
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}.')
    prompts = processor.apply_chat_template(
        [conversation(sample, answer=False) for sample in samples], tokenize=False, add_generation_prompt=True
    )
    texts = processor.apply_chat_template([conversation(sample) for sample in samples], tokenize=False)
    batch = processor(
        text=texts if answers else prompts,
        images=[[sample.image] for sample in samples],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )
    inputs = dict(batch)
    if answers:
        suffixes = [text.removeprefix(prompt).rstrip() for text, prompt in zip(texts, prompts, strict=True)]
        answer_ids = processor.tokenizer(suffixes, add_special_tokens=False)["input_ids"]
        inputs["labels"] = _label(inputs["input_ids"], inputs["attention_mask"], [len(ids) for ids in answer_ids])
    return inputs


def make_batches(
    split: str, n_images: int, processor: ProcessorMixin, batch_size: int = 32, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Make samples of one split, 8 questions an image, and collate them: what calibration and search take.

    Args:
        split: see `make_samples`.
        n_images: canvases to draw.
        processor: see `collate`.
        batch_size: samples in each batch but the last.
        seed: another seed gives other canvases.
    """
    samples = make_samples(split, n_images, seed)
    return [collate(samples[start : start + batch_size], processor) for start in range(0, len(samples), batch_size)]


def _label(input_ids_BS: Tensor, attention_mask_BS: Tensor, lengths: list[int]) -> Tensor:
    """Labels on the last `lengths[b]` tokens of each row that are not padding."""
    length_B1 = torch.tensor(lengths).unsqueeze(1)
    to_the_right_BS = attention_mask_BS.flip(1).cumsum(1).flip(1)  # tokens from here to the end, padding not counted
    is_answer_BS = (attention_mask_BS == 1) & (to_the_right_BS <= length_B1)
    return input_ids_BS.masked_fill(~is_answer_BS, IGNORED)
