"""The published figures of MoDES (arXiv 2511.15690), and the tasks of lmms-eval that stand for its thirteen benchmarks.

Scores are in the paper's units: per cent, but for MME (the sum of perception and cognition) and COCO (CIDEr x 100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One column of the paper's tables.

    Attributes:
        name: As the paper writes it.
        task: Of lmms-eval; a task or a group, whose tasks count alike.
        metrics: Of that task; their sum is the score.
        scale: From lmms-eval's units to the paper's.
        needs: Modules that scoring imports, beside what lmms-eval needs anyway.
        judged: Whether a language model behind an API rates the answers.
        uploads: Whether the answers go to the benchmark's own server, which scores them.
    """

    name: str
    task: str
    metrics: tuple[str, ...]
    scale: float = 100
    needs: tuple[str, ...] = ()
    judged: bool = False
    uploads: bool = False


BENCHMARKS = (
    Benchmark("TextVQA", "textvqa_val", ("exact_match",)),
    Benchmark("ChartQA", "chartqa", ("relaxed_overall",)),
    Benchmark("MMStar", "mmstar", ("average",)),
    Benchmark("MMBench", "mmbench_en_dev", ("gpt_eval_score",), scale=1, judged=True),
    Benchmark("MMVet", "mmvet", ("gpt_eval_score",), scale=1, needs=("openai",), judged=True),
    Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score"), scale=1),
    Benchmark("RealWorldQA", "realworldqa", ("exact_match",)),
    Benchmark("COCO", "coco2017_cap_val", ("coco_CIDEr",), needs=("pycocoevalcap", "pycocotools")),
    Benchmark("MVBench", "mvbench", ("mvbench_accuracy",), scale=1),
    Benchmark("EgoSchema", "egoschema", ("submission",), scale=1, uploads=True),
    Benchmark("VideoMME", "videomme", ("videomme_perception_score",), scale=1),
    Benchmark("LongVideoBench", "longvideobench_val_v", ("lvb_acc",)),
    Benchmark("VideoMMMU", "video_mmmu", ("mmmu_acc",)),
)

DEMO = Benchmark("demo", "modes_fx_demo", ("exact_match",))
"""The embedded model's own questions, which need no network; no column of the paper."""

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Published:
    """What the paper says of one model.

    Attributes:
        weights: Id on the Hugging Face hub.
        table: Where the paper has these figures.
        default: Scores of the unskipped model.
        skipped: Scores of MoDES by skip ratio.
        retained: The paper's own means of the scores retained, in per cent, by skip ratio.
        trust_remote_code: Whether the model's code comes with the weights.
        model_args: Further arguments of ``--model modes_fx``.
    """

    weights: str
    table: str
    default: Scores
    skipped: Mapping[float, Scores]
    retained: Mapping[float, float]
    trust_remote_code: bool = False
    model_args: str = ""


def _scores(*values: float) -> Scores:
    return dict(zip((benchmark.name for benchmark in BENCHMARKS), values, strict=True))


MODELS = {
    "kimi-vl-a3b": Published(
        "moonshotai/Kimi-VL-A3B-Instruct",
        "Table 1",
        _scores(88.70, 89.48, 49.89, 83.16, 66.33, 2207, 65.36, 86.70, 61.80, 78.18, 66.59, 63.13, 49.33),
        {
            1 / 2: _scores(88.18, 89.08, 49.65, 83.16, 65.09, 2203, 65.62, 88.23, 61.95, 78.41, 67.19, 62.83, 49.00),
            2 / 3: _scores(85.57, 88.24, 49.25, 82.73, 60.78, 2204, 64.58, 85.37, 61.65, 77.98, 66.52, 62.90, 48.78),
            5 / 6: _scores(82.38, 84.20, 46.68, 81.44, 60.46, 2162, 64.84, 81.33, 61.30, 76.98, 65.48, 62.60, 47.11),
        },
        {1 / 2: 99.91, 2 / 3: 98.46, 5 / 6: 96.25},
        trust_remote_code=True,
    ),
    "qwen3-vl-30b-a3b": Published(
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "Table I",
        _scores(83.41, 85.08, 59.67, 86.60, 69.68, 2500, 66.80, 80.37, 64.67, 62.45, 54.89, 55.42, 47.11),
        {
            5 / 8: _scores(81.82, 82.48, 58.61, 86.17, 69.95, 2493, 63.92, 76.55, 64.42, 62.39, 55.15, 55.50, 49.89),
            3 / 4: _scores(81.65, 82.44, 58.78, 86.25, 67.61, 2469, 64.71, 75.73, 64.45, 62.53, 54.81, 55.57, 51.22),
            7 / 8: _scores(80.97, 78.84, 58.18, 85.57, 67.75, 2403, 64.58, 74.66, 62.98, 62.04, 55.26, 55.50, 46.56),
        },
        {5 / 8: 99.22, 3 / 4: 99.11, 7 / 8: 97.33},
        model_args="max_pixels=1605632",
    ),
    "internvl-3.5-30b": Published(
        "OpenGVLab/InternVL3_5-30B-A3B-HF",
        "Table II",
        _scores(85.76, 84.08, 62.49, 83.81, 69.93, 2312, 64.77, 69.30, 68.92, 60.49, 58.07, 57.64, 45.11),
        {
            5 / 8: _scores(84.27, 83.15, 62.06, 81.46, 68.41, 2289, 63.10, 68.22, 68.64, 60.15, 57.76, 56.12, 43.84),
            3 / 4: _scores(82.13, 82.54, 61.46, 81.88, 67.92, 2258, 62.48, 67.89, 68.83, 60.32, 57.54, 55.85, 44.16),
            7 / 8: _scores(80.58, 82.00, 61.20, 81.67, 67.80, 2222, 61.73, 65.16, 68.65, 60.79, 57.63, 54.49, 44.33),
        },
        {5 / 8: 98.42, 3 / 4: 97.90, 7 / 8: 97.03},
    ),
}  # fmt: skip


def retained(scores: Scores, default: Scores) -> float:
    """Return the mean over benchmarks of the share of the unskipped model's score that is kept, in per cent."""
    return 100 * sum(scores[name] / default[name] for name in scores) / len(scores)
