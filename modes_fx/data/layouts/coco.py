"""COCO captions, as the hub stores them in ``lmms-lab/COCO-Caption`` and ``lmms-lab/COCO-Caption2017``.

Parquet files ``data/val-*.parquet`` with the columns ``question_id``, ``image`` ({bytes, path}), ``answer`` (the captions; the
first is taken), ``coco_url`` and others. The question is the usual request for a caption. The split ``test`` has no captions.
"""

from __future__ import annotations

from pathlib import Path

from modes_fx.data.layouts.layout import Layout, Records
from modes_fx.data.layouts.table import read_table
from modes_fx.data.tables import column_names, parquet_files

_QUESTION = "Provide a one-sentence caption for the provided image."


def _fits(source: Path) -> bool:
    files = parquet_files(source)
    return bool(files) and column_names(files[0]) >= {"image", "answer", "coco_url"}


def _read(source: Path, split: str | None, frames: int) -> Records:
    return read_table(source, split, _QUESTION)


LAYOUT = Layout("coco", _fits, _read)
