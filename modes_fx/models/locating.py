"""Where a model's name leads, found out before anything heavy is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from modes_fx.errors import ModelError
from modes_fx.files import signed_json

DEMO = "demo"
CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"


def locate(source: str | os.PathLike[str]) -> str:
    """Return the path of a model's folder or ``config.json``, or the id of a model on the Hugging Face hub.

    Args:
        source: Any of these, or ``demo``, the embedded model; ``~`` is the home folder.

    Raises:
        ModelError: There is no such file or folder, or its config is no JSON object.
    """
    path = CHECKPOINT if source == DEMO else Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json. Pass a folder written by save_pretrained, or a config.json.")
    if path.exists():
        _check_config(path / "config.json" if path.is_dir() else path)
        return str(path)
    name = os.fspath(source)
    if isinstance(source, Path) or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith(".json"):
        raise ModelError(f"There is no file or folder {path}. Pass a model folder, a config.json, or the id of a hub model.")
    return name


def _check_config(path: Path) -> None:
    try:
        content = json.loads(signed_json.read_bytes(path))  # which takes the infinities that some families' configs hold
        signed_json.check_depth(content)
    except OSError as error:
        raise ModelError(f"Cannot read the config {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"Cannot read the config {path}: it is no whole JSON file ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"Cannot read the config {path}: it holds no JSON object. Pass a model folder or its config.json.")
