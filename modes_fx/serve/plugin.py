"""Where vLLM calls in: the entry point ``vllm.general_plugins``, in each of its processes, before there is a config."""

from __future__ import annotations

import functools
from typing import Any

KEY = "modes_fx"


def register() -> None:
    """Look for settings when a server's config is made and when a worker has loaded its model; again does nothing more."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        return
    create = EngineArgs.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        if asked(config):
            from modes_fx.serve.metrics import report_with_log
            from modes_fx.serve.settings import read_settings
            from modes_fx.serve.worker import check_config

            check_config(read_settings(config.additional_config), config)
            report_with_log()
        return config

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        self.worker.load_model(*args, **kwargs)
        if asked(self.vllm_config):
            from modes_fx.serve.settings import read_settings
            from modes_fx.serve.worker import install

            install(self.worker, read_settings(self.vllm_config.additional_config))

    EngineArgs.create_engine_config = create_engine_config
    WorkerWrapperBase.load_model = load_model


def asked(config: Any) -> bool:
    """Say whether there are settings; until then nothing but this file is imported."""
    return isinstance(config.additional_config, dict) and KEY in config.additional_config
