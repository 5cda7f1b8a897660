"""Models whose weights accelerate moves when they are called: skipped like others, or refused with a reason."""

from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from torch import nn

import modes_fx
from modes_fx.calib import layer_importance
from modes_fx.errors import ModelError
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.calib.conftest import with_answers
from tests.harness import logits

pytestmark = pytest.mark.usefixtures("without_inductor")

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
INPUTS = tiny.mixed_batch(seed=5)


def hooked(model: nn.Module, how: str, folder: Path) -> nn.Module:
    cpu = torch.device("cpu")
    if how == "device_map":
        return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=cpu)
    accelerate.disk_offload(model, str(folder), execution_device=cpu)
    return model


@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload"])
def test_hooked_model_skips_the_same_pairs_without_compiling_again(vlm: nn.Module, how: str, tmp_path: Path) -> None:
    with modes_fx.stats(modes_fx.optimize(vlm, PLAN)) as alone:
        expected = logits(vlm, INPUTS)
    model = hooked(tiny.make(), how, tmp_path)
    modes_fx.optimize(model, PLAN)
    with modes_fx.stats(model) as stats:
        actual = logits(model, INPUTS)
        graphs = modes_fx.report(model).graphs
        logits(model, INPUTS)  # offloading makes new weights for every call
    assert modes_fx.report(model).graphs == graphs
    assert (actual - expected).abs().max() <= 1e-5
    assert stats.pairs_kept.equal(2 * alone.pairs_kept)
    assert [site.status for site in modes_fx.report(model).sites] == ["rewritten"] * 2
    modes_fx.set_plan(model, None)
    assert (logits(model, INPUTS) - logits(tiny.make(), INPUTS))[tiny.classes(INPUTS) != 2].abs().max() <= 1e-4


def test_hooks_added_later_are_refused_until_optimised_again(vlm: nn.Module, tmp_path: Path) -> None:
    expected = logits(modes_fx.optimize(vlm, PLAN), INPUTS)
    accelerate.disk_offload(vlm, str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"hooks were added after optimize\(\): call modes_fx.optimize\(\) again"):
        logits(vlm, INPUTS)
    assert (logits(modes_fx.optimize(vlm, PLAN), INPUTS) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("region", ["layer", "model"])
def test_larger_regions_over_hooks_are_refused(vlm: nn.Module, region: str) -> None:
    hooked(vlm, "cpu_offload", Path())
    with pytest.raises(ModelError, match=r"accelerate's hooks .* Use region=.moe."):
        modes_fx.optimize(vlm, PLAN, region=region)


def test_from_pretrained_with_layers_on_disk(vlm: nn.Module, tmp_path: Path) -> None:
    vlm.save_pretrained(tmp_path / "model")
    expected = logits(modes_fx.optimize(vlm, PLAN), INPUTS)
    parts = {"model.visual": "cpu", "model.language_model.embed_tokens": "cpu", "model.language_model.layers.0": "cpu"}
    rest = {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map={**parts, "model.language_model.layers.1": "disk", **rest},
        offload_folder=tmp_path / "disk",
    )
    assert model.model.language_model.layers[1].mlp.experts.gate_up_proj.is_meta
    assert (logits(modes_fx.optimize(model, PLAN), INPUTS) - expected).abs().max() <= 1e-5


def test_calibration_of_a_hooked_model_finds_the_same() -> None:
    batches = [with_answers(1), with_answers(2)]
    alone = layer_importance(tiny.make(), batches)
    spread = layer_importance(hooked(tiny.make(), "device_map", Path()), batches)
    assert (spread.kl, spread.method) == (alone.kl, alone.method)
