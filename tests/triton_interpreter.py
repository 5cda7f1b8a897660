"""Triton's interpreter, which otherwise patches all of Triton's language anew for each call of a function within a program."""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Let it patch the language only where that is not patched.

    A launch patches what its program sees, and undoes that. Calls within find it patched, but for ``tl.core`` the first time:
    what a call patches stays so.
    """
    patch = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
            return patch(fn)
        return interpreter._LangPatchScope()  # nothing to undo

    interpreter._patch_lang = patch_once
