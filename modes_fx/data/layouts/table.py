"""Any Hugging Face ``datasets`` folder: written by ``save_to_disk``, or of parquet or JSON files that ``load_dataset`` reads.

Read are the columns ``image`` or ``images`` (none for text alone), ``question`` or ``prompt``, ``answer`` or ``answers`` (of a
list the first) and ``id`` or ``question_id`` (else the row's number).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from modes_fx.data.layouts.jsonl import ANSWER, IMAGES, QUESTION
from modes_fx.data.layouts.layout import Layout, Records, choose_split, first_of, text_of
from modes_fx.data.sample import Sample
from modes_fx.data.tables import Table, read_folder, row_images, stored_images
from modes_fx.errors import CalibrationError

_ID = ("question_id", "id")


def _fits(source: Path) -> bool:
    return source.is_dir()


def _read(source: Path, split: str | None, frames: int) -> Records:
    return read_table(source, split, None)


def read_table(source: Path, split: str | None, question: str | None) -> Records:
    """Find the samples of one split of a folder.

    Args:
        source: The folder.
        split: Its name; None where there is only one.
        question: Asked in each row in place of its own.

    Raises:
        CalibrationError: The folder cannot be read or lacks a column.
    """
    splits = read_folder(source)
    table: Table = splits[choose_split(splits, split, source)]
    names = table.column_names
    texts = [name for name in (*_ID, *QUESTION, *ANSWER) if name in names]
    if not any(name in texts for name in ANSWER) or not (question or any(name in texts for name in QUESTION)):
        raise CalibrationError(
            f"{source} has the columns {', '.join(names)}; needed are one of {', '.join(QUESTION)} and one of "
            f"{', '.join(ANSWER)}. Rename them, or pass the layout's name (--data-format)."
        )
    fields = table.select_columns(texts).with_format(None)
    column = next((name for name in IMAGES if name in names), None)
    images = stored_images(table, column) if column else None

    def read(chosen: Sequence[int]) -> Iterable[Sample]:
        for index in chosen:
            row = fields[index]
            yield Sample(
                id=text_of(first_of(row, _ID)) or str(index),
                question=question or text_of(first_of(row, QUESTION)),
                answer=text_of(first_of(row, ANSWER)),
                images=row_images(images, index, source) if column else (),
            )

    return Records(len(table), read)


LAYOUT = Layout("datasets", _fits, _read)
