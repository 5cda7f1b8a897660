"""Reading pickles: numbers come out, and nothing that a file names is called."""

import collections
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modes_fx.calib.safe_pickle import load_numbers
from modes_fx.errors import PlanError
from tests.calib.conftest import Malicious


def save_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def save_old_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_old_torch(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS = [save_pickle, save_old_pickle, torch.save, save_old_torch]
Save = Callable[[Any, Path], None]


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({0: 0.5, "1": {"text": 1, "vision": 2.0}}, {0: 0.5, "1": {"text": 1, "vision": 2.0}}),
        (collections.OrderedDict(a=(1, None, "b")), {"a": [1, None, "b"]}),
        (np.array([[1, 2], [3, 4]], dtype=np.int64), [[1, 2], [3, 4]]),
        ({"tau": np.float64(0.5), "n": np.int64(3), "x": np.ones(1, dtype=np.float32)}, {"tau": 0.5, "n": 3, "x": [1.0]}),
    ],
    ids=["dict", "OrderedDict", "array", "numpy scalars"],
)
def test_plain_data_comes_out_as_it_went_in(tmp_path: Path, save: Save, content: Any, wanted: Any) -> None:
    save(content, tmp_path / "file")
    assert load_numbers(tmp_path / "file") == wanted


@pytest.mark.parametrize("save", [torch.save, save_old_torch])
def test_tensors_come_out_as_lists(tmp_path: Path, save: Save) -> None:
    tensor = torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16, requires_grad=True)
    save({"alpha": tensor, 1: torch.tensor(2), "view": torch.arange(6)[::2]}, tmp_path / "file")
    assert load_numbers(tmp_path / "file") == {"alpha": [[0.5, 0.25]], 1: 2, "view": [0, 2, 4]}


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("inside", [lambda bad: bad, lambda bad: {"text": [0.5, bad]}, lambda bad: {0: 0.5, "x": (bad,)}])
def test_a_file_that_runs_a_command_is_refused_by_name_before_it_runs(
    tmp_path: Path, save: Save, inside: Callable[[Any], Any]
) -> None:
    witness = tmp_path / "witness"
    save(inside(Malicious(os.system, f"touch {witness}")), tmp_path / "file")
    with pytest.raises(PlanError, match=r"names posix\.system.*nothing in the file was run"):
        load_numbers(tmp_path / "file")
    assert not witness.exists()


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (eval, ("__import__('os').mkdir('{}')",), "eval"),
        (getattr, (dict, "clear"), "getattr"),
        (torch.load, ("nothing",), "torch.serialization.load"),
        (pickle.loads, (b"",), "pickle.loads"),
        (np.load, ("nothing",), "numpy.load"),
        (torch.nn.Linear, (1, 1), "torch.nn.modules.linear.Linear"),
        (Path, ("x",), "pathlib"),
    ],
)
def test_any_other_function_is_refused_by_name(tmp_path: Path, save: Save, function: Any, args: Any, name: str) -> None:
    made = tmp_path / "made"
    save(Malicious(function, *(arg.format(made) if isinstance(arg, str) else arg for arg in args)), tmp_path / "file")
    with pytest.raises(PlanError, match=name.replace(".", r"\.")):
        load_numbers(tmp_path / "file")
    assert not made.exists()


def test_a_tensor_in_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    """Its own way to be read would call torch.load without restriction."""
    save_pickle({"a": torch.zeros(2)}, tmp_path / "file")
    with pytest.raises(PlanError, match=r"torch\._utils\._rebuild_tensor_v2"):
        load_numbers(tmp_path / "file")


@pytest.mark.parametrize("save", [save_pickle, torch.save])
def test_containers_that_call_something_of_their_own_are_refused(tmp_path: Path, save: Save) -> None:
    save(collections.defaultdict(float, {3: 0.25}), tmp_path / "file")
    with pytest.raises(PlanError, match="defaultdict"):
        load_numbers(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 not a zip", pickle.dumps({"a": 1})[:-3], b"\x80\x05."])
def test_a_damaged_file_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(PlanError, match="file is refused"):
        load_numbers(tmp_path / "file")


def test_data_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"a": b"bytes"}, tmp_path / "file")
    with pytest.raises(PlanError, match=r"builtins\.bytes"):
        load_numbers(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"Cannot read .*none: No such file"):
        load_numbers(tmp_path / "none")
