"""Two processes for the tests of a file, which share their start."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.sharding.judging import Found


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the two processes found in the file's ``GROUP`` of checks, by check."""
    folder = tmp_path_factory.mktemp("both")
    tiny.make("qwen3_moe").save_pretrained(folder / "qwen3_moe")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sharding.worker", request.module.GROUP]
    options: dict[str, Any] = {"cwd": Path(__file__).parents[2], "env": environment, "text": True, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, str(rank), str(folder)], **options) for rank in range(2)]
    try:
        ended = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
