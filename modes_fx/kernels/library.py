"""Compile ``experts.cpp`` with the C++ compiler, flags and cache that Inductor uses, once a machine."""

from __future__ import annotations

import ctypes
import functools
from importlib import resources

import torch

from modes_fx.errors import no_compiler

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_EXPERTS = (_POINTER, _INT, _INT, _POINTER, _INT, _INT, _INT, _POINTER, ctypes.c_int)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def load() -> ctypes.CDLL:
    """Return the library.

    Raises:
        CompilerError: No working C++ compiler was found.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = resources.files("modes_fx.kernels").joinpath("experts.cpp").read_text()
    try:
        library: ctypes.CDLL = CppCodeCache.load(source)
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise no_compiler(error) from error
    library.modes_fx_sort_pairs.argtypes = (_POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER)
    library.modes_fx_sort_pairs.restype = _INT
    for name in DTYPES.values():
        getattr(library, f"modes_fx_linear_{name}").argtypes = (_POINTER, _INT, _POINTER, _INT, *_EXPERTS)
        getattr(library, f"modes_fx_combine_{name}").argtypes = (_POINTER, _INT, _POINTER, _INT, _POINTER, *_EXPERTS)
        getattr(library, f"modes_fx_linear_{name}").restype = getattr(library, f"modes_fx_combine_{name}").restype = None
    return library
