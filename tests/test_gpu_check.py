"""The check that is for a GPU: what becomes of its parts' lines, whatever happens to a part; nothing is timed."""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_parts import OURS, TINY, Timed, few_pairs

ALL = [line.what for part in gpu_check.LIMITS for line in gpu_check.open_lines(part)]


def generate(*_: Any) -> Iterator[tuple[str, Timed]]:
    """One stock setting does not run, nor do ours at 50%."""
    failed = {("stock, static cache compiled", 0.0): "RuntimeError: stock's", (OURS, 0.5): "RuntimeError: ours"}
    for what in gpu_check.GOALS["generate"]:
        yield (
            what,
            ({("stock grouped_mm", 0.0): [4.0, 4.0, 8.0], (OURS, 0.0): [4.0, 8.0, 4.0], (OURS, 0.88): [2.0] * 3}, failed),
        )


def block(*_: Any) -> Iterator[tuple[str, Timed]]:
    """The second of two measurements does not come."""
    what = next(iter(gpu_check.GOALS["block"]))
    yield what, ({("stock a", 0.0): [9.0], ("stock b", 0.0): [4.0], **{(OURS, skip): [2.0] for skip in (0.0, 0.5, 0.88)}}, {})
    raise RuntimeError("out of memory\nand more")


def ended(command: Sequence[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
    """End as the process would; two of them are stopped, or killed before they write."""
    if "pytest" in command:
        return subprocess.CompletedProcess(command, 0)
    part = command[command.index("--parts") + 1]
    if part == "decode":
        raise subprocess.TimeoutExpired(command, timeout)
    if part == "prefill":
        return subprocess.CompletedProcess(command, -9)
    try:
        gpu_check.measure(part, TINY, torch.device("cpu"), Path(command[command.index("--json") + 1]))
    except RuntimeError:
        return subprocess.CompletedProcess(command, 1)
    return subprocess.CompletedProcess(command, 0)


def test_every_line_is_in_table_and_file_whatever_happens_to_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setattr(gpu_check, "PARTS", {"generate": generate, "block": block, "sizes": sizes, "calibration": calibration})
    monkeypatch.setattr(gpu_check, "be_quiet", lambda: None)
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--tiny", "--json", str(tmp_path / "check.json")])
    assert end.value.code == 1
    facts = json.loads((tmp_path / "check.json").read_text())
    lines = {(line["what"], line["skipped"]): line for line in facts["lines"]}
    assert [line["what"] for line in facts["lines"]] == ALL
    assert facts["tiny"]
    static, graph, whole = "8 layers, generate, static cache, decode", *gpu_check.GOALS["block"]
    assert [lines[static, skip]["ratio"] for skip in (0.0, 0.5, 0.88)] == [1.0, None, 0.5]
    assert [lines[static, skip]["met"] for skip in (0.0, 0.5, 0.88)] == [True, False, True]
    assert "ours" in lines[static, 0.5]["note"]
    assert lines[static, 0.0]["note"] == "stock, static cache compiled: RuntimeError: stock's"
    assert (lines[graph, 0.5]["ratio"], lines[graph, 0.5]["met"]) == (0.5, False)  # of the fastest, and above its goal
    assert lines[whole, 0.5]["note"] == "RuntimeError: out of memory"
    assert lines["48 layers, decode, batch 1, graph", 0.0]["note"] == f"stopped after {gpu_check.LIMITS['decode']} s"
    assert lines["48 layers, prefill 8192", 0.75]["note"] == "ended with status -9"
    assert lines["pytest -m cuda", None]["met"]
    shown = capsys.readouterr().out
    assert all(what in shown for what in ALL)
    assert "no: RuntimeError: out of memory" in shown


def test_parts_that_no_time_is_left_for_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def slow(command: Sequence[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        limits.append(timeout)
        time.sleep(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    monkeypatch.setattr(gpu_check, "LIMITS", {"block": 0.02, "decode": 9.0, "prefill": 9.0})
    file = tmp_path / "check.json"
    with pytest.raises(SystemExit):
        gpu_check.main(["--tiny", "--parts", "block", "decode", "prefill", "--seconds", "0.05", "--json", str(file)])
    assert limits[0] == 0.02
    assert limits[1] <= 0.03
    notes = {line["what"]: line["note"] for line in json.loads(file.read_text())["lines"]}
    assert "stopped" in notes["48 layers, decode, batch 1, graph"]
    assert "--parts prefill" in notes["48 layers, prefill 8192"]


def sizes(*_: Any) -> Iterator[tuple[str, Timed]]:
    for tokens, ms in ((4, 1.0), (8, 2.0), (16, 3.0), (32, 5.0), (64, 3.0)):
        yield few_pairs(tokens), ({(OURS, 0.5): [ms], ("sorted", 0.5): [4.0]}, {})


def calibration(*_: Any) -> Iterator[tuple[str, Timed]]:
    yield "demo, calibrate, seconds", ({(OURS, None): [4000.0], ("a second", 0.0): [1000.0]}, {})
    yield "demo, search, seconds", ({(OURS, None): [12000.0], ("a second", 0.0): [1000.0]}, {})
    yield "demo, search, layers in CUDA graphs, seconds", ({}, {(OURS, None): "RuntimeError: no graph"})


def test_what_to_set_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setattr(gpu_check, "PARTS", {"sizes": sizes, "calibration": calibration})
    monkeypatch.setattr(gpu_check, "be_quiet", lambda: None)
    with pytest.raises(SystemExit):
        gpu_check.main(["--tiny", "--parts", "sizes", "calibration", "--json", str(tmp_path / "check.json")])
    lines = {line["what"]: line for line in json.loads((tmp_path / "check.json").read_text())["lines"]}
    assert [lines[few_pairs(tokens)]["ratio"] for tokens in (4, 32)] == [0.25, 1.25]
    seconds = [
        (lines[f"demo, {job}, seconds"]["ratio"], lines[f"demo, {job}, seconds"]["met"]) for job in ("calibrate", "search")
    ]
    assert seconds == [(4.0, True), (12.0, False)]
    assert "no graph" in lines["demo, search, layers in CUDA graphs, seconds"]["note"]
    assert "up to 16 tokens: PAIRS_AN_EXPERT = 1 in" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "no device 'cuda' here; there is: cpu" in capsys.readouterr().err
