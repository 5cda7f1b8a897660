"""The command line of ``examples/paper.py``, and what it refuses before any work."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paper
import pytest
from published.figures import BENCHMARKS, MODELS


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "GQA").mkdir()

    def parsed(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["paper.py", *words])
        return paper.arguments()

    return parsed


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_out_is_the_papers(name: str, parse: Any) -> None:
    options = parse(name, "--data", "GQA")
    assert (options.weights, options.targets, options.samples) == (MODELS[name].weights, [*MODELS[name].skipped], 1024)
    assert tuple(options.benchmarks) == BENCHMARKS
    assert options.out == Path("out/paper") / name


def test_tiny_is_the_embedded_model_unless_more_is_said(parse: Any) -> None:
    options = parse("qwen3-vl-30b-a3b", "--tiny", "--limit", "3")
    assert (options.weights, options.data, options.limit) == ("demo", None, 3)
    assert [benchmark.task for benchmark in options.benchmarks] == ["modes_fx_demo"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen3-vl-30b-a3b"], "pass --data"),
        (["qwen3-vl-30b-a3b", "--data", "none"], "there is no none (--data)"),
        (["kimi-vl-a3b", "--data", "GQA", "--benchmarks", "GQA"], "unknown benchmarks GQA; known: TextVQA"),
    ],
)
def test_refused_arguments(words: list[str], message: str, parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(parse: Any) -> None:
    for _ in range(2):
        paper.check_settings(parse("qwen3-vl-30b-a3b", "--tiny"))
    paper.check_settings(parse("qwen3-vl-30b-a3b", "--tiny", "--benchmarks", "MME"))  # one more is no other setting
    with pytest.raises(SystemExit, match=r"out/paper/tiny was begun with other settings"):
        paper.check_settings(parse("qwen3-vl-30b-a3b", "--tiny", "--samples", "33"))


def test_scores_that_need_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    monkeypatch.setattr(paper.importlib.util, "find_spec", lambda name: None if name == "pycocotools" else SimpleNamespace())
    with pytest.raises(SystemExit, match=r"Not installed: pycocotools\."):
        paper.check_scoring([by_name["COCO"]])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="rates the answers of MMBench and MMVet: set OPENAI_API_KEY"):
        paper.check_scoring([by_name["MMBench"], by_name["MMVet"], by_name["MME"]])
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    paper.check_scoring([by_name["MMBench"], by_name["MME"]])


def test_the_model_arguments() -> None:
    options = SimpleNamespace(model="kimi-vl-a3b", weights=MODELS["kimi-vl-a3b"].weights, max_frames=16)
    spread = paper.Placement(1, True, ("0,1",))
    assert paper.model_args(options, spread, optimize=False) == (
        "pretrained=moonshotai/Kimi-VL-A3B-Instruct,max_frames=16,device_map=auto,trust_remote_code=True,optimize=False"
    )
