"""The file between ``modes-fx calibrate`` and ``modes-fx search``: importance, and the model and data it was measured on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modes_fx.calib.importance import Importance
from modes_fx.calib.trials import versions
from modes_fx.errors import CalibrationError
from modes_fx.files import importance_fields, signed_json, strict_json
from modes_fx.files.writing import write_atomically
from modes_fx.models.layers import find_moe_layers
from modes_fx.plan import config_hash, describe_model


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

        content = signed_json.signed({"importance_version": importance_fields.VERSION, **asdict(self)})
        return processes.from_main(lambda: write_atomically(path, strict_json.dumps(content)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImportanceFile:
        """Read a file; warn of one that was written before importances had a digest.

        Raises:
            CalibrationError: It is missing, truncated, damaged, changed or something else.
        """
        read = importance_fields.read(path)
        found = read.importance
        try:
            importance = Importance(
                found.alpha, found.kl, found.mode, found.answer_tokens, found.method, found.forwards, found.seconds
            )
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error} {importance_fields.ADVICE}") from error
        return cls(importance, read.layers, read.model, read.data_hash, read.versions)

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
