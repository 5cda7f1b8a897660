"""Batches of a model's forward arguments, with the answer's tokens as labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from modes_fx.data.answers import Answer, adds_special_tokens, find_answer
from modes_fx.data.batch import IGNORED, Batch
from modes_fx.data.chat import Turn, name_of, render, tokenizer_of
from modes_fx.data.sample import Sample
from modes_fx.errors import CalibrationError


@dataclass(frozen=True)
class _Row:
    sample: Sample
    turn: Turn
    answer: Answer


class Batches:
    """Batches made anew in each iteration: only one batch's images are decoded at a time. See ``make_batches``."""

    def __init__(
        self, groups: Sequence[Sequence[_Row]], processor: Any, padding_side: str | None, dtype: torch.dtype | None
    ) -> None:
        self._groups = groups
        self._processor = processor
        self._padding_side = padding_side
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        return (self._collate(rows) for rows in self._groups)

    def _collate(self, rows: Sequence[_Row]) -> dict[str, Any]:
        options: dict[str, Any] = {"text": [row.turn.text for row in rows], "return_tensors": "pt"}
        if len(rows) > 1:
            options["padding"] = True
        if self._padding_side is not None:
            options["padding_side"] = self._padding_side
        if not adds_special_tokens(rows[0].turn, self._processor):
            options["add_special_tokens"] = False
        batch = self._process(rows, options)
        batch["labels"] = self._labels(batch["input_ids"], batch.get("attention_mask"), rows)
        if self._dtype is None:
            return batch
        return {key: value.to(self._dtype) if _is_float(value) else value for key, value in batch.items()}

    def _process(self, rows: Sequence[_Row], options: dict[str, Any]) -> dict[str, Any]:
        """Run the processor; one that refuses a list of images for each sample gets them all in one list."""
        images = [row.sample.open_images() for row in rows]
        forms: list[dict[str, Any]] = [{}]
        if rows[0].sample.images:
            forms = [{"images": images}, {"images": list(chain.from_iterable(images))}]
        errors = []
        for form in forms:
            try:
                with _some_padding(tokenizer_of(self._processor)):
                    return dict(self._processor(**options, **form))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
                errors.append(error)
        names, told = ", ".join(row.sample.id for row in rows), "; ".join(dict.fromkeys(map(str, errors)))
        raise CalibrationError(f"{name_of(self._processor)} cannot process the samples {names}: {told}") from errors[0]

    def _labels(self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None, rows: Sequence[_Row]) -> Tensor:
        labels_BS = torch.full_like(input_ids_BS, IGNORED)
        for index, row in enumerate(rows):
            ids = torch.tensor(row.answer.ids)
            tokens = torch.ones_like(input_ids_BS[index]) if attention_mask_BS is None else attention_mask_BS[index]
            places = tokens.nonzero().flatten()[-len(ids) :]
            if not torch.equal(input_ids_BS[index, places], ids):
                raise CalibrationError(
                    f"{name_of(self._processor)} gives sample {row.sample.id} other last tokens than its tokenizer alone: "
                    f"{input_ids_BS[index, places].tolist()} instead of {ids.tolist()}. Check that it does not truncate."
                )
            labels_BS[index, places[: row.answer.length]] = ids[: row.answer.length]
        return labels_BS


def make_batches(
    samples: Sequence[Sample],
    processor: Any,
    batch_size: int = 8,
    *,
    shard: tuple[int, int] = (0, 1),
    padding_side: str | None = None,
    dtype: torch.dtype | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    by_answer: bool = False,
) -> Batches:
    """Batch samples into forward arguments, through the processor's chat template.

    All conversations are written and checked at once; images are opened only while iterating. Samples without images go into
    batches of their own, after the others.

    Args:
        samples: From ``load_samples``, or made by hand.
        processor: The model's own processor, or its tokenizer where no sample has an image.
        batch_size: Samples a batch.
        shard: (rank, world): every world-th batch from the rank-th on, for one of several processes. Any number of processes
            so runs the very same batches: in bfloat16 a sample's numbers depend on what it is padded to.
        padding_side: "left" or "right"; None leaves it to the processor.
        dtype: Of floating-point arguments such as ``pixel_values``; None leaves them as they are.
        template_kwargs: Further variables of the chat template, such as ``{"enable_thinking": False}``.
        by_answer: Whether samples with answers of like length share a batch, the shortest first, so that their answers begin
            nearly together where padding is on the left; else neighbours do.

    Returns:
        Batches, which can be iterated any number of times: what the processor returns, and ``labels``, int64 [B, S]: -100
        everywhere but on the answer's tokens and the token that ends the turn, if the template writes one.

    Raises:
        CalibrationError: An argument is out of range, the template cannot write a sample, its answer cannot be found again in
            the tokens, or (while iterating) the processor refuses a batch.
    """
    rank, world = shard
    if batch_size < 1 or not 0 <= rank < world:
        raise CalibrationError(f"Needed: batch_size >= 1 and 0 <= rank < world; got {batch_size} and shard={shard}.")
    if padding_side not in (None, "left", "right"):
        raise CalibrationError(f'padding_side must be "left" or "right", got {padding_side!r}.')
    rows = [_row(sample, processor, template_kwargs or {}) for sample in samples]
    if by_answer:
        rows.sort(key=lambda row: len(row.answer.ids))
    groups: list[Sequence[_Row]] = []
    for has_images in (True, False):
        alike = [row for row in rows if bool(row.sample.images) == has_images]
        groups += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return Batches(groups[rank::world], processor, padding_side, dtype)


def _row(sample: Sample, processor: Any, template_kwargs: Mapping[str, Any]) -> _Row:
    if sample.images and tokenizer_of(processor) is processor:
        raise CalibrationError(f"Sample {sample.id} has images, but {name_of(processor)} takes none. Pass a processor.")
    turn = render(sample, processor, template_kwargs)
    return _Row(sample, turn, find_answer(turn, processor, sample.id))


@contextlib.contextmanager
def _some_padding(tokenizer: Any) -> Iterator[None]:
    """Pad with the end token for the length of a block where the tokenizer has no token to pad with; the mask hides it."""
    if tokenizer.pad_token is not None:
        yield
        return
    tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.pad_token = None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
