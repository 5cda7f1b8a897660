"""VideoMMMU, as the hub stores it in ``lmms-lab/VideoMMMU``, with the videos' frames extracted beforehand.

Questions: parquet files in the folders ``Adaptation``, ``Comprehension`` and ``Perception`` (a split each; all are read where
none is named), with ``id``, ``question``, ``options`` (a list, empty for open questions), ``answer`` (an option's letter, or
text) and possibly ``image``. As MoDES calibrates, the question stands alone and the answer is the option's text.

Frames: any folder below the source that is called like a question's ``id`` and holds image files (.jpg, .jpeg, .png, .webp,
.bmp), for example ``Art/validation_Art_1/0001.jpg``; in the order of the numbers in their names, ``2`` before ``10``. At most
``frames`` of them are taken, evenly spaced, the first and the last among them; ``image`` follows. Videos are not decoded here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modes_fx.data.layouts.layout import Layout, Records, choose_split, text_of
from modes_fx.data.sample import ImageSource, Sample
from modes_fx.data.tables import Table, column_names, parquet_files, read_parquet, row_images, stored_images

_TRACKS = ("Adaptation", "Comprehension", "Perception")
_COLUMNS = ("id", "question", "options", "answer")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def _tracks(source: Path) -> list[str]:
    return [name for name in _TRACKS if parquet_files(source / name)]


def _fits(source: Path) -> bool:
    return bool(_tracks(source))


def _read(source: Path, split: str | None, frames: int) -> Records:
    names = _tracks(source)
    if split is not None or not names:
        names = [choose_split(names, split, source)]
    tables: list[tuple[Table, Table | None]] = []
    for name in names:
        files = parquet_files(source / name)
        extra = ("image",) if "image" in column_names(files[0]) else ()
        table = read_parquet(files, columns=(*_COLUMNS, *extra))
        tables.append((table.select_columns(list(_COLUMNS)), stored_images(table, "image") if extra else None))
    places = [(track, index) for track, (table, _) in enumerate(tables) for index in range(len(table))]
    folders = {path.name: path for path in sorted(source.rglob("*")) if path.is_dir()}

    def read(chosen: Sequence[int]) -> Iterable[Sample]:
        for number in chosen:
            track, index = places[number]
            table, stored = tables[track]
            row = table[index]
            images = _spaced(_frames(folders.get(row["id"])), frames) or [functools.partial(_missing, row["id"])]
            if stored is not None:
                images += row_images(stored, index, source)
            yield Sample(f"{names[track]}/{row['id']}", text_of(row["question"]), _answer(row), tuple(images))

    return Records(len(places), read)


def _answer(row: Mapping[str, Any]) -> str:
    answer, options = text_of(row["answer"]), row["options"] or []
    if len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(options):
        return text_of(options[ord(answer) - ord("A")])
    return answer


def _frames(folder: Path | None) -> list[Path]:
    files = [] if folder is None else [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES]
    return sorted(files, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])


def _spaced(files: Sequence[Path], count: int) -> list[ImageSource]:
    if len(files) <= count:
        return list(files)
    last = len(files) - 1
    return [files[round(index * last / max(count - 1, 1))] for index in range(count)]


def _missing(name: str) -> bytes:
    raise LookupError(f"no folder called {name!r} with frames; extract the frames of its video into one")


LAYOUT = Layout("videommmu", _fits, _read)
