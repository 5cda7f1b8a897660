"""The wrapper that lmms-eval runs as ``--model modes_fx``, and the embedded model's questions as one of its tasks.

lmms-eval finds the wrapper through an entry point that it loads while it is being imported itself, so this module imports
nothing of it.
"""

from pathlib import Path
from typing import Any

__all__ = ["TASKS", "manifests"]

TASKS = Path(__file__).with_name("tasks")
"""Folder for lmms-eval's ``--include_path``; it holds the task ``modes_fx_demo``."""


def manifests() -> list[Any]:
    """Return the models to register; the payload of the ``lmms_eval.models`` entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="modes_fx", chat_class_path="modes_fx.lmms.model.ModesFx")]
