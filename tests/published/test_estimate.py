"""Memory from a config, against real tensors; devices; hours."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published.estimate import QUESTION_TOKENS, Pilot, Placement, _cached_a_token, gigabytes, hours, memory, placement

from modes_fx.measure.bench.presets import PRESETS
from tests import checkpoints

GB = 10**9


@pytest.mark.parametrize("name", checkpoints.BUILDERS)
def test_weights_and_cache_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    tiny, _ = checkpoints.BUILDERS[name]()
    model: Any = type(tiny)._from_config(tiny.config, dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    estimated = memory(str(tmp_path), 1, 1, trust_remote_code=False)
    assert estimated.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    ids = torch.randint(5, 50, (2, 7))
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    cached = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert estimated.cache / QUESTION_TOKENS == cached / ids.numel()
    assert estimated.total == estimated.weights + estimated.cache + estimated.activations


def test_the_published_size_fits_on_one_large_gpu(tmp_path: Path) -> None:
    text: dict[str, Any] = {**PRESETS["qwen3-vl-30b-a3b"][1], "num_hidden_layers": 48, "vocab_size": 151936}
    architectures = ["Qwen3VLMoeForConditionalGeneration"]
    transformers.Qwen3VLMoeConfig(text_config=text, architectures=architectures).save_pretrained(tmp_path)
    needed = memory(str(tmp_path), 8, 1, trust_remote_code=False)
    assert 62 * GB < needed.weights < 63 * GB  # 31.1 B parameters of two bytes
    assert placement(needed.total, [80 * GB], 0).copies == 1


def test_remote_codes_cache_is_not_taken_for_a_latent_one() -> None:
    text = transformers.DeepseekV3Config(**PRESETS["kimi-vl-a3b"][1])
    assert _cached_a_token(text, of_transformers=True) == 512 + 64
    assert _cached_a_token(text, of_transformers=False) == 16 * (128 + 64 + 128)


def test_each_gpu_takes_a_copy_where_one_holds_it() -> None:
    assert placement(70 * GB, [80 * GB] * 2, 0) == Placement(2, False, ("0", "1"))
    assert placement(70 * GB, [80 * GB] * 2, 0, "5,3") == Placement(2, False, ("5", "3"))


def test_else_all_share_one() -> None:
    assert placement(70 * GB, [40 * GB] * 2, 0) == Placement(1, True, ("0,1",))
    assert placement(70 * GB, [80 * GB, 40 * GB], 0, "2,4") == Placement(1, True, ("2,4",))


def test_without_a_gpu_the_machine_must_hold_it() -> None:
    assert placement(1 * GB, [], 8 * GB) == Placement(1, False, ())
    with pytest.raises(MemoryError, match=r"70.0 GB are needed, and here is no GPU, and 8.0 GB of memory. Take more"):
        placement(70 * GB, [], 8 * GB)
    with pytest.raises(MemoryError, match=r"70.0 GB are needed, and here is 2 GPUs with 44.2 GB to use"):
        placement(70 * GB, [24 * GB] * 2, 99 * GB)


def test_hours() -> None:
    pilot = Pilot(samples=90, forward_s=2.0, layers=4, question_s={"a": 1.0, "b": 0.5}, questions={"a": 100, "b": 40})
    found = hours(pilot, batch_size=8, targets=3, gammas=2, grid_size=6, copies=2)
    assert list(found.values()) == pytest.approx([6 * 9 * 2 / 3600, 6 * 2 * 3 * 12 * 4 / 3 * 2 / 3600, 120 * 4 / 2 / 3600])


def test_sizes() -> None:
    assert [gigabytes(size) for size in (7.8e6, 1.5e9, 62e9)] == ["7.8 MB", "1.5 GB", "62.0 GB"]
