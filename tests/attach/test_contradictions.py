"""Arguments of a forward that contradict each other: named by the watch, before stock fails deep inside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.errors import ModalityError
from modes_fx.modality import check_shapes
from tests import harness, tiny

Inputs = dict[str, Tensor]


def cut(name: str, entries: int = 1) -> Any:
    return lambda inputs: {**inputs, name: inputs[name][:, :-entries]}


def longer(name: str) -> Any:
    return lambda inputs: {**inputs, name: torch.cat([inputs[name], inputs[name][:, -1:]], dim=1)}


CONTRADICTIONS = {
    "types too short": (cut("mm_token_type_ids"), r"mm_token_type_ids has shape \[\d+, \d+\], but input_ids holds"),
    "types too long": (longer("mm_token_type_ids"), "mm_token_type_ids has shape"),
    "types of other rows": (
        lambda inputs: {**inputs, "mm_token_type_ids": inputs["mm_token_type_ids"][:1]},
        "mm_token_type_ids has shape",
    ),
    "tokens cut alone": (cut("input_ids", 2), "but input_ids holds"),
    "mask too short": (cut("attention_mask"), "attention_mask has shape"),
    "positions": (
        lambda inputs: {**inputs, "position_ids": torch.zeros(3, 2, 5, dtype=torch.int64)},
        r"position_ids has shape",
    ),
    "pixels alone": (lambda inputs: {**inputs, "image_grid_thw": None}, "pixel_values without image_grid_thw"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_named_with_both_shapes(optimized_vlm: nn.Module, name: str) -> None:
    change, match = CONTRADICTIONS[name]
    inputs = tiny.mixed_batch()
    with torch.no_grad(), pytest.raises(ModalityError, match=match):
        optimized_vlm(**change(inputs))
    assert torch.isfinite(harness.logits(optimized_vlm, inputs)).all()  # and the next one runs


def without_placeholders(inputs: Inputs) -> Inputs:
    return {**inputs, "input_ids": torch.where(inputs["input_ids"] == tiny.IMAGE, 5, inputs["input_ids"])}


def one_image_less(inputs: Inputs) -> Inputs:
    return {**inputs, "pixel_values": inputs["pixel_values"][16:], "image_grid_thw": inputs["image_grid_thw"][1:]}


@pytest.mark.parametrize(("change", "tokens", "features"), [(without_placeholders, 0, 12), (one_image_less, 12, 8)])
def test_pixels_for_other_placeholders_stock_refuses_with_both_numbers(
    optimized_vlm: nn.Module, change: Any, tokens: int, features: int
) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=f"tokens: {tokens}, features: {features}"):
        optimized_vlm(**change(tiny.mixed_batch()))


def test_placeholders_without_pixels_are_visual_tokens_all_the_same(optimized_vlm: nn.Module) -> None:
    inputs = {name: value for name, value in tiny.mixed_batch().items() if name in ("input_ids", "attention_mask")}
    with modes_fx.stats(optimized_vlm) as stats:
        answer = harness.logits(optimized_vlm, inputs)
    real = inputs["attention_mask"] == 1
    assert harness.relative_error(answer, harness.logits(tiny.make(), inputs), real) < 1e-5
    assert int(stats.pairs_routed[:, 1].sum()) == 2 * 12 * 3


def test_embeddings_are_named_where_there_are_no_ids() -> None:
    with pytest.raises(ModalityError, match=r"token_type_ids has shape \[1, 4\], but inputs_embeds holds 1 sequences of 3"):
        check_shapes({"inputs_embeds": torch.zeros(1, 3, 8), "token_type_ids": torch.zeros(1, 4)}, "inputs_embeds")


@pytest.mark.parametrize(
    "inputs",
    [
        {"past_key_values": object(), "attention_mask": torch.ones(2, 9), "mm_token_type_ids": torch.ones(2, 9)},
        {"attention_mask": torch.ones(2, 1, 3, 3)},
        {"attention_mask": torch.ones(2, 7)},
        {"attention_mask": {"full": torch.ones(2, 7)}},
        {"position_ids": torch.zeros(3, 1, 3)},
        {"position_ids": torch.zeros(3)},
        {"position_ids": torch.zeros(2, 1)},
        {"pixel_values": torch.zeros(1)},
        {"pixel_values": None, "image_grid_thw": torch.ones(1, 3)},
    ],
    ids=[
        "cache",
        "4-D mask",
        "longer mask",
        "masks by name",
        "three axes",
        "one row",
        "one position",
        "no sizes taken",
        "sizes alone",
    ],
)
def test_what_does_not_is_let_through(inputs: dict[str, Any]) -> None:
    check_shapes({"input_ids": torch.zeros(2, 3, dtype=torch.int64), **inputs}, "input_ids")


def test_generation_and_a_padded_batch_are_let_through(optimized_vlm: nn.Module) -> None:
    inputs = tiny.mixed_batch()
    kept: Any = optimized_vlm
    answer = kept.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape == (inputs["input_ids"].shape[0], inputs["input_ids"].shape[1] + 3)


@pytest.mark.usefixtures("fresh_dynamo", "without_inductor")
def test_it_breaks_no_graph_and_makes_no_further_ones(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm)
    graphs: list[Any] = []

    def count(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiled: Any = torch.compile(vlm, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (7, 9, 12):
            ids = torch.randint(2, 50, (2, length))
            each = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
            compiled(input_ids=ids, **each, use_cache=False)
    assert len(graphs) == 1
