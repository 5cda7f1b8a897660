"""GQA, as the hub stores it in ``lmms-lab/GQA``: questions and images in parquet folders of their own.

``<split>_instructions/*.parquet`` holds ``id``, ``imageId``, ``question``, ``answer`` and ``fullAnswer``;
``<split>_images/*.parquet`` holds ``id`` and ``image`` ({bytes, path}). They are joined by ``imageId``. Splits are named
``testdev_balanced``, ``train_balanced`` and so on. The full answer is taken, as MoDES calibrates, else the short one.
Only the chosen samples' images are read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from modes_fx.data.layouts.layout import Layout, Records, choose_split, first_of, text_of
from modes_fx.data.sample import ImageSource, Sample
from modes_fx.data.tables import parquet_files, read_parquet, row_images

_QUESTIONS, _IMAGES = "_instructions", "_images"
_COLUMNS = ("id", "imageId", "question", "answer", "fullAnswer")


def _splits(source: Path) -> list[str]:
    names = [folder.name.removesuffix(_QUESTIONS) for folder in source.glob(f"*{_QUESTIONS}") if parquet_files(folder)]
    return [name for name in names if parquet_files(source / f"{name}{_IMAGES}")]


def _fits(source: Path) -> bool:
    return source.is_dir() and bool(_splits(source))


def _read(source: Path, split: str | None, frames: int) -> Records:
    split = choose_split(_splits(source), split, source)
    questions = read_parquet(parquet_files(source / f"{split}{_QUESTIONS}"), columns=_COLUMNS)

    def read(chosen: Sequence[int]) -> Iterable[Sample]:
        rows = [questions[index] for index in chosen]
        wanted = {row["imageId"] for row in rows}
        images = read_parquet(parquet_files(source / f"{split}{_IMAGES}"), columns=("id", "image"), only=("id", wanted))
        place = {name: index for index, name in enumerate(images["id"])}
        for row in rows:
            name = row["imageId"]
            found: tuple[ImageSource, ...] = (functools.partial(_missing, name),)
            if name in place:
                found = row_images(images, place[name], "image", source)
            yield Sample(text_of(row["id"]), text_of(row["question"]), text_of(first_of(row, ("fullAnswer", "answer"))), found)

    return Records(len(questions), read)


def _missing(name: str) -> bytes:
    raise LookupError(f"there is no image {name!r} in the images' files")


LAYOUT = Layout("gqa", _fits, _read)
