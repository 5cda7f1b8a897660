"""A JSONL file: one object a line, ``{"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}``.

Read are ``image`` or ``images`` (a path or a list of them, relative to the file; neither for text alone), ``question`` or
``prompt``, ``answer`` or ``answers`` (of a list the first), and ``id`` (else the line's number). Empty lines are passed over.
The folder that holds it, and its images, will do as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modes_fx.data.layouts.layout import Layout, Records, first_of, text_of
from modes_fx.data.sample import Sample
from modes_fx.errors import CalibrationError
from modes_fx.files import signed_json

QUESTION, ANSWER, IMAGES = ("question", "prompt"), ("answer", "answers"), ("images", "image")


def _fits(source: Path) -> bool:
    return source.suffix == ".jsonl" if source.is_file() else _only_file_in(source) is not None


def _only_file_in(folder: Path) -> Path | None:
    """Return the one JSONL file of a folder of images."""
    files = list(folder.glob("*.jsonl"))
    images = any(path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") for path in folder.iterdir())
    return files[0] if len(files) == 1 and images else None


def _read(source: Path, split: str | None, frames: int) -> Records:
    source = source if source.is_file() else _only_file_in(source) or source
    if split is not None:
        raise CalibrationError(f"A JSONL file has no splits, but split {split!r} was asked for.")
    try:
        lines = source.read_text(encoding="utf-8").split("\n")  # splitlines() also splits inside of strings
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"Cannot read {source}: {error}") from error
    rows = [(str(number), _parse(line, source, number)) for number, line in enumerate(lines, 1) if line.strip()]

    def read(chosen: Sequence[int]) -> Iterable[Sample]:
        return (_sample(row, source.parent, name) for name, row in (rows[index] for index in chosen))

    return Records(len(rows), read)


def _parse(line: str, source: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        signed_json.check_depth(row)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"Line {number} of {source} is not JSON: {error}. Expected one object a line.") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"Line {number} of {source} is no object, but {type(row).__name__}.")
    return row


def _sample(row: dict[str, Any], folder: Path, name: str) -> Sample:
    images = first_of(row, IMAGES)
    paths = [] if images is None else images if isinstance(images, list) else [images]
    return Sample(
        id=text_of(row.get("id")) or name,
        question=text_of(first_of(row, QUESTION)),
        answer=text_of(first_of(row, ANSWER)),
        images=tuple(folder / str(path) for path in paths),
    )


LAYOUT = Layout("jsonl", _fits, _read)
