"""Functions with code objects of their own.

NOTE [a code object of its own] Dynamo keeps its compiled graphs by code object, and which dimensions vary by file, line and
name. Where several models or modules come through one function, their graphs would be tried one after the other, would use up
each other's recompile limit, and one model's sizes would make another's dynamic.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

_serial = itertools.count()


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function under a name of its own, with code of its own, and so for the functions inside it."""
    given: Any = function
    copied = _copied(given.__code__, next(_serial))
    return types.FunctionType(copied, given.__globals__, copied.co_name, given.__defaults__, given.__closure__)


def _copied(code: types.CodeType, serial: int) -> types.CodeType:
    constants = tuple(_copied(item, serial) if isinstance(item, types.CodeType) else item for item in code.co_consts)
    return code.replace(co_name=f"{code.co_name}_{serial}", co_consts=constants)
