"""Numbers in standard JSON, which has neither infinity nor NaN: they are written as strings, and read back as numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

INSPECTION_SCHEMA = 1
"""Version of what ``modes-fx inspect --json`` prints; here, so that an error may be told before anything heavy is imported."""

Number = float | Literal["inf", "-inf", "nan"]
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def dumps(content: Any) -> str:
    """Return content as JSON of several lines; each number that is none in JSON as ``"inf"``, ``"-inf"`` or ``"nan"``."""
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return content of mappings, lists and values as standard JSON has it, numbers that it lacks as those strings."""
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, number in _WORDS.items() if number == value or (number != number and value != value))
    if isinstance(value, str):  # half a surrogate pair, as an argument of undecodable bytes has, is in no JSON either
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def tuples(values: Any) -> Any:
    """Return lists, and lists in them, as tuples."""
    return tuple(map(tuples, values)) if isinstance(values, (list, tuple)) else values


def numbers(content: Any) -> Any:
    """Return what was read, with those strings as the numbers they stand for; only for parts whose text is of no such words."""
    if isinstance(content, Mapping):
        return {key: numbers(item) for key, item in content.items()}
    if isinstance(content, list):
        return [numbers(item) for item in content]
    return _WORDS.get(content, content) if isinstance(content, str) else content
