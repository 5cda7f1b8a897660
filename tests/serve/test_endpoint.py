"""The route that changes the target; without vLLM, on an engine that notes what it is told."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modes_fx.serve.endpoint import TargetEndpoint
from tests.serve.test_settings import two_layers

fastapi = pytest.importorskip("fastapi", reason="vLLM brings it")


class Engine:
    def __init__(self, additional_config: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)
        self.told: list[Any] = []

    async def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.told.append((method, kwargs))


def ask(engine: Engine, given: dict[str, Any]) -> Any:
    endpoint = TargetEndpoint()

    async def run() -> Any:
        await endpoint.init_state(engine, None, None)
        return await endpoint.set_target(given)

    return asyncio.run(run())


def test_all_workers_are_told(tmp_path: Path) -> None:
    engine = Engine({"modes_fx": {"plan": str(two_layers().save(tmp_path / "plan.json"))}})
    targets = {"target": 0.5, "decode_target": None}
    assert ask(engine, {"target": 0.5}) == targets
    assert engine.told == [("modes_fx_set_target", targets)]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"target": 0.6}, "no target 0.6"), ({"taget": 0.5}, "Unknown field 'taget'"), ({"target": "1"}, "got '1'")],
)
def test_what_the_plan_lacks_is_refused_before_anybody_is_told(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    engine = Engine({"modes_fx": {"plan": str(two_layers().save(tmp_path / "plan.json"))}})
    with pytest.raises(fastapi.HTTPException) as raised:
        ask(engine, given)
    assert raised.value.status_code == 400
    assert said in raised.value.detail
    assert engine.told == []


def test_a_server_without_settings() -> None:
    with pytest.raises(fastapi.HTTPException, match="404"):
        ask(Engine({}), {"target": 0.5})
