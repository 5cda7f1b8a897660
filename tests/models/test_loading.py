"""From a name to a model: what is found, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modes_fx import demo
from modes_fx.errors import ModelError
from modes_fx.models.loading import check_torchvision, load
from tests import tiny


def test_the_demo_and_a_folder_are_the_same_model() -> None:
    embedded, processor = load("demo")
    model, own = load(str(demo.CHECKPOINT), dtype="float32")
    assert type(model) is type(embedded)
    assert type(own) is type(processor)
    assert not model.training
    assert {embedded.dtype, model.dtype} == {torch.bfloat16, torch.float32}
    for name, weight in embedded.state_dict().items():
        assert model.state_dict()[name].equal(weight.float()), name


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    for file in demo.CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of Qwen3VLMoeForConditionalGeneration, such as lm_head.weight"):
        load(str(tmp_path))


def test_a_model_without_a_processor_is_named(tmp_path: Path) -> None:
    tiny.make("olmoe").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has a tokenizer and no processor"):
        load(str(tmp_path), sees_images=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "bfloat17"}, "Unknown dtype 'bfloat17'"),
        ({"processor_settings": {"max_pixels": 9}}, "no settings, got max_pixels"),
    ],
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load("demo", **changes)


@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms does not exist')", "ImportError('libpng')"])
def test_a_broken_torchvision_is_found(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ModelError, match=r"does not fit torch .* `pip uninstall torchvision`"):
        check_torchvision()
