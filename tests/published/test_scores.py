"""Results as lmms-eval writes them become the paper's units, and a table."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from published.figures import BENCHMARKS, DEMO, MODELS, Benchmark
from published.scores import Run, read, results_in, table

BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}
QWEN = MODELS["qwen3-vl-30b-a3b"]


def written(folder: Path, results: dict[str, Any], throughput: dict[str, float] | None = None) -> Path:
    counts = {task: {"original": 9, "effective": 9} for task, values in results.items() if "is_group" not in values}
    file = folder / "model" / "1_results.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"results": results, "n-samples": counts, "throughput": throughput}), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("benchmark", "results", "score"),
    [
        (
            BY_NAME["ChartQA"],
            {"chartqa": {"alias": "chartqa", "relaxed_overall,none": 0.5, "relaxed_overall_stderr,none": 0.1}},
            50,
        ),
        (BY_NAME["MMBench"], {"mmbench_en_dev": {"gpt_eval_score,none": 83.0}}, 83),
        (BY_NAME["MME"], {"mme": {"mme_perception_score,none": 1600.5, "mme_cognition_score,none": 600}}, 2200.5),
        (
            BY_NAME["VideoMMMU"],
            {
                "video_mmmu": {"is_group": True, "mmmu_acc,none": 0.9},
                **{f"video_mmmu_{task}": {"mmmu_acc,none": value} for task, value in (("a", 0.2), ("b", 0.3), ("c", 0.4))},
            },
            30,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Benchmark) else "",
)
def test_scores_are_in_the_papers_units(benchmark: Benchmark, results: dict[str, Any], score: float, tmp_path: Path) -> None:
    assert read(written(tmp_path, results), benchmark) == Run(pytest.approx(score), 0.0)


def test_skip_ratios_are_the_measured_ones(tmp_path: Path) -> None:
    file = written(tmp_path, {"modes_fx_demo": {"exact_match,none": 1}}, {"avg_skip_ratio": 0.51, "avg_speed": 3.0})
    assert read(file, DEMO) == Run(100, 0.51)


@pytest.mark.parametrize("value", ["N/A", [], None])
def test_a_score_that_failed_is_no_score(value: object, tmp_path: Path) -> None:
    file = written(tmp_path, {"mmvet": {"gpt_eval_score,none": value}})
    with pytest.raises(ValueError, match="has no score of MMVet"):
        read(file, BY_NAME["MMVet"])


def test_the_newest_results_count_and_none_are_none(tmp_path: Path) -> None:
    assert results_in(tmp_path) is None
    assert results_in(tmp_path / "missing") is None
    new, old = (written(tmp_path / name, {}) for name in ("new", "old"))
    os.utime(old, (0, 0))
    assert results_in(tmp_path) == new


def cells(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_table_has_theirs_beside_ours() -> None:
    chosen = [BY_NAME["TextVQA"], BY_NAME["MME"]]
    stock = {"TextVQA": Run(80, 0), "MME": Run(2400, 0)}
    ours = {3 / 4: {"TextVQA": Run(76, 0.74), "MME": Run(2400, 0.76)}, 0.8: {"TextVQA": Run(40, 0.8), "MME": Run(1200, 0.81)}}
    found = cells(table(QWEN, chosen, stock, ours))
    assert found[""] == ["paper", "stock", "paper 75%", "ours 75%", "paper 80%", "ours 80%"]
    assert found["TextVQA"] == ["83.41", "80.00", "81.65", "76.00", "-", "40.00"]
    assert found["MME"] == ["2500.00", "2400.00", "2469.00", "2400.00", "-", "1200.00"]
    kept = 100 * (81.65 / 83.41 + 2469 / 2500) / 2
    assert found["retained, %"] == ["100.00", "100.00", f"{kept:.2f}", "97.50", "-", "50.00"]
    assert found["skipped, %"] == ["-", "-", "75.0", "75.0", "-", "80.5"]


def test_nothing_is_retained_of_no_right_answer() -> None:
    text = table(QWEN, [DEMO], {"demo": Run(0, 0)}, {3 / 4: {"demo": Run(0, 0.75)}})
    assert cells(text)["retained, %"] == ["-", "-", "-", "-"]
