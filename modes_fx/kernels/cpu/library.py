"""Compile the C++ sources with the C++ compiler, flags and cache that Inductor uses, once a machine.

Loaded, each registers the operations of ``ops`` for the CPU, so that generated code calls them without Python in between.
"""

from __future__ import annotations

import functools
import logging
from importlib import resources

from modes_fx.errors import no_compiler

logger = logging.getLogger(__name__)


@functools.cache
def load(file: str) -> None:
    """Load the library of a source, ``experts.cpp`` or ``packed.cpp``.

    Raises:
        CompilerError: No working C++ compiler was found.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    logger.info("kernels of %s: compiled for this processor, unless Inductor's cache has them (20 s, once a machine)", file)
    try:
        CppCodeCache.load(resources.files("modes_fx.kernels.cpu").joinpath(file).read_text())
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise no_compiler(error) from error
