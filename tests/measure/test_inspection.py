"""inspect(): the same verdicts as optimize, told from a config alone, and a given model left as it was."""

import copy
import json
import resource
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch._dynamo
import transformers
from torch import nn

import modes_fx
from modes_fx.errors import ModelError
from tests import tiny
from tests.harness import logits, model_state


def qwen3_vl_30b_a3b(layers: int) -> Any:
    """The published sizes of Qwen3-VL-30B-A3B's language model, with fewer layers and a small vision tower."""
    config = copy.deepcopy(tiny.make().config)
    sizes = {
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    config.text_config.update(sizes)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    config.vision_config.out_hidden_size = 2048
    return config


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_config_is_enough(family: str, tmp_path: Path) -> None:
    model = tiny.make(family)
    model.config.save_pretrained(tmp_path)
    found = modes_fx.inspect(tmp_path)
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    assert len(found.rewritten) == found.found == len(experts)
    assert found.model == type(model).__name__
    assert found.family == model.config.model_type
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.expert_parameters == sum(parameter.numel() for module in experts for parameter in module.parameters())
    for site, module in zip(found.sites, experts, strict=True):
        assert model.get_submodule(site.name) is module
        assert (site.form, site.dispatch, site.family) == ("grouped_mm", "compact", module.config.model_type)
        assert (site.num_experts, site.hidden_size) == (module.num_experts, 32)
        assert site.top_k == module.config.num_experts_per_tok
        assert site.num_experts * site.hidden_size * site.expert_width == module.down_proj.numel()


def test_active_parameters_are_all_but_the_experts_that_are_not_chosen() -> None:
    found = modes_fx.inspect(tiny.make("mixtral").config)  # 2 of 4 experts
    assert found.active_parameters == found.parameters - found.expert_parameters // 2


def test_a_model_of_30b_sizes_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = modes_fx.inspect(qwen3_vl_30b_a3b(layers=3))
    grown_gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert found.parameters * 2 / 2**30 > 4  # bytes of bfloat16
    assert grown_gib < 1
    assert len(found.rewritten) == found.found == 3
    assert found.dtype == "bfloat16"
    assert set(map(sizes, found.sites)) == {(8, 128, 2048, 768)}


def sizes(site: Any) -> tuple[int, ...]:
    return site.top_k, site.num_experts, site.hidden_size, site.expert_width


def test_the_device_decides_the_dispatch() -> None:
    config = tiny.make().config
    assert {site.dispatch for site in modes_fx.inspect(config, device="cuda").sites} == {"static"}
    assert {site.dispatch for site in modes_fx.inspect(config, device="cpu").sites} == {"compact"}
    with pytest.raises(ModelError, match="Unknown device 'gpu'"):
        modes_fx.inspect("./nowhere", device="gpu")  # before anything is looked for


def test_the_embedded_model_has_its_name_here_too() -> None:
    assert modes_fx.inspect("demo").headline.startswith("8 of 8 routing sites of Qwen3VLMoe")


def test_a_config_is_left_as_it_was() -> None:
    config = tiny.make().config
    before = config.to_dict()
    modes_fx.inspect(config)
    assert config.to_dict() == before


def test_a_given_model_is_left_as_it_was() -> None:
    model = tiny.make()
    model.set_experts_implementation("eager")
    before, inputs = model_state(model), tiny.mixed_batch()
    stock = logits(model, inputs)
    assert len(modes_fx.inspect(model).rewritten) == 2
    assert model_state(model) == before
    assert logits(model, inputs).equal(stock)


@pytest.mark.usefixtures("without_inductor")
def test_an_optimised_model_stays_optimised(vlm: nn.Module) -> None:
    fresh = modes_fx.inspect(vlm)
    modes_fx.optimize(vlm)
    before, inputs = model_state(vlm), tiny.mixed_batch()
    wanted = logits(vlm, inputs)
    report = modes_fx.report(vlm)
    assert modes_fx.inspect(vlm) == fresh
    assert model_state(vlm) == before
    assert modes_fx.report(vlm) == report
    assert logits(vlm, inputs).equal(wanted)


def test_it_says_what_optimize_reports(vlm: nn.Module) -> None:
    found = modes_fx.inspect(vlm)
    modes_fx.optimize(vlm)
    for seen, done in zip(found.sites, modes_fx.report(vlm).sites, strict=True):
        assert {name: getattr(seen, name) for name in vars(done)} == vars(done)


def test_a_rejected_site_keeps_its_sizes_and_its_reason() -> None:
    model = tiny.make("qwen3_moe")
    block = model.model.layers[1].mlp
    block.experts.forward = lambda hidden, ids, weights: hidden * weights.sum()
    found = modes_fx.inspect(model)
    assert [site.code for site in found.sites] == ["", "NO_DISPATCH"]
    assert sizes(found.sites[1]) == sizes(found.sites[0])
    assert "NO_DISPATCH (1 of 2): the traced block holds no expert dispatch." in str(found)
    assert "model.layers.0.mlp.experts" in str(found)


def test_a_block_that_cannot_be_traced_is_told_with_the_tracer_s_words() -> None:
    model = tiny.make("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts.forward = lambda hidden, ids, weights: torch._dynamo.graph_break() or hidden
    found = modes_fx.inspect(model)
    assert found.reasons() == "2 x NOT_TRACEABLE"
    assert "torch._dynamo.graph_break" in found.sites[0].detail
    assert "Use region" not in str(found)


def test_sites_that_are_alike_share_a_row() -> None:
    found = modes_fx.inspect(tiny.make("deepseek_v3").config)
    assert [row[0] for row, _ in found.rows()] == ["model.layers.{1-2}.mlp.experts"]
    assert [row[0] for row, _ in found.rows(each=True)] == [site.name for site in found.sites]
    assert "model.layers.{1-2}.mlp.experts" in str(found)


def test_json_holds_everything() -> None:
    found = modes_fx.inspect(tiny.make().config)
    facts = json.loads(found.to_json())
    assert facts == found.as_dict()
    assert set(facts) == {
        "schema", "model", "family", "dtype", "device", "found", "rewritten", "parameters", "expert_parameters",
        "active_parameters", "vision_token_ids", "notes", "versions", "sites",
    }  # fmt: skip
    assert set(facts["sites"][0]) == {
        "name", "family", "status", "code", "detail", "form", "dispatch", "gemms", "top_k", "num_experts", "hidden_size",
        "expert_width", "parameters",
    }  # fmt: skip
    assert facts["vision_token_ids"] == [tiny.IMAGE, 63]


def test_a_quantised_checkpoint_is_noted() -> None:
    config = tiny.make("gpt_oss").config
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": "mxfp4"}
    (note,) = modes_fx.inspect(config).notes
    assert "quantised (mxfp4)" in note


def test_a_model_without_experts_has_nothing_to_skip() -> None:
    found = modes_fx.inspect(tiny.dense())
    assert (found.found, found.rewritten) == (0, ())
    assert "there is nothing to skip" in str(found)


def test_experts_with_another_dispatch_are_named() -> None:
    model = tiny.dense()
    model.config.num_local_experts = 4  # as a model would say whose experts no one recognises
    found = modes_fx.inspect(model)
    assert found.found == 0
    assert "num_local_experts 4, but they are dispatched another way" in str(found)


def write_config(folder: Path, **content: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "nonesuch"}, r"'nonesuch', which the installed transformers [\d.]+ does not know.*--trust-remote-code"),
        ({}, "model_type None"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "Python code of its own.*--trust-remote-code"),
        ({"model_type": "qwen3_moe", "hidden_size": "wide"}, r"model_type 'qwen3_moe'\) is not valid.*hidden_size"),
        ({"model_type": "qwen3_moe", "pad_token_id": 10**9}, "Cannot build the qwen3_moe model of this config"),
    ],
)
def test_a_config_of_which_no_model_can_be_built(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        modes_fx.inspect(write_config(tmp_path, **content))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        modes_fx.inspect(tmp_path)
    with pytest.raises(ModelError, match="There is no file or folder"):
        modes_fx.inspect(str(tmp_path / "missing"))


def test_something_that_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"A model, its config, or the name of one is needed, got dict"):
        modes_fx.inspect({"model_type": "olmoe"})  # type: ignore[arg-type]


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="Cannot read the config"):
        modes_fx.inspect(file)


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"Cannot read the config of nobody/nothing.*download the model's config\.json"):
        modes_fx.inspect("nobody/nothing")


REMOTE_CODE = """
from transformers import OlmoeConfig, OlmoeForCausalLM
print("remote code ran")
class OwnConfig(OlmoeConfig):
    model_type = "own_moe"
class OwnModel(OlmoeForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.make("olmoe").config.to_dict()
    config |= {"model_type": "own_moe", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write_config(tmp_path, **config)
    (tmp_path / "own.py").write_text(REMOTE_CODE, encoding="utf-8")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        modes_fx.inspect(tmp_path)
    found = modes_fx.inspect(tmp_path, trust_remote_code=True)
    assert (found.model, found.family, len(found.rewritten)) == ("OwnModel", "own_moe", 2)
