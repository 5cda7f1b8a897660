"""Resumed forwards: the same figures as whole ones, from less work, whatever the family; and a way out where that fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import modes_fx
from modes_fx.calib import layer_importance
from modes_fx.calib.resume import Tape
from tests import tiny
from tests.calib.conftest import Batch, with_answers
from tests.harness import model_state

pytestmark = pytest.mark.usefixtures("without_inductor")


def deep(family: str = "qwen3_vl_moe", layers: int = 5, **changes: Any) -> nn.Module:
    """A tiny model with more layers than usual."""
    return roughened(tiny.FAMILIES[family](num_hidden_layers=layers, **changes))


def roughened(model: nn.Module) -> nn.Module:
    """Give a random model routed outputs that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def gemma4(shared_kv: int) -> nn.Module:
    """No MoE block; the last layers can take keys and values of earlier ones from a dictionary."""
    config = transformers.Gemma4TextConfig(
        **{**tiny._COMMON, "num_hidden_layers": 4},
        head_dim=16,
        global_head_dim=16,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        num_kv_shared_layers=shared_kv,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return roughened(transformers.Gemma4ForCausalLM(config))


def text_answers(rows: int = 2) -> Batch:
    ids = tiny.text_batch(rows, 9)["input_ids"]
    return {"input_ids": ids, "labels": torch.where(torch.arange(9) < 5, -100, ids)}


def kls(model: nn.Module, batches: list[Batch], mode: str, expected_method: str = "resumed") -> tuple[Any, Any]:
    """Return both methods' importances, after checking which one was really used; the model stays optimised."""
    if getattr(model, "_modes_fx", None) is None:
        modes_fx.optimize(model)
    whole = layer_importance(model, batches, mode, method="naive")
    resumed = layer_importance(model, batches, mode)
    assert (whole.method, resumed.method) == ("naive", expected_method)
    return whole, resumed


def assert_same(whole: Any, resumed: Any) -> None:
    torch.testing.assert_close(torch.tensor(resumed.kl), torch.tensor(whole.kl), rtol=1e-6, atol=1e-9)
    assert resumed.answer_tokens == whole.answer_tokens


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe", "deepseek_v3", "gpt_oss"])
def test_every_family_gives_the_figures_of_whole_forwards(family: str) -> None:
    batches = [with_answers(1)] if family == "qwen3_vl_moe" else [text_answers()]
    whole, resumed = kls(tiny.make(family), batches, "reference")
    assert_same(whole, resumed)
    assert all(text > 0 for text, _ in resumed.kl)


def test_a_vision_language_model_costs_half(batches: list[Batch]) -> None:
    whole, resumed = kls(deep(), [*batches, with_answers(3), with_answers(4)], "reference")
    assert_same(whole, resumed)
    assert whole.forwards == 11.0
    assert resumed.forwards == 5.0 + 7 / 20  # of 5 layers, 5 and 2 x (4 + 3 + 2 + 1) a batch; 2 + 5 to compare, on one of 4


def test_paper_mode_is_resumed_too(model: nn.Module, batches: list[Batch]) -> None:
    assert_same(*kls(model, batches, "paper"))


@pytest.mark.parametrize(("region", "saved"), [("layer", True), ("model", False)])
def test_other_regions_are_resumed_at_their_start(region: str, saved: bool, batches: list[Batch]) -> None:
    model = modes_fx.optimize(deep(layers=2), region=region)
    whole, resumed = kls(model, [*batches, with_answers(3), with_answers(4)], "reference")
    assert_same(whole, resumed)
    assert (resumed.forwards < whole.forwards) == saved


def test_the_vision_tower_runs_once_a_batch(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = deep(), []
    tower = model.model.visual
    forward: Callable[..., Any] = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    layer_importance(model, batches)
    assert len(calls) == len(batches) + 1  # and once in the whole forward that a resumed one is compared with


def test_experts_without_a_block_are_resumed_too() -> None:
    whole, resumed = kls(gemma4(shared_kv=0), [text_answers()], "reference")
    assert_same(whole, resumed)
    assert resumed.forwards < whole.forwards


def test_state_that_travels_outside_of_outputs_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    whole, resumed = kls(gemma4(shared_kv=2), [text_answers()], "reference", expected_method="naive")
    assert_same(whole, resumed)
    assert resumed.forwards > whole.forwards  # the attempt is not hidden
    assert "Gemma4ForCausalLM is calibrated naively" in caplog.text
    assert "KeyError" in caplog.text


def test_a_resumed_forward_that_gives_other_logits_is_noticed(
    batches: list[Batch], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(layers=3)
    attention = model.model.language_model.layers[0].self_attn
    stack = model.model.language_model.layers[2]
    shared: dict[str, torch.Tensor] = {}
    first, last = attention.forward, stack.forward

    def writes(*args: Any, **kwargs: Any) -> Any:
        output = first(*args, **kwargs)
        shared["value"] = shared.get("value", 0) + output[0].mean()  # not what it returns, but what a later layer reads
        return output

    monkeypatch.setattr(attention, "forward", writes)
    monkeypatch.setattr(stack, "forward", lambda hidden, **kwargs: last(hidden + shared.pop("value", 1.0), **kwargs))
    importance = layer_importance(model, batches[:1])
    assert importance.method == "naive"
    assert "logits were off by" in caplog.text


def test_stand_ins_leave_no_trace_even_after_a_failure(batches: list[Batch]) -> None:
    model = modes_fx.optimize(deep(layers=2))
    before = model_state(model)
    layer_importance(model, batches)
    with pytest.raises(RuntimeError, match="stop"), Tape(model) as tape, tape.recording():
        raise RuntimeError("stop")
    assert model_state(model) == before


def test_what_the_caller_writes_into_an_output_does_not_reach_the_tape(batches: list[Batch]) -> None:
    model = modes_fx.optimize(deep(layers=2))
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    layer = model.model.language_model.layers[0]
    with torch.no_grad(), Tape(model) as tape:
        with tape.recording():
            recorded = model(**inputs, use_cache=False).logits
        with tape.resumed(1, ()):
            layer(None).fill_(torch.nan)
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, recorded, rtol=0, atol=0)
