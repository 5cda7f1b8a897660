"""Writing files so that a half-written one never replaces a whole one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from modes_fx.errors import ModesFxError


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` to a temporary file beside ``path``, then rename it into place.

    Args:
        path: Destination; its folder is made if need be.
        content: Text (written as UTF-8) or bytes.

    Returns:
        The path written.

    Raises:
        ModesFxError: It cannot be written; a file that was there is as it was.
    """
    path = Path(path)
    try:
        return _write(path, content)
    except OSError as error:
        raise ModesFxError(f"Cannot write {path}: {error.strerror}. Name a file in a folder that can be written.") from error


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
