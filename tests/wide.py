"""What `make test` leaves to `make test-wide` of many cases that one test holds for."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

FAMILIES = {"qwen3_moe", "qwen3_vl_moe", "deepseek_v3", "gpt_oss"}
"""A router of each kind, with images and without."""


def beyond(few: Collection[str], cases: Iterable[T], name: Callable[[T], str]) -> list[Any]:
    """Return cases by their names, all but a few of them marked as wide."""
    return [pytest.param(case, id=name(case), marks=() if name(case) in few else pytest.mark.wide) for case in cases]
