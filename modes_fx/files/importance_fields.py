"""The fields of an importance file and their types, read before anything heavy is imported."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from modes_fx.errors import CalibrationError
from modes_fx.files import signed_json
from modes_fx.files.plan_fields import ModelFields

logger = logging.getLogger(__name__)

VERSION = 2  # 1 had no digest
ADVICE = "Make one with `modes-fx calibrate MODEL --data DATA --out FILE`."

Mode = Literal["reference", "paper"]
Method = Literal["resumed", "naive", "estimate"]
Rows = tuple[tuple[float, float], ...]


class ImportanceNumbers(msgspec.Struct, forbid_unknown_fields=True):
    """As ``Importance``."""

    alpha: Rows
    kl: Rows
    mode: Mode
    answer_tokens: int
    method: Method
    forwards: float
    seconds: float


class ImportanceFields(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file, as ``ImportanceFile``."""

    importance_version: int
    importance: ImportanceNumbers
    layers: tuple[str, ...]
    model: dict[str, Any]
    data_hash: str
    versions: dict[str, str]
    digest: str = ""


def read(path: str | os.PathLike[str], *, quiet: bool = False) -> ImportanceFields:
    """Read an importance file; warn of one that was written before importances had a digest.

    Args:
        path: The file.
        quiet: Whether not to warn.

    Raises:
        CalibrationError: It is missing, truncated, damaged, changed or something else.
    """
    path = Path(path)
    content = signed_json.load(path, "importance", CalibrationError, ADVICE)
    version = content.get("importance_version") if isinstance(content, dict) else None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CalibrationError(f"{path} is not an importance of version {VERSION}. {ADVICE}")
    has_digest = signed_json.DIGEST in content
    if has_digest and not signed_json.fits(content):
        raise CalibrationError(f"{path} is not as it was written: its digest does not fit. {ADVICE}")
    try:
        if has_digest != (version >= 2):
            raise ValueError("importances have a digest from version 2 on")
        msgspec.convert(content.get("model"), ModelFields)
        fields = msgspec.convert(content, ImportanceFields)
    except ValueError as error:
        raise CalibrationError(f"{path} is not a whole importance ({error}). {ADVICE}") from error
    if not has_digest and not quiet:
        logger.warning("%s has no digest that would tell damage; `modes-fx calibrate` writes one", path)
    return fields
