"""Writing files: tried before the work whose result they take, never half, and the result kept elsewhere if all fails."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from modes_fx.errors import ModesFxError

T = TypeVar("T")


def check_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Try to write where a result will go; what was there is as it was, and nothing is left.

    Args:
        path: Destination; it and its folders need not exist yet.
        folder: Whether it is a folder.

    Raises:
        ModesFxError: A file cannot be written there.
    """
    path = Path(path).absolute()
    try:
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            raise ModesFxError(f"{path} cannot be written: it is no {'folder' if folder else 'file'}. Name another place.")
        place = next(each for each in ((path, *path.parents) if folder else path.parents) if each.exists())
        if place == (path if folder else path.parent):
            with tempfile.NamedTemporaryFile(dir=place, prefix=f".{path.name}."):
                pass
        else:  # folders will be made in it
            os.rmdir(tempfile.mkdtemp(dir=place, prefix=f".{path.name}."))
    except OSError as error:
        raise ModesFxError(f"{path} cannot be written: {error.strerror}. Name another place.") from error


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` to a temporary file beside ``path``, then rename it into place.

    Args:
        path: Destination; its folder is made if need be.
        content: Text (written as UTF-8) or bytes.

    Returns:
        The path written.

    Raises:
        ModesFxError: It cannot be written; a file that was there is as it was, and the content is where the message says.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        return _write(path, data)
    except OSError as error:
        raise ModesFxError(f"Cannot write {path}: {error.strerror}. {_keep_elsewhere(path.name, data)}") from error


def in_any_case(*writes: Callable[[], T]) -> list[T]:
    """Call functions that write, all of them even if one fails, and return what they return.

    Raises:
        ModesFxError: Some failed; says which.
    """
    done, failed = [], []
    for write in writes:
        try:
            done.append(write())
        except ModesFxError as error:
            failed.append(error)
    if failed:
        raise ModesFxError("\n".join(map(str, failed))) from failed[0]
    return done


def _keep_elsewhere(name: str, data: bytes) -> str:
    """Write what cannot go where it should to the temporary folder; return what to tell of it."""
    try:
        kept = Path(tempfile.mkdtemp(prefix="modes-fx-")) / name
        kept.write_bytes(data)
    except OSError:
        return "Name a file in a folder that can be written."
    return f"Its content is in {kept}: move it from there."


def _write(path: Path, data: bytes) -> Path:
    if path.exists() and not (path.is_file() or path.is_dir()):  # renaming would put a file in the place of a device
        raise OSError(errno.EEXIST, "it is no file")
    path.parent.mkdir(parents=True, exist_ok=True)
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
