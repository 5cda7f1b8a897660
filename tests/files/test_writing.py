"""Files: tried before, written whole or not at all, and kept elsewhere if all fails."""

import os
from pathlib import Path

import pytest

from modes_fx.errors import ModesFxError
from modes_fx.files.writing import check_writable, in_any_case, write_atomically


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


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


@pytest.mark.parametrize("content", ["text\n", b"\x00bytes"])
def test_what_a_full_disk_does_not_take_is_kept_elsewhere_and_the_message_says_where(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModesFxError) as failed:
        write_atomically(tmp_path / "plan.json", content)
    (kept,) = elsewhere.glob("*/plan.json")
    assert kept.read_bytes() == (content.encode() if isinstance(content, str) else content)
    said = str(failed.value)
    assert f"Cannot write {tmp_path / 'plan.json'}: No space left on device. Its content is in {kept}" in said
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_written_at_all_the_message_says_what_to_do(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere / "none"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModesFxError, match="Name a file in a folder that can be written"):
        write_atomically(tmp_path / "out", "new")


def test_one_that_fails_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ModesFxError, match=r"Cannot write .*a: Is a directory.*\n?Cannot write .*a: Is a"):
        in_any_case(*(lambda name=name: write_atomically(tmp_path / name, "new") for name in ("a", "b", "a", "c")))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
    assert in_any_case(lambda: 1, lambda: 2) == [1, 2]


def test_a_place_that_can_be_written_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    for path in ("old", "new", "new/folders/new"):
        check_writable(tmp_path / path)
    check_writable(tmp_path, folder=True)
    check_writable(tmp_path / "new" / "folders", folder=True)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    "path", ["/proc/x.json", "/proc/new/x.json", "{file}/x.json", "{file}/new/x.json", "/dev/null", "{folder}"]
)
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    wanted = path.format(file=tmp_path / "file", folder=tmp_path)
    with pytest.raises(ModesFxError, match=f"{wanted} cannot be written"):
        check_writable(wanted)


@pytest.mark.parametrize("path", ["/proc", "/proc/new", "{file}", "{file}/new"])
def test_a_folder_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    wanted = path.format(file=tmp_path / "file")
    with pytest.raises(ModesFxError, match=f"{wanted} cannot be written"):
        check_writable(wanted, folder=True)


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModesFxError, match="pipe: it is no file"):
        write_atomically(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo()
