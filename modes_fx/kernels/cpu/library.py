"""Compile the C++ sources with the C++ compiler, flags and cache that Inductor uses, once a machine.

Loaded, each registers the operations of ``ops`` for the CPU, so that generated code calls them without Python in between.
"""

from __future__ import annotations

import functools
import logging
import re
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
        CppCodeCache.load(_source(file))
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise no_compiler(error) from error


def _source(file: str) -> str:
    """Return a source with our headers written into it, since the cache knows it by its text."""
    folder = resources.files("modes_fx.kernels.cpu")
    source = folder.joinpath(file).read_text()
    return re.sub(r'#include "(\w+\.h)"', lambda found: folder.joinpath(found[1]).read_text(), source)
