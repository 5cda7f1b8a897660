"""One plan looked at closely: what it skips in each layer, and which tokens of a few samples keep how many experts."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from modes_fx.calib.objective import Answers, bounds_in_force
from modes_fx.data import Sample, make_batches
from modes_fx.data.batch import IGNORED, Batch, prompts_of
from modes_fx.data.chat import tokenizer_of
from modes_fx.modality import MODALITIES, token_ids_for
from modes_fx.optimize import optimized_state, report, set_plan, stats
from modes_fx.plan import SkipPlan
from modes_fx.report import PHASES

logger = logging.getLogger(__name__)

PICTURES = 8
_MOST_NEW = 64  # tokens of an answer
_WIDEST = 448  # pixels of a picture
Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Picture:
    """One sample, and how many experts its tokens keep: a share of K, the mean over the layers.

    Attributes:
        question: As asked.
        reference: The right answer.
        unskipped: What the model answers with all experts.
        skipped: What it answers under the plan.
        words: Tokens of the question in order, each with its share.
        image: The first image as a PNG or JPEG file; None without any.
        grid: The shares of that image's visual tokens, by row; () where they have no known place in it.
    """

    question: str
    reference: str
    unskipped: str
    skipped: str
    words: tuple[tuple[str, float], ...]
    image: bytes | None = None
    grid: Grid = ()


@dataclass(frozen=True)
class Closeup:
    """What a plan does to one model.

    Attributes:
        top_k: K of the layer with the most.
        by_layer: Skip ratios by modality and phase, as in ``"vision prefill"``, of each layer; None where nothing was routed.
            Prefill is over the test data, decoding over the pictures' answers.
        pictures: A few of the test samples.
    """

    top_k: int
    by_layer: Mapping[str, tuple[float | None, ...]]
    pictures: tuple[Picture, ...]


def look_closely(
    model: nn.Module,
    plan: SkipPlan,
    processor: Any,
    test: Iterable[Batch],
    samples: Sequence[Sample],
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> Closeup:
    """Run test data under a plan, and have a few samples answered with it and without.

    Args:
        model: Optimised with the plan's keep-rule; bounds in force before come back.
        plan: A plan; its largest target counts.
        processor: The model's.
        test: Batches with ``labels``.
        samples: To choose ``PICTURES`` from, evenly, of those with images if any has one.
        on_step: Called with (samples answered, samples to answer).

    Raises:
        CalibrationError: The processor cannot write a sample.
    """
    state = optimized_state(model)
    layers, counted = len(state.layers), stats(model)
    with bounds_in_force(state.runtime, None):
        set_plan(model, plan)
        answers = Answers(model)
        with counted.reset().counting():
            for batch in test:
                answers(batch)
        by_layer = {name: ratios for name, ratios in _by_layer(model, layers).items() if name.endswith("prefill")}
        counted.reset()
        chosen = choose(samples)
        logger.info("a closer look: the answers to %d samples, with all experts and under the plan", len(chosen))
        pictures = []
        for done, sample in enumerate(chosen, start=1):
            pictures.append(_picture(model, plan, processor, sample))
            if on_step is not None:
                on_step(done, len(chosen))
        by_layer |= {name: ratios for name, ratios in _by_layer(model, layers).items() if name.endswith("decode")}
    seen = {name: ratios for name, ratios in by_layer.items() if any(ratio is not None for ratio in ratios)}
    return Closeup(max(site.top_k for site in report(model).sites), seen, tuple(pictures))


def choose(samples: Sequence[Sample], number: int = PICTURES) -> list[Sample]:
    """Return evenly spaced samples: neighbours often share an image."""
    seeing = [sample for sample in samples if sample.images] or list(samples)
    return [seeing[index * len(seeing) // number] for index in range(number)] if len(seeing) > number else seeing


def grid_of(grid_thw_N3: Tensor | None, shares_V: Sequence[float]) -> Grid:
    """Lay the visual tokens of a sample's first image out as they stand in it.

    Args:
        grid_thw_N3: Patches of each image in time, height and width, as processors give ``image_grid_thw``; None: unknown.
        shares_V: One value for each visual token of all images, in order.

    Returns:
        Rows; () where patches and tokens do not fit.
    """
    if grid_thw_N3 is None or not shares_V:
        return ()
    merged = int(grid_thw_N3.prod(dim=1).sum()) / len(shares_V)  # patches that make one token: a square
    side = math.isqrt(int(merged))
    time, height, width = (int(value) for value in grid_thw_N3[0])
    if side * side != merged or height % side or width % side or time < 1:
        return ()
    rows, columns = height // side, width // side
    return tuple(tuple(shares_V[row * columns : (row + 1) * columns]) for row in range(rows))


def _by_layer(model: nn.Module, layers: int) -> dict[str, tuple[float | None, ...]]:
    found = {}
    for modality in MODALITIES:
        for phase in PHASES:
            ratios = (stats(model).skip_ratio(layer=layer, modality=modality, phase=phase) for layer in range(layers))
            found[f"{modality} {phase}"] = tuple(None if math.isnan(ratio) else ratio for ratio in ratios)
    return found


def _picture(model: Any, plan: SkipPlan, processor: Any, sample: Sample) -> Picture:
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    (batch,) = make_batches([sample], processor, 1, dtype=dtype)
    prompt = prompts_of(batch, torch.device("cpu") if (device := model.device).type == "meta" else device)
    ids = prompt["input_ids"][0].tolist()
    wanted = min(int((batch["labels"] != IGNORED).sum()) + 8, _MOST_NEW)
    tokenizer = tokenizer_of(processor)

    def answer() -> str:
        out = model.generate(**prompt, max_new_tokens=wanted, do_sample=False)
        return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()

    set_plan(model, None)
    unskipped = answer()
    set_plan(model, plan)
    with stats(model).by_token() as dispatches:
        skipped = answer()
    top_k = [site.top_k for site in report(model).sites]
    # A model whose modalities have experts of their own dispatches them apart: their tokens are not the prompt's.
    whole = [kept.double() / top_k[layer] for layer, kept in dispatches if len(kept) == len(ids)]
    shares = torch.stack(whole).mean(dim=0).tolist() if whole else []
    vision_ids, _ = token_ids_for(model)
    seen = [share for token, share in zip(ids, shares, strict=False) if token in vision_ids]
    images = sample.open_images()[:1]
    return Picture(
        sample.question,
        sample.answer,
        unskipped,
        skipped,
        _words(ids, shares, tokenizer, sample.question),
        _thumbnail(images[0]) if images else None,
        grid_of(prompt.get("image_grid_thw"), seen) if images else (),
    )


def _words(ids: Sequence[int], shares: Sequence[float], tokenizer: Any, question: str) -> tuple[tuple[str, float], ...]:
    """Return the tokens that spell the question, where it stands last; spaces aside, which single tokens may lose."""
    texts = [str(tokenizer.decode([token])) for token in ids]
    ends = list(accumulate(len(_plain(text)) for text in texts))
    first = "".join(map(_plain, texts)).rfind(_plain(question))
    if first < 0 or not shares:
        return ()
    last = first + len(_plain(question))
    spelled = ((text, share, end) for text, share, end in zip(texts, shares, ends, strict=True) if _plain(text))
    return tuple((text, share) for text, share, end in spelled if end > first and end - len(_plain(text)) < last)


def _plain(text: str) -> str:
    return "".join(text.split())


def _thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((_WIDEST, _WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if max(small.size) <= 128 else "JPEG", quality=82)
    return buffer.getvalue()
