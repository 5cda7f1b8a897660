"""What the benchmark is asked to measure, looked at before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from modes_fx.errors import ModesFxError
from modes_fx.measure.bench.presets import check_preset

PARTS = ("block", "layers", "growth", "overhead")
Skew = Literal["uniform", "zipf"]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        preset: Shape of the layers, one of ``presets.PRESETS``.
        parts: Which of ``PARTS``.
        tokens: Token counts of the block.
        skips: Skip ratios of the block.
        threads: Numbers of threads of the block, all else runs on the last of them; () is torch's own.
        layers: Decoder layers.
        prompt: Tokens of the layers' prefill.
        cache: Tokens in the cache of a decode step.
        growth_to: Most tokens of the growth.
        skew: How unevenly routers choose.
        rounds: Timed rounds; decode steps are timed three times as often.
        limit_s: Seconds after which a token count gets no further round, once it has had three.
        device: Where; see ``device.choose_device``.

    Raises:
        ModesFxError: What cannot be measured, or is not known.
    """

    preset: str = "qwen3-vl-30b-a3b"
    parts: Sequence[str] = ("block",)
    tokens: Sequence[int] = (1, 64, 512)
    skips: Sequence[float] = (0.0, 0.5, 0.88)
    threads: Sequence[int] = ()
    layers: int = 2
    prompt: int = 2048
    cache: int = 1024
    growth_to: int = 8192
    skew: Skew = "uniform"
    rounds: int = 7
    limit_s: float = 40.0
    device: str | None = None

    def __post_init__(self) -> None:
        check_preset(self.preset)
        if unknown := set(self.parts) - set(PARTS):
            raise ModesFxError(f"Unknown part {sorted(unknown)[0]!r} of the benchmark; known: {', '.join(PARTS)}.")
        if self.skew not in get_args(Skew):
            raise ModesFxError(f"Unknown skew {self.skew!r}; known: {', '.join(get_args(Skew))}.")
        if any(not 0 <= skip < 1 for skip in self.skips):
            raise ModesFxError(f"Skip ratios are in [0, 1), got {', '.join(map(str, self.skips))}.")
        if any(count < 1 for count in (*self.tokens, *self.threads, self.rounds)):
            raise ModesFxError("Numbers of tokens, threads and rounds are 1 or more.")


def check_plot(options: Options) -> None:
    """See that what is to be measured can be drawn.

    Raises:
        ModesFxError: Matplotlib is not installed, or there will be nothing to draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModesFxError("Plots need matplotlib: pip install 'modes-fx[viz]'.")
    if not {"block", "growth"} & set(options.parts):
        raise ModesFxError("A plot shows the parts block and growth, and neither is to be measured. Add one to --parts.")
