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

from modes_fx.data.layouts.layout import Layout, Records, choose_split, text_of
from modes_fx.data.sample import ImageSource, Sample
from modes_fx.data.tables import parquet_files, read_parquet, row_images, stored_images

_QUESTION_FOLDER, _IMAGE_FOLDER = "_instructions", "_images"
_COLUMNS = ("id", "imageId", "question", "answer", "fullAnswer")


def _splits(source: Path) -> list[str]:
    names = [
        folder.name.removesuffix(_QUESTION_FOLDER) for folder in source.glob(f"*{_QUESTION_FOLDER}") if parquet_files(folder)
    ]
    return [name for name in names if parquet_files(source / f"{name}{_IMAGE_FOLDER}")]


def _fits(source: Path) -> bool:
    return source.is_dir() and bool(_splits(source))


def _read(source: Path, split: str | None, frames: int) -> Records:
    split = choose_split(_splits(source), split, source)
    questions = read_parquet(parquet_files(source / f"{split}{_QUESTION_FOLDER}"), columns=_COLUMNS)
    files = parquet_files(source / f"{split}{_IMAGE_FOLDER}")

    def read(chosen: Sequence[int]) -> Iterable[Sample]:
        rows = [questions[index] for index in chosen]
        images = _images(files, {row["imageId"] for row in rows}, source)
        for row in rows:
            name = row["imageId"]
            found = images.get(name) or (functools.partial(_missing, name),)
            answer = text_of(row["fullAnswer"]) or text_of(row["answer"])
            yield Sample(text_of(row["id"]), text_of(row["question"]), answer, found)

    return Records(len(questions), read)


def _images(files: Sequence[Path], names: set[str | None], folder: Path) -> dict[str | None, tuple[ImageSource, ...]]:
    """Return those of the named images that there are."""
    known = names.intersection(read_parquet(files, columns=("id",))["id"])
    if not known:
        return {}
    table = read_parquet(files, columns=("id", "image"), only=("id", known))
    stored = stored_images(table, "image")
    return {name: row_images(stored, row, folder) for row, name in enumerate(table["id"])}


def _missing(name: str | None) -> bytes:
    raise LookupError(f"there is no image {name!r} in the images' files")


LAYOUT = Layout("gqa", _fits, _read)
