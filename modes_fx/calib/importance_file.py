"""The file between ``modes-fx calibrate`` and ``modes-fx search``: importance, and the model and data it was measured on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from modes_fx.calib.importance import Importance
from modes_fx.calib.trials import versions
from modes_fx.errors import CalibrationError
from modes_fx.files import write_atomically
from modes_fx.layers import find_moe_layers
from modes_fx.plan import config_hash, describe_model

_VERSION = 1


@dataclass(frozen=True)
class ImportanceFile:
    """What the file holds.

    Attributes:
        importance: The importance.
        layers: Paths of the experts modules that its rows belong to.
        model: What ``describe_model`` says of the model.
        data_hash: Of the data it was measured on.
        versions: Those it was measured with.
    """

    importance: Importance
    layers: tuple[str, ...]
    model: Mapping[str, Any]
    data_hash: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, importance: Importance, data_hash: str) -> ImportanceFile:
        """Describe an importance that was measured just now."""
        layers = tuple(layer.name for layer in find_moe_layers(model))
        return cls(importance, layers, describe_model(getattr(model, "config", None)), data_hash, versions())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, as JSON, on the main process; an interrupted write leaves an older one as it was."""
        from modes_fx.calib import processes

        content = json.dumps({"importance_version": _VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"
        return processes.from_main(lambda: write_atomically(path, content))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImportanceFile:
        """Read a file.

        Raises:
            CalibrationError: It is missing, truncated or something else.
        """
        path = Path(path)
        advice = "Make one with `modes-fx calibrate MODEL --data DATA --out FILE`."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CalibrationError(f"Cannot read the importance {path}: {error.strerror}. {advice}") from error
        except ValueError as error:
            raise CalibrationError(f"{path} is not a whole JSON file ({error}). {advice}") from error
        if not isinstance(content, dict) or content.get("importance_version") != _VERSION:
            raise CalibrationError(f"{path} is not an importance of version {_VERSION}. {advice}")
        try:
            values = {item.name: content["importance"][item.name] for item in fields(Importance)}
            for name in ("alpha", "kl"):
                values[name] = tuple((float(text), float(vision)) for text, vision in values[name])
            rest = {item.name: content[item.name] for item in fields(cls) if item.name not in ("importance", "layers")}
            return cls(Importance(**values), tuple(content["layers"]), **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is not a whole importance ({type(error).__name__}: {error}). {advice}") from error

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the importance was not measured on.

        Raises:
            CalibrationError: The configs differ.
        """
        config = getattr(model, "config", None)
        if self.model.get("config_hash") != config_hash(config):
            raise CalibrationError(
                f"The importance was measured on another model: {self.model.get('model_type')} with config "
                f"{self.model.get('config_hash')}, not {getattr(config, 'model_type', '?')} with {config_hash(config)}. "
                "Run modes-fx calibrate on this one."
            )
