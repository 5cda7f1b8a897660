"""The demo model's training script, where it puts its checkpoint."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from modes_fx.demo import CHECKPOINT, load


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module("train_demo_model")


def test_a_folder_of_somebody_elses_is_left_alone(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, beside = tmp_path / "thesis" / "chapter.tex", tmp_path / "model.new" / "notes"
    for file in (mine, beside):
        file.parent.mkdir()
        file.write_text("years of work")
    model, processor = load()
    qwen = script.ARCHITECTURES["qwen3_vl_moe"]
    with pytest.raises(SystemExit, match=r"thesis exists and is no checkpoint.*--out"):
        script.save(qwen, model, processor, {}, mine.parent)
    monkeypatch.setattr("sys.argv", ["train_demo_model.py", "--out", str(mine.parent)])
    with pytest.raises(SystemExit, match="thesis exists"):
        script.main()
    script.save(qwen, model, processor, {"steps": 1}, tmp_path / "model")
    script.save(qwen, model, processor, {"steps": 2}, tmp_path / "model")
    assert mine.read_text() == beside.read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new", "thesis"]
    assert '"steps": 2' in (tmp_path / "model" / "training_log.json").read_text()
    for name in ("model.safetensors", "processor_config.json"):  # in the form that ships
        assert (tmp_path / "model" / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    reloaded, _ = load(folder=tmp_path / "model")
    assert isinstance(reloaded, nn.Module)
