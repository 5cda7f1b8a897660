"""What a layout is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modes_fx.data.sample import Sample
from modes_fx.errors import CalibrationError
from modes_fx.files import strict_json


@dataclass(frozen=True)
class Records:
    """A source that was found.

    Attributes:
        count: Samples in it.
        read: Returns the samples of the given rows, in that order. What is missing in one is left empty; nothing is opened.
    """

    count: int
    read: Callable[[Sequence[int]], Iterable[Sample]]


@dataclass(frozen=True)
class Layout:
    """One way to store samples.

    Attributes:
        name: What ``--data-format`` calls it.
        fits: Whether a file or folder looks like it.
        read: Finds the samples of (source, split, frames of a video).
    """

    name: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, str | None, int], Records]


def choose_split(names: Iterable[str], wanted: str | None, source: Path) -> str:
    """Return the wanted split's name, or the only one.

    Raises:
        CalibrationError: There is no split at all, no such one, or several and none is wanted.
    """
    names = sorted(names)
    if not names:
        raise CalibrationError(f"{source} lacks the files of the format asked for. Leave it out, or pass the folder above.")
    aliases = {"val": "validation", "validation": "val"}  # `datasets` renames the one where no card names the files
    if wanted is None and len(names) == 1:
        return names[0]
    for name in (wanted, aliases.get(wanted or "")):
        if name in names:
            return str(name)
    problem = "holds several splits" if wanted is None else f"holds no split {wanted!r}"
    raise CalibrationError(f"{source} {problem}. Pass one of: {', '.join(names)}.")


def text_of(value: Any) -> str:
    """Return a field as text without space around it; of a list the first entry that has any."""
    if isinstance(value, (list, tuple)):
        return next((text for text in map(text_of, value) if text), "")
    if value is None or isinstance(value, Mapping):
        return ""
    return str(strict_json.plain(str(value))).strip()


def first_of(row: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first of several fields that a row has."""
    return next((row[key] for key in keys if row.get(key) is not None), None)
