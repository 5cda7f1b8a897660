"""The file of a skip plan: its fields and their types, and its digest."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from modes_fx.errors import PlanError
from modes_fx.files import signed_json, strict_json
from modes_fx.files.writing import write_atomically

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 3  # 2 had no digest; 1 no frontier, mode, weights and tables either
_NUMBERS = ("points", "frontier", "alpha", "weights", "tables")
_NEW_IN_2: dict[str, Any] = {"frontier": [], "mode": "fixed", "weights": [], "tables": None}


class PointFields(msgspec.Struct, forbid_unknown_fields=True):
    """One point, as ``PlanPoint``."""

    target: float | None
    tau_text: float
    tau_vision: float
    gamma: float = 1.0
    realised: dict[str, float] = {}
    kl: dict[str, float] = {}


class ModelFields(msgspec.Struct, forbid_unknown_fields=True):
    """What ``describe_model`` says; a plan that fits any model says nothing.

    Attributes:
        model_type: As in the model's config.
        config_hash: Hash of its architecture: of its config without dtype, paths and versions. Another one is refused.
        vision_token_ids: Placeholder ids of visual tokens, by which ``torch.compile(model, backend="modes_fx")`` tells them.
    """

    model_type: str = ""
    config_hash: str = ""
    vision_token_ids: list[int] = []


class PlanFields(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file, as ``SkipPlan``.

    Attributes:
        schema_version: Of the file: 3, older ones are read too, newer ones refused.
        digest: SHA-256 of all the rest, which tells damage; see docs/threat-model.md for what it does not tell.
    """

    schema_version: int
    points: tuple[PointFields, ...]
    alpha: tuple[tuple[float, float], ...] | None
    layers: tuple[str, ...]
    model: dict[str, Any]
    provenance: dict[str, Any]
    rule: str
    frontier: tuple[PointFields, ...]
    mode: Literal["fixed", "budget"]
    weights: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    tables: tuple[Any, ...] | None
    digest: str = ""


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a plan's fields, with their digest.

    Raises:
        PlanError: They hold what JSON does not have.
        ModesFxError: The file cannot be written.
    """
    try:
        whole = signed_json.signed({"schema_version": SCHEMA_VERSION, **content})
        _fields(whole)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"A plan holds numbers, and JSON values in its provenance ({error}).") from error
    return write_atomically(path, strict_json.dumps(whole))


def read(path: str | os.PathLike[str], *, check_digest: bool = True, quiet: bool = False) -> PlanFields:
    """Read a plan file; warn of one that was written before plans had a digest.

    Args:
        path: The file.
        check_digest: Whether one that was changed since it was written is refused.
        quiet: Whether not to warn.

    Raises:
        PlanError: The file is missing, truncated, damaged, changed, not a plan, or of a newer schema.
    """
    path = Path(path)
    content = _content(path)
    version, has_digest = content["schema_version"], signed_json.DIGEST in content
    if check_digest and has_digest and not signed_json.fits(content):
        raise PlanError(
            f"{path} is not as it was written: its digest does not fit. If it was damaged, copy or make it again. If you "
            f"changed it on purpose, run `modes-fx plan sign {path}`."
        )
    if version > SCHEMA_VERSION:
        raise PlanError(f"{path} has schema version {version}, this modes-fx reads up to {SCHEMA_VERSION}. Upgrade modes-fx.")
    if check_digest and has_digest != (version >= 3):
        raise PlanError(f"{path} is not a whole skip plan: plans have a digest from schema version 3 on. Make it again.")
    try:
        fields = _fields({**_NEW_IN_2, **content} if version == 1 else content)
    except ValueError as error:
        raise PlanError(f"{path} is not a whole skip plan ({error}). Make it again.") from error
    if check_digest and not has_digest and not quiet:
        logger.warning("%s has no digest that would tell damage; `modes-fx plan sign %s` adds it", path, path)
    return fields


def _content(path: Path) -> dict[str, Any]:
    content = signed_json.load(path, "plan", PlanError, "Make one with modes_fx.calib.search().")
    if isinstance(content, dict) and type(content.get("schema_version")) is int and content["schema_version"] > 0:
        return content
    raise PlanError(f"{path} is not a skip plan: it has no schema_version.")


def _fields(content: Mapping[str, Any]) -> PlanFields:
    """Return content as fields, with infinities and NaN as numbers.

    Raises:
        ValueError: It has others, or of other types; says where.
    """
    numbers = {name: strict_json.numbers(content[name]) for name in _NUMBERS if name in content}
    fields = msgspec.convert({**content, **numbers}, PlanFields)
    msgspec.convert(fields.model, ModelFields)
    _check_table(fields.tables)
    return fields


def _check_table(table: Any) -> None:
    if isinstance(table, (list, tuple)):
        for item in table:
            _check_table(item)
    elif table is not None and (isinstance(table, bool) or not isinstance(table, (int, float))):
        raise ValueError(f"a table holds {table!r}, expected numbers")
