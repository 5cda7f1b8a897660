"""Another target over HTTP: ``POST /modes_fx/target`` with ``{"target": 0.5, "decode_target": null}``.

vLLM attaches routes of plug-ins only where they are named: start the server with ``VLLM_PLUGINS=modes_fx``.
"""

from __future__ import annotations

from typing import Any

from modes_fx.errors import PlanError
from modes_fx.serve.plugin import asked
from modes_fx.serve.settings import checked_target, read_settings

ROUTE = "/modes_fx/target"


class TargetEndpoint:
    """The route, as vLLM's ``EndpointPlugin`` wants it."""

    name = "modes_fx"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None

    def attach_router(self, app: Any) -> None:
        """Add the route to a server."""
        app.add_api_route(ROUTE, self.set_target, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Take the engine."""
        self._engine = engine_client

    async def set_target(self, given: dict[str, Any]) -> dict[str, Any]:
        """Put other thresholds in force, on all workers; what was in force stays where the plan has no such target."""
        from fastapi import HTTPException

        config = self._engine.vllm_config
        if not asked(config):
            raise HTTPException(404, "This server was started without modes_fx in --additional-config.")
        try:
            targets = checked_target(given)
            read_settings(config.additional_config).with_targets(**targets)
        except PlanError as error:
            raise HTTPException(400, str(error)) from error
        await self._engine.collective_rpc("modes_fx_set_target", kwargs=targets)
        return targets
