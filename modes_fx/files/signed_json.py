"""JSON with a digest of itself: what was damaged on its way is refused, never read as something else.

The digest is the sha256 of all else in one spelling, so indentation and the order of names do not matter. It tells that content
is as it was written, not who wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from modes_fx.errors import ModesFxError
from modes_fx.files import strict_json

MAX_BYTES = 1 << 28
MAX_DEPTH = 32
DIGEST = "digest"
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content as standard JSON has it, with its digest."""
    whole = strict_json.plain({name: value for name, value in content.items() if name != DIGEST})
    return {**whole, DIGEST: digest(whole)}


def digest(content: Mapping[str, Any]) -> str:
    """Return 64 hexadecimal digits for content as it was parsed, or is written; one of its own is left out."""
    rest = {name: value for name, value in content.items() if name != DIGEST}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def fits(content: Mapping[str, Any]) -> bool:
    """Say whether content is what its digest was made of."""
    return content.get(DIGEST) == digest(content)


class TooLargeError(ValueError):
    """A file has more than ``MAX_BYTES``."""


def load(path: Path, what: str, error: type[ModesFxError], advice: str) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        what: What it is to be, in a word.
        error: What to raise.
        advice: What to do if it cannot be read.

    Raises:
        ModesFxError: It cannot be read, is no JSON, or beyond the limits.
    """
    try:
        return parse(read_bytes(path))
    except OSError as problem:
        raise error(f"Cannot read the {what} {path}: {problem.strerror}. {advice}") from problem
    except ValueError as problem:
        raise error(f"{path} is not a whole JSON file ({problem}). {advice}") from problem


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        OSError: It cannot be read.
        TooLargeError: It is beyond the limit.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise TooLargeError(f"it has more than {MAX_BYTES >> 20} MiB")
    return data


def parse(data: bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: It is no JSON, or nested more than ``MAX_DEPTH`` deep.
    """
    try:
        content = msgspec.json.decode(data)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_depth(content)
    return content


def check_depth(content: Any) -> None:
    """Refuse parsed content that is nested more than ``MAX_DEPTH`` deep.

    Raises:
        ValueError: It is.
    """
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [item for part in level if isinstance(part, (dict, list)) for item in _items(part)]
    if level:
        raise ValueError(_TOO_DEEP)


def _items(part: dict[str, Any] | list[Any]) -> Any:
    return part.values() if isinstance(part, dict) else part
