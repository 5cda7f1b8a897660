"""Two real processes over gloo against one, and a run that is killed against one that is not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modes_fx.calib import processes, search
from modes_fx.errors import CalibrationError
from tests import tiny
from tests.calib import worker


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.calib.worker", *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, text=True, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    started = [start("several", rank, 2, folder, stderr=subprocess.PIPE) for rank in range(2)]
    ended = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(ended)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds on all the data."""
    with pytest.MonkeyPatch.context() as patch:
        worker.harness.compile_with(patch, worker.harness.uncompiled)
        with worker.optimized(tiny.make()) as model:
            found = worker.measure(model, worker.WHOLE, tmp_path_factory.mktemp("one") / "journal.jsonl")
    return json.loads(json.dumps(found))


@pytest.mark.wide
@pytest.mark.parametrize("split", worker.SPLITS)
def test_two_processes_find_what_one_finds(two: list[dict[str, Any]], one: dict[str, Any], split: str) -> None:
    found = two[0]["results"][split]
    for name in ("answer_tokens", "accuracy", "routing", "data", "evaluations", "from_journal"):
        assert found[name] == one[name], name
    assert found["evaluation"] == pytest.approx(one["evaluation"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(found["kl"]), torch.tensor(one["kl"]), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(torch.tensor(found["points"]), torch.tensor(one["points"]), rtol=1e-6, atol=1e-12)


@pytest.mark.wide
def test_both_processes_hold_the_very_same_numbers(two: list[dict[str, Any]]) -> None:
    assert two[0] == two[1]
    assert two[0]["agreed"] == {"total": [1.0, 2.0], "gather": [0, 1]}


@pytest.mark.wide
def test_a_journal_spares_all_processes_every_evaluation(two: list[dict[str, Any]]) -> None:
    for found in two[0]["results"].values():
        assert found["from_journal"] == [found["evaluations"], 0]


@pytest.mark.wide
def test_what_one_process_cannot_use_is_an_error_on_both(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["refusals"].keys() == {"nothing at all", "one without labels", "journal of other data"}
        assert "at least one batch" in found["refusals"]["nothing at all"]
        assert "Batch 0 needs `labels`" in found["refusals"]["one without labels"]
        assert "belongs to another run" in found["refusals"]["journal of other data"]


def test_without_a_group_there_is_one_process() -> None:
    assert (processes.world(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.total(torch.tensor([1, 2])).tolist() == [1, 2]
    assert processes.gather("a") == ["a"]
    assert processes.from_main(lambda: "b") == "b"
    with pytest.raises(CalibrationError, match="why"):
        processes.together(lambda: (_ for _ in ()).throw(CalibrationError("why")))


@pytest.mark.wide
@pytest.mark.usefixtures("without_inductor")
def test_a_search_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    process = start("killed_search", journal, 5)
    assert process.wait(timeout=240) == -signal.SIGKILL
    journal.write_bytes(journal.read_bytes() + b'{"key": ["trial", 0.5')  # as if cut off in the middle of a line

    batches = [worker.batch(0)]
    resumed = search(tiny.make(), batches, worker.IMPORTANCE, worker.TARGETS, journal=journal, **worker.SEARCH)
    whole = search(tiny.make(), batches, worker.IMPORTANCE, worker.TARGETS, **worker.SEARCH)
    facts, wanted = resumed.provenance["search"], whole.provenance["search"]
    assert facts["from_journal"] == 5 < facts["evaluations"] == wanted["evaluations"]
    assert resumed.points == whole.points
    assert len(journal.read_text().splitlines()) == 1 + 2 + wanted["evaluations"]  # the header, a grid for each gamma
