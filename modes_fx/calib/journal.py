"""A journal of what was measured, so that a run that was cut off goes on where it stopped.

One JSON line an entry, with its digest, written through to the disk as it is measured; the first line says what all of it was
measured on. A last line that was cut off in the middle is dropped. A journal of something else (model, data, importance,
versions) is refused: its numbers must not slip into this run.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from modes_fx.calib import processes
from modes_fx.errors import CalibrationError
from modes_fx.files import signed_json

logger = logging.getLogger(__name__)

_FORMAT = 2  # the lines of 1 had no digests

Key = tuple[str | float | int, ...]
T = TypeVar("T")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    key: Key
    value: dict[str, Any]
    digest: str = ""


class Journal:
    """Entries by key, in memory and, on the main process, in a file.

    All processes open it and see the same entries; only the main process touches the file.

    Args:
        path: The file, begun if there is none; None keeps entries in memory alone.
        about: What determines every entry: JSON values by name, such as hashes of model and data, and versions.

    Raises:
        CalibrationError: The file is the journal of another run, damaged before its last line, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._before: Key = ()
        self._entries: dict[Key, dict[str, Any]] = {}
        if self._path is not None:
            file = self._path
            self._entries = processes.from_main(lambda: _open(file, dict(about)))

    def get(self, key: Key, kind: type[T]) -> T | None:
        """Return the entry of a key as a type of ``msgspec``'s, or None.

        Raises:
            CalibrationError: It is of another type.
        """
        entry = self._entries.get((*self._before, *key))
        try:
            return None if entry is None else msgspec.convert(entry, kind)
        except ValueError as error:
            raise CalibrationError(f"The entry {list(key)} of the journal {self._path} is damaged: {error}. {_ANEW}") from error

    def __len__(self) -> int:
        """Return how many entries there are."""
        return len(self._entries)

    def under(self, *key: str | float) -> Journal:
        """Return this journal for entries whose keys begin with ``key``, which callers leave out."""
        part = copy.copy(self)
        part._before = (*self._before, *key)
        return part

    def add(self, key: Key, value: dict[str, Any]) -> None:
        """Keep an entry; it is on the disk when this returns.

        Raises:
            CalibrationError: It cannot be written; on all processes.
        """
        whole = (*self._before, *key)
        self._entries[whole] = value
        if self._path is not None:
            path = self._path
            processes.from_main(lambda: _add(path, signed_json.signed({"key": whole, "value": value})))


def opened(journal: str | os.PathLike[str] | Journal | None, about: Callable[[], Mapping[str, Any]]) -> Journal:
    """Return a journal that is open already, or open a file's; ``about`` is asked only then."""
    return journal if isinstance(journal, Journal) else Journal(journal, about())


def _open(path: Path, about: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    header = json.loads(json.dumps({"journal": _FORMAT, "about": about}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = signed_json.read_bytes(path) if path.exists() else b""
        if _line(header).startswith(content.rstrip(b"\0")) and b"\n" not in content:  # new, or its very first line is torn
            path.write_bytes(b"")
            _append(path, header)
            return {}
        first, *lines = content.split(b"\n")
        entries, end = _entries(path, lines, has_digests=_check_header(path, first, header))
        if len(first) + 1 + end < len(content):  # only now that it is known to be this run's journal
            os.truncate(path, len(first) + 1 + end)
    except OSError as error:
        raise CalibrationError(f"Cannot use the journal {path}: {error.strerror}. Name a file that can be written.") from error
    except signed_json.TooLargeError as error:
        raise CalibrationError(f"Cannot use the journal {path}: {error}. Name another file.") from error
    return entries


_ANEW = "Delete the file to begin anew, or name another one."


def _entries(path: Path, lines: list[bytes], *, has_digests: bool) -> tuple[dict[Key, dict[str, Any]], int]:
    """Return the entries of all lines after the first but a last one that is torn; and how many bytes they take."""
    entries, end = {}, 0
    for number, line in enumerate(lines[:-1], start=2):
        try:
            entry = _parsed(line, has_digests)
            entries[entry.key] = entry.value
        except ValueError as error:
            if number < len(lines) or lines[-1]:  # something follows: not the trace of one interrupted write
                raise CalibrationError(f"Line {number} of the journal {path} is damaged ({error}). {_ANEW}") from error
            break
        end += len(line) + 1
    return entries, end


def _parsed(line: bytes, has_digest: bool) -> _Line:
    content = signed_json.parse(line)
    entry = msgspec.convert(content, _Line)
    if (has_digest or signed_json.DIGEST in content) and not signed_json.fits(content):
        raise ValueError("its digest does not fit")
    return entry


def _check_header(path: Path, line: bytes, expected: dict[str, Any]) -> bool:
    """Return whether the entries below have digests; warn if not."""
    try:
        found = signed_json.parse(line)
    except ValueError:
        found = None
    known = range(1, _FORMAT + 1)
    if not isinstance(found, dict) or found.get("journal") not in known or not isinstance(found.get("about"), dict):
        raise CalibrationError(f"{path} is not a journal of calibration (see its first line). Name another file.")
    was, now = found["about"], expected["about"]
    differing = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if differing:
        details = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in differing)
        raise CalibrationError(f"The journal {path} belongs to another run: {details}. {_ANEW}")
    if found["journal"] == 1:
        logger.warning("the journal %s has entries without a digest that would tell damage; a new file has them", path)
    return bool(found["journal"] != 1)


def _add(path: Path, line: dict[str, Any]) -> None:
    try:
        _append(path, line)
    except OSError as error:
        raise CalibrationError(
            f"Cannot write to the journal {path}: {error.strerror}. What it holds is whole: make room and run the same again."
        ) from error


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(_line(line))
        file.flush()
        os.fsync(file.fileno())
