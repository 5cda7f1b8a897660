"""Compile the C++ sources with the C++ compiler, flags and cache that Inductor uses, once a machine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch

from modes_fx.errors import no_compiler

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ROWS = (_POINTER, _INT, _POINTER, _INT)
_EXPERTS = (_POINTER, _INT, _INT, _POINTER, _INT, _INT, _INT, _POINTER, ctypes.c_int)
_PACKED = (_POINTER, _POINTER, _INT, _INT, _INT, _POINTER, ctypes.c_int)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def load() -> ctypes.CDLL:
    """Return the library of ``experts.cpp``.

    Raises:
        CompilerError: No working C++ compiler was found.
    """
    functions: dict[str, tuple[Any, ...]] = {"modes_fx_sort_pairs": (_POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER)}
    for name in DTYPES.values():
        functions[f"modes_fx_linear_{name}"] = (*_ROWS, *_EXPERTS)
        functions[f"modes_fx_combine_{name}"] = (*_ROWS, _POINTER, *_EXPERTS)
    library = _compiled("experts.cpp", functions)
    library.modes_fx_sort_pairs.restype = _INT
    return library


@functools.cache
def load_packed() -> ctypes.CDLL:
    """Return the library of ``packed.cpp``; see ``load``."""
    functions = {"modes_fx_linear_packed": (*_ROWS, *_PACKED), "modes_fx_combine_packed": (*_ROWS, _POINTER, *_PACKED)}
    return _compiled("packed.cpp", functions)


def _compiled(file: str, functions: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = resources.files("modes_fx.kernels").joinpath(file).read_text()
    try:
        library: ctypes.CDLL = CppCodeCache.load(source)
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise no_compiler(error) from error
    for name, types in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
