"""Reports and statistics."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modes_fx.errors import ModesFxError
from modes_fx.graph.in_force import InForce
from modes_fx.graph.running import Forward
from modes_fx.passes.reasons import REASONS
from modes_fx.policies import RULES
from modes_fx.report import Report, SiteReport, SkipStats

DONE = SiteReport("layers.0.experts", "rewritten", form="grouped_mm", dispatch="compact", top_k=2, num_experts=8)
REFUSED = SiteReport("layers.1.experts", "rejected", "WEIGHTS_HAVE_OTHER_USERS", "they do more")


@pytest.fixture
def report() -> Report:
    return Report("TinyModel", "moe", (DONE, REFUSED, dataclasses.replace(REFUSED, code="EXPERT_PARALLEL")))


def counted(stats: SkipStats, layer: int, ids: list[list[int]], kept: list[int], phase: str = "prefill") -> None:
    """Count a dispatch of two experts a token; ``kept`` are pairs."""
    layers = [SimpleNamespace(name=name) for name in stats.layers]
    runtime: Any = SimpleNamespace(layers=layers, stats=stats)
    plan = InForce.of(RULES["threshold"], len(layers), None, (), torch.device("cpu"))
    classes = torch.tensor(ids)
    keep = torch.zeros(classes.numel() * 2, dtype=torch.bool)
    keep[kept] = True
    forward = Forward(runtime, plan, classes, phase)
    experts = torch.arange(keep.numel()).view(-1, 2) % 4
    forward.note(layer, classes.flatten(), keep.view(-1, 2), experts)
    forward.end()


@pytest.fixture
def stats() -> SkipStats:
    stats = SkipStats(("first", "second")).start()
    counted(stats, 0, [[0, 1, 1], [2, 2, 0]], [10, 3, 2, 1])  # tokens: text, vision, vision, padding, padding, text
    counted(stats, 1, [[0]], [], "decode")
    return stats


def test_found_is_rewritten_and_rejected(report: Report) -> None:
    assert (report.found, report.rewritten, len(report.rejected)) == (3, (DONE,), 2)


def test_reasons_are_counted_by_code(report: Report) -> None:
    assert report.reasons() == "1 x EXPERT_PARALLEL, 1 x WEIGHTS_HAVE_OTHER_USERS"
    assert Report("TinyModel", "moe", (DONE,)).reasons() == ""


def test_a_report_reads_as_a_table_with_a_row_for_each_site(report: Report) -> None:
    title, _, _, *rows = str(report).splitlines()[:-2]
    assert "TinyModel" in title
    assert "3 sites found, 1 rewritten" in title
    assert [row.split()[0] for row in rows] == [site.name for site in report.sites]
    assert rows[1].split()[-1] == "WEIGHTS_HAVE_OTHER_USERS"


def test_a_report_ends_with_what_to_do_about_each_reason(report: Report) -> None:
    *_, first, second = str(report).splitlines()
    assert first == f"WEIGHTS_HAVE_OTHER_USERS (1 of 3): they do more. {REASONS['WEIGHTS_HAVE_OTHER_USERS'].advice}"
    assert second == f"EXPERT_PARALLEL (1 of 3): they do more. {REASONS['EXPERT_PARALLEL'].advice}"


def test_distinct_experts_are_counted_by_dispatch_while_somebody_asks() -> None:
    stats = SkipStats(("first", "second"))
    with stats.experts_read() as read:
        counted(stats, 1, [[0, 0, 0, 0]], [0, 4, 1, 7])  # pair p has the expert p % 4
        with stats.experts_read() as inner:
            counted(stats, 0, [[0]], [], "decode")
    counted(stats, 0, [[0]], [0])
    assert read == [(1, "prefill", 3)]
    assert inner == [(0, "decode", 0)]


def test_pairs_are_counted_by_layer_modality_and_phase_and_padding_nowhere(stats: SkipStats) -> None:
    assert table(stats.pairs_routed) == {(0, 0, 0): 4, (0, 1, 0): 4, (1, 0, 1): 2}
    assert table(stats.pairs_kept) == {(0, 0, 0): 2, (0, 1, 0): 2}


def test_ratios_are_dropped_over_routed(stats: SkipStats) -> None:
    assert stats.skip_ratio() == pytest.approx(1 - 4 / 10)
    assert stats.skip_ratio(layer=0) == pytest.approx(0.5)
    assert stats.skip_ratio(modality="text") == pytest.approx(1 - 2 / 6)
    assert stats.skip_ratio(phase="decode") == 1.0
    assert math.isnan(stats.skip_ratio(modality="vision", phase="decode"))


def test_counts_are_copies_and_reset_clears_them(stats: SkipStats) -> None:
    stats.pairs_kept.fill_(99)
    assert int(stats.pairs_kept.sum()) == 4
    assert stats.reset() is stats
    assert int(stats.pairs_kept.sum() + stats.pairs_routed.sum()) == 0


def test_recording_is_off_until_asked_for_and_after_the_block() -> None:
    stats = SkipStats(("only",))
    assert not stats.recording
    with stats as same:
        assert same is stats
        assert stats.recording
    assert not stats.recording


def test_an_inner_block_does_not_stop_the_outer_one() -> None:
    stats = SkipStats(("only",))
    with stats:
        with stats, stats.counting():
            assert stats.recording
        assert stats.recording
    assert not stats.recording


@pytest.mark.parametrize("before", [True, False])
def test_counting_goes_back_to_what_was(before: bool) -> None:
    stats = SkipStats(("only",))
    stats.recording = before
    with stats.counting():
        assert stats.recording
    assert stats.recording is before
    with contextlib.suppress(KeyError), stats.counting():
        raise KeyError
    assert stats.recording is before


@pytest.mark.parametrize("selection", [{"modality": "audio"}, {"phase": "training"}])
def test_an_unknown_modality_or_phase_is_refused_with_the_known_ones(stats: SkipStats, selection: dict[str, str]) -> None:
    with pytest.raises(ModesFxError, match=r"text, vision|prefill, decode"):
        stats.skip_ratio(**selection)


def test_statistics_read_as_a_table_and_say_when_there_are_none(stats: SkipStats) -> None:
    assert [line.split()[0] for line in str(stats).splitlines()[-3:]] == ["first", "second", "all"]
    assert "not recording" in str(SkipStats(("only",)))
    assert "nothing routed yet" in str(SkipStats(("only",)).start())


def table(counts: Tensor) -> dict[tuple[int, ...], int]:
    return {tuple(index): int(counts[tuple(index)]) for index in counts.nonzero().tolist()}
