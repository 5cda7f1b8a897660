"""A journal of what was measured, so that a run that was cut off goes on where it stopped.

One JSON line an entry, written through to the disk as it is measured; the first line says what all of it was measured on. A
last line that was cut off in the middle is dropped. A journal of something else (model, data, importance, versions) is refused:
its numbers must not slip into this run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modes_fx.calib import processes
from modes_fx.errors import CalibrationError

_FORMAT = 1

Key = tuple[str | float | int, ...]


class Journal:
    """Entries by key, in memory and, on the main process, in a file.

    All processes open it and see the same entries; only the main process touches the file.

    Attributes:
        resumed: Entries that the file held when it was opened.

    Args:
        path: The file, begun if there is none; None keeps entries in memory alone.
        about: What determines every entry: JSON values by name, such as hashes of model and data, and versions.

    Raises:
        CalibrationError: The file is the journal of another run, damaged before its last line, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._entries: dict[Key, dict[str, Any]] = {}
        if self._path is not None:
            opened = self._path
            self._entries = processes.from_main(lambda: _open(opened, dict(about)))
        self.resumed = len(self._entries)

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return the entry of a key, or None."""
        return self._entries.get(key)

    def add(self, key: Key, value: dict[str, Any]) -> None:
        """Keep an entry; it is on the disk when this returns."""
        self._entries[key] = value
        if self._path is not None and processes.is_main():
            _append(self._path, {"key": list(key), "value": value})


def _open(path: Path, about: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    header = {"journal": _FORMAT, "about": about}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if not lines:
            _append(path, header)
            return {}
    except OSError as error:
        raise CalibrationError(f"Cannot use the journal {path}: {error.strerror}. Name a file that can be written.") from error
    _check_header(path, lines[0], json.loads(json.dumps(header)))
    entries = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            entries[tuple(line["key"])] = line["value"]
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"Line {number} of the journal {path} is no entry. {_ANEW}") from error
    return entries


_ANEW = "Delete the file to begin anew, or name another one."


def _check_header(path: Path, found: Any, expected: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("journal") != _FORMAT or not isinstance(found.get("about"), dict):
        raise CalibrationError(f"{path} is not a journal of calibration (its first line says something else). {_ANEW}")
    was, now = found["about"], expected["about"]
    differing = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if differing:
        details = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in differing)
        raise CalibrationError(f"The journal {path} belongs to another run: {details}. {_ANEW}")


def _whole_lines(path: Path) -> list[Any]:
    """Return the file's lines, parsed; cut off a last line that is torn, so that the next one starts afresh."""
    if not path.exists():
        return []
    content = path.read_bytes()
    raw = content.split(b"\n")
    end, lines = 0, []
    for number, line in enumerate(raw[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            if number < len(raw) - 1 or raw[-1]:  # something whole or torn follows: not the trace of one interrupted write
                raise CalibrationError(f"Line {number} of the journal {path} is damaged ({error}). {_ANEW}") from error
            break
        end += len(line) + 1
    if not lines and content and not b'{"journal"'.startswith(content[:10]):
        raise CalibrationError(f"{path} is not a journal of calibration. {_ANEW}")  # never cut off somebody's file
    if end < len(content):
        os.truncate(path, end)
    return lines


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
