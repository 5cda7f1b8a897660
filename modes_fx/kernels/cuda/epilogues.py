"""Triton programs with another ``_epilogue``, whose source is written while a graph is rewritten, and with sizes to try.

A program stays the function that it is, text and all: only the names it sees are others. So Inductor, which writes programs
into its own code, and Triton's and Inductor's caches, which go by the text of all that a program calls, tell them apart.
"""

from __future__ import annotations

import hashlib
import linecache
import textwrap
import types
from functools import cache
from typing import Any

import triton

from modes_fx.kernels.cuda import programs

Config = tuple[tuple[tuple[str, int], ...], int, int]
"""Constants by name, warps and stages."""


@cache
def program_with(program: Any, epilogue: str) -> Any:
    """Return a program that ends in another epilogue; one object for each, by which Inductor knows it.

    Args:
        program: One of ``programs``.
        epilogue: Lines of Triton, of ``a``, ``b``, ``bias_a`` and ``bias_b``, that return the result; "" for none.
    """
    if not epilogue:
        return program
    source = f"def _epilogue(a, b, bias_a, bias_b):\n{textwrap.indent(epilogue, '    ')}\n"
    name = f"<modes_fx epilogue {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # where Triton looks for source
    namespace = dict(vars(programs))
    exec(compile(source, name, "exec"), namespace)
    namespace["_epilogue"] = triton.jit(namespace["_epilogue"])
    given = program.fn
    own = types.FunctionType(given.__code__, namespace, given.__name__, given.__defaults__)
    own.__annotations__ = given.__annotations__
    return triton.jit(own)


@cache
def tuned(program: Any, configs: tuple[Config, ...]) -> Any:
    """Return a program that takes the fastest of several configurations, by times taken when it first runs."""
    choices = [triton.Config(dict(constants), num_warps=warps, num_stages=stages) for constants, warps, stages in configs]
    return triton.autotune(choices, key=["N", "D", "PARTS"])(program)
