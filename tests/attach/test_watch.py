"""Which tokens run where they are not the language model's own: vision towers, groups of experts, decoders, dropped tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import modes_fx
from modes_fx.attach.watch import ModalityWatch
from modes_fx.errors import ModalityError, ModelError
from modes_fx.graph.running import running
from modes_fx.graph.runtime import Runtime
from modes_fx.modality import vision_token_ids
from modes_fx.models.layers import Region
from modes_fx.optimize import optimized_state
from tests import harness, tiny
from tests.families.family import Family
from tests.families.pictures import captioned, noise, patches
from tests.families.shrink import tiny_config
from tests.families.text import TEXT
from tests.families.vision import THINKER, VISION

PLAN = modes_fx.SkipPlan.uniform(text=0.25, vision=0.4)
FAMILIES = {family.name: family for family in (*TEXT, *VISION)}


@pytest.fixture(scope="module")
def optimized(request: Any) -> Iterator[tuple[Family, nn.Module]]:
    """The family that a test names, optimised with a plan."""
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        yield family, modes_fx.optimize(family.build(), PLAN)


def routed(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """Run one forward; return int64 [modality, phase] for each layer."""
    with torch.no_grad(), modes_fx.stats(model).reset() as stats:
        model(**inputs)
    return dict(zip(stats.layers, stats.pairs_routed, strict=True))


@pytest.mark.parametrize("optimized", ["dots3_note"], indirect=True)
def test_tokens_of_a_vision_tower_are_visual_whatever_their_number(optimized: tuple[Family, nn.Module]) -> None:
    family, model = optimized
    pairs = routed(model, **family.inputs())
    tower = "model.vision_tower.blocks.1.mlp.experts"
    assert pairs[tower].tolist() == [[0, 0], [32 * 3, 0]]  # two pictures of 16 patches, 4 to a token
    assert pairs["model.language_model.layers.1.mlp.experts"].tolist() == [[12 * 3, 0], [8 * 3, 0]]
    stats = modes_fx.stats(model).reset()
    with torch.no_grad(), stats:  # the tower alone, outside any forward
        model.model.get_image_features(noise(24, 48), torch.tensor([[1, 4, 6]]))
    assert stats.pairs_routed[stats.layers.index(tower)].tolist() == [[0, 0], [24 * 3, 0]]
    assert stats.pairs_kept[stats.layers.index(tower), 1, 0] < 24 * 3
    assert running() is None


@pytest.mark.usefixtures("without_inductor")
def test_a_tower_whose_attention_depends_on_data_is_no_region() -> None:
    family = FAMILIES["dots3_note"]
    model = modes_fx.optimize(family.build(), PLAN, region="layer")
    with pytest.raises(ModelError, match=r"Dots3NoteVisionBlock cannot be traced.*Use region=\"moe\""):
        routed(model, **family.inputs())


@pytest.mark.parametrize("optimized", ["ernie4_5_vl_moe"], indirect=True)
def test_each_group_of_experts_sees_the_tokens_of_its_modality(optimized: tuple[Family, nn.Module]) -> None:
    family, model = optimized
    layer = "model.language_model.layers.1.mlp"
    inputs = family.inputs()
    pairs = routed(model, **inputs)
    visual = int((inputs["moe_mm_token_type_ids"] != 0).sum())  # a picture's start and end too
    text = int(inputs["attention_mask"].sum()) - visual
    assert visual == 12
    assert pairs[f"{layer}.text_moe.experts"].tolist() == [[text * 3, 0], [0, 0]]
    assert pairs[f"{layer}.vision_moe.experts"].tolist() == [[0, 0], [visual * 3, 0]]

    # without the model's own types, all tokens go to the experts for text, and those of pictures stay visual
    del inputs["moe_mm_token_type_ids"]
    pairs = routed(model, **inputs)
    assert pairs[f"{layer}.text_moe.experts"].tolist() == [[(text + visual - 8) * 3, 0], [8 * 3, 0]]
    assert pairs[f"{layer}.vision_moe.experts"].sum() == 0


@pytest.mark.parametrize("optimized", ["ernie4_5_vl_moe"], indirect=True)
def test_suspended_experts_leave_watches_in_place(optimized: tuple[Family, nn.Module]) -> None:
    family, model = optimized
    seen = []
    experts = model.get_submodule("model.language_model.layers.1.mlp.vision_moe.experts")
    handle = experts.register_forward_pre_hook(lambda *args: seen.append(running()))
    runtime = model._modes_fx.runtime
    runtime.suspended = True
    try:
        with torch.no_grad():
            model(**family.inputs())
    finally:
        runtime.suspended = False
        handle.remove()
    assert [tokens.ids.tolist() for tokens in seen] == [[[1] * 12]]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("region", ["moe", "layer"])
def test_a_canvas_is_text_in_the_making_and_tied_layers_are_told_apart(region: Region) -> None:
    family = FAMILIES["diffusion_gemma"]
    model = modes_fx.optimize(family.build(), PLAN, region=region)
    names = "model.encoder.language_model.layers.0.experts", "model.decoder.layers.0.experts"
    encoder, decoder = (model.get_submodule(name) for name in names)
    assert encoder.gate_up_proj is decoder.gate_up_proj
    pairs = routed(model, **family.inputs())
    assert pairs[names[0]].tolist() == [[12 * 3, 0], [8 * 3, 0]]
    assert pairs[names[1]].tolist() == [[0, 12 * 3], [0, 0]]


@pytest.mark.usefixtures("without_inductor")
def test_tied_layers_inside_one_region_have_thresholds_of_their_own() -> None:
    model = FAMILIES["mixtral"].build()
    first, second, *_ = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    layers = len(model.model.layers)
    bounds = torch.zeros(layers, 2)
    bounds[1] = float("inf")
    modes_fx.optimize(model, region="model")
    optimized_state(model).runtime.set_bounds(bounds)
    with torch.no_grad(), modes_fx.stats(model) as stats:
        model(input_ids=captioned(4)["input_ids"])
    assert [stats.skip_ratio(layer=layer) for layer in range(layers)] == [0.0, 1.0, *[0.0] * (layers - 2)]


@pytest.mark.usefixtures("without_inductor")
def test_a_language_model_that_gets_fewer_tokens_asks_for_their_modality(vlm: nn.Module) -> None:
    language_model = vlm.model.language_model
    fewer = {"inputs_embeds": torch.randn(1, 7, 32), "position_ids": torch.arange(7).expand(3, 1, 7), "use_cache": False}
    handle = vlm.model.visual.register_forward_hook(lambda *args: language_model(**fewer) and None)
    modes_fx.optimize(vlm)
    try:
        inputs = tiny.mixed_batch()
        routed(vlm, **inputs)  # nothing depends on the modality yet
        modes_fx.set_plan(vlm, PLAN)
        with pytest.raises(ModalityError, match=r"\[1, 7\].*modes_fx\.token_modality"):
            routed(vlm, **inputs)
        with modes_fx.token_modality(torch.tensor([[0, 0, 1, 1, 1, 1, 0]])):
            pairs = next(iter(routed(vlm, **inputs).values()))
    finally:
        handle.remove()
    classes = tiny.classes(inputs)
    assert pairs[:, 0].tolist() == [(int((classes == 0).sum()) + 3) * 3, (int((classes == 1).sum()) + 4) * 3]
    assert running() is None


def test_a_decoder_behind_an_encoder_has_tokens_of_its_own() -> None:
    config = tiny_config("switch_transformers")
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    runtime = Runtime((), "threshold", "auto")
    watches = [ModalityWatch(module, runtime, (), False, lambda: None) for module in (model, model.decoder)]
    seen = []
    for stack in (model.encoder, model.decoder):
        stack.block[0].register_forward_pre_hook(lambda *args: seen.append(running().ids.tolist()))
    with torch.no_grad():
        model(
            input_ids=torch.tensor([[3, 4, 5, 0]]),
            attention_mask=torch.tensor([[1, 1, 1, 0]]),
            decoder_input_ids=torch.tensor([[0, 6, 7, 8]]),
            decoder_attention_mask=torch.tensor([[0, 1, 1, 1]]),
        )
    for watch in reversed(watches):
        watch.remove()
    assert seen == [[[0, 0, 0, 2]], [[2, 0, 0, 0]]]


@pytest.mark.usefixtures("without_inductor")
def test_a_speaking_model_sees_in_its_thinker_and_asks_about_its_talker() -> None:
    assert vision_token_ids(transformers.Qwen3OmniMoeConfig()) == (151655, 151656)
    talker = {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}}
    config = tiny_config("qwen3_omni_moe", thinker_config=THINKER, talker_config=talker)
    model = modes_fx.optimize(transformers.Qwen3OmniMoeForConditionalGeneration(config).eval(), PLAN)
    with modes_fx.stats(model) as stats:
        model.generate(**patches(96)(), thinker_max_new_tokens=2, return_audio=False)
    layers = [name.split(".")[0] for name in stats.layers]
    assert layers == ["thinker"] * 3 + ["talker"] * 3
    assert stats.pairs_routed[:3].tolist() == [[[12 * 3, 2 * 3], [8 * 3, 0]]] * 3
    assert stats.pairs_routed[3:].sum() == 0
    with pytest.raises(ModalityError, match=r"\[1, 5\].*modes_fx\.token_modality"):
        model.talker.model(inputs_embeds=torch.randn(1, 5, 32))
