"""Triton's interpreter, without what it would do anew for each call of a function and each value within a program."""

from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Let it patch Triton's language only where that is not patched, and look up numpy's form of a dtype once.

    A launch patches what its program sees, and undoes that. Calls within find it patched, but for ``tl.core`` the first time:
    what a call patches stays so.
    """
    patch, form_of, known = interpreter._patch_lang, interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def patch_once(fn: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
            return patch(fn)
        return interpreter._LangPatchScope()  # nothing to undo

    def form_once(dtype: Any) -> Any:
        return form_of(dtype) if isinstance(dtype.scalar, tl.pointer_type) else known(dtype.scalar)  # pointers have no hash

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, form_once
