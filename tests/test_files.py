"""Atomic writes: the old file or the new one, never half of either, and nothing left beside it."""

import os
from pathlib import Path

import pytest

from modes_fx.errors import ModesFxError
from modes_fx.files import write_atomically


class InterruptedHereError(BaseException):
    """Stands for Ctrl-C: no Exception."""


def interrupted(*args: object) -> None:
    raise InterruptedHereError


def test_text_and_bytes_are_written_and_folders_made(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a" / "b" / "text", "über\n")
    assert path.read_bytes() == "über\n".encode()
    assert write_atomically(str(tmp_path / "bytes"), b"\x00\xff").read_bytes() == b"\x00\xff"


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old and longer")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(InterruptedHereError):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_before_the_first_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(InterruptedHereError):
        write_atomically(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == []


def test_a_folder_in_its_place_is_named_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModesFxError, match=r"Cannot write .*out: Is a directory"):
        write_atomically(tmp_path / "out", "new")
    assert os.listdir(tmp_path) == ["out"]
