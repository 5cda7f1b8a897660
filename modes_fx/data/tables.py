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
    files: Sequence[Path], *, columns: Iterable[str] | None = None, only: tuple[str, Iterable[Any]] | None = None
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


def stored_images(table: Table, column: str) -> Table:
    """Return a table's column of images as it is stored: other views decode an image, and a broken one would raise there."""
    return table.select_columns([column]).with_format("arrow")


def row_images(stored: Table, row: int, folder: Path) -> tuple[ImageSource, ...]:
    """Return the images of one cell without decoding them.

    Args:
        stored: From ``stored_images``; a cell holds {bytes, path}, as `datasets` stores an image, a path, or a list of either.
        row: Number of the row.
        folder: Where relative paths start.
    """
    cell = _cell(stored, row)
    if cell is None:
        return ()
    if not isinstance(cell, list):
        return (functools.partial(_bytes, stored, row, None, folder),)
    return tuple(functools.partial(_bytes, stored, row, index, folder) for index in range(len(cell)))


def _bytes(stored: Table, row: int, index: int | None, folder: Path) -> bytes:
    cell = _cell(stored, row)
    image = cell if index is None else cell[index]
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        image = image.get("path")
    if not isinstance(image, str):
        raise TypeError(f"expected an image's bytes or its path in {stored.column_names[0]!r}, got {type(image).__name__}")
    return (folder / image).read_bytes()


def _cell(stored: Table, row: int) -> Any:
    return stored[row].column(0)[0].as_py()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError("Tables are read with `datasets`: pip install 'modes-fx[data]'.") from error
    return datasets
