"""What ships with the demo: known to be whole, refused if it is not."""

from pathlib import Path

import pytest

from modes_fx import demo
from modes_fx.errors import ModelError
from modes_fx.files import shipped


@pytest.mark.parametrize("name", shipped.SHA256)
def test_every_file_is_as_it_was_shipped(name: str) -> None:
    assert shipped.read_shipped(name) == (shipped.FOLDER / name).read_bytes()


def test_every_file_of_the_checkpoint_is_looked_at() -> None:
    found = {f"checkpoint/{path.name}" for path in demo.CHECKPOINT.iterdir()} | {"digits.npz"}
    assert found == {*shipped.SHA256, "checkpoint/training_log.json"}  # which nothing reads


def test_one_bit_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shipped.SHA256:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((shipped.FOLDER / name).read_bytes())
    weights = tmp_path / "checkpoint" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped.read_shipped, "__defaults__", (tmp_path,))
    with pytest.raises(ModelError, match=r"model\.safetensors is not as it was shipped"):
        demo.load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"digits\.npz: No such file"):
        shipped.read_shipped("digits.npz", tmp_path)
