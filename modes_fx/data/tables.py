"""Tables on disk, through Hugging Face ``datasets``: memory-mapped, so that a row's bytes are read when used."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modes_fx.data.sample import ImageSource
from modes_fx.errors import CalibrationError

Table = Any  # datasets.Dataset, which has no types


def parquet_files(folder: Path) -> list[Path]:
    """Return all parquet files in a folder and below it, sorted."""
    return sorted(folder.rglob("*.parquet")) if folder.is_dir() else []


def column_names(file: Path) -> set[str]:
    """Return the columns of a parquet file; none for one that cannot be read, or without ``datasets``."""
    try:
        import pyarrow.parquet

        return set(pyarrow.parquet.read_schema(file).names)
    except (ImportError, OSError, ValueError):
        return set()


def read_parquet(
    files: Sequence[Path], *, columns: Iterable[str] | None = None, only: tuple[str, Iterable[str]] | None = None
) -> Table:
    """Read parquet files as one table.

    Args:
        files: At least one.
        columns: Columns to read; None reads all.
        only: A column and the values of it whose rows are wanted; None reads all rows.

    Raises:
        CalibrationError: A file is broken or lacks a column.
    """
    datasets = _datasets()
    options: dict[str, Any] = {}
    if columns is not None:
        options["columns"] = list(columns)
    if only is not None:
        options["filters"] = [(only[0], "in", sorted(only[1]))]
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # what `datasets` raises on a broken file has no common base
        cause = error.__cause__ or error
        raise CalibrationError(f"Cannot read {files[0]} (or one of {len(files)} files like it): {cause}") from error


def read_folder(folder: Path) -> dict[str, Table]:
    """Read what ``save_to_disk`` wrote, or any folder that ``load_dataset`` takes, as splits by name.

    Raises:
        CalibrationError: The folder is neither.
    """
    datasets = _datasets()
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # see above
        raise CalibrationError(f"`datasets` cannot read {folder}: {error.__cause__ or error}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def row_images(table: Table, row: int, column: str, folder: Path) -> tuple[ImageSource, ...]:
    """Return the images of one cell without decoding them.

    Args:
        table: The table.
        row: Number of the row.
        column: Holds an image as `datasets` stores it ({bytes, path}), a path, or a list of either.
        folder: Where relative paths start.
    """
    cell = _stored(table, row, column)
    if cell is None:
        return ()
    if not isinstance(cell, list):
        return (functools.partial(_bytes, table, row, column, None, folder),)
    return tuple(functools.partial(_bytes, table, row, column, index, folder) for index in range(len(cell)))


def _bytes(table: Table, row: int, column: str, index: int | None, folder: Path) -> bytes:
    cell = _stored(table, row, column)
    stored = cell if index is None else cell[index]
    if isinstance(stored, dict):
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        stored = stored.get("path")
    if not isinstance(stored, str):
        raise TypeError(f"column {column!r} holds neither an image's bytes nor its path, but {type(stored).__name__}")
    return (folder / stored).read_bytes()


def _stored(table: Table, row: int, column: str) -> Any:
    # In Arrow's own format: the others decode the image, and a broken one would raise here.
    return table.select_columns([column]).with_format("arrow")[row].column(0)[0].as_py()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError("Tables are read with `datasets`: pip install 'modes-fx[data]'.") from error
    return datasets
