"""The journal: what is in it after any cut, and what it refuses."""

import json
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modes_fx.calib.journal import Journal, opened
from modes_fx.errors import CalibrationError
from modes_fx.files import signed_json

ABOUT = {"model": "m", "data": "d", "versions": {"torch": "2"}}
ENTRIES = [(("trial", 0.5, 1 / 3), {"kl": 1e-17, "skip_ratio_vision": None}), (("grid", 1.0, 5), {"text": [0.0, 0.1]})]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "journal.jsonl"


def filled(path: Path) -> Journal:
    journal = Journal(path, ABOUT)
    for key, value in ENTRIES:
        journal.add(key, value)
    return journal


def test_entries_come_back_as_they_were(path: Path) -> None:
    assert len(Journal(path, ABOUT)) == 0
    filled(path)
    again = Journal(path, ABOUT)
    assert len(again) == 2
    for key, value in ENTRIES:
        assert again.get(key, dict) == value
    assert again.get(("trial", 0.5, 0.25), dict) is None
    assert len(path.read_text().splitlines()) == 3  # opening it again writes nothing


def test_an_entry_is_in_the_file_once_it_is_added(path: Path) -> None:
    journal = Journal(path, ABOUT)
    journal.add(*ENTRIES[0])
    line = json.loads(path.read_text().splitlines()[-1])
    assert line == {"key": list(ENTRIES[0][0]), "value": ENTRIES[0][1], "digest": signed_json.digest(line)}


def test_without_a_path_entries_are_kept_in_memory(tmp_path: Path) -> None:
    journal = Journal(None, ABOUT)
    journal.add(*ENTRIES[0])
    assert journal.get(ENTRIES[0][0], dict) == ENTRIES[0][1]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(cut=st.integers(0, 600), garbage=st.binary(max_size=5).filter(lambda tail: b"\n" not in tail))
def test_cut_anywhere_it_keeps_the_whole_lines_and_goes_on(tmp_path: Path, cut: int, garbage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    filled(path)
    content = path.read_bytes()
    cut = min(cut, len(content))
    whole = max(content[:cut].count(b"\n") - 1, 0)
    torn = content[:cut] + garbage
    path.write_bytes(torn)
    if cut < content.index(b"\n") and garbage.strip(b"\0"):  # it might be anybody's
        with pytest.raises(CalibrationError, match=r"is not a journal of calibration"):
            Journal(path, ABOUT)
        assert path.read_bytes() == torn
        return
    journal = Journal(path, ABOUT)
    assert len(journal) == whole
    for key, value in ENTRIES[whole:]:
        assert journal.get(key, dict) is None
        journal.add(key, value)
    assert path.read_bytes() == content


def test_a_last_line_of_zeros_is_dropped_like_a_torn_one(path: Path) -> None:
    filled(path)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 20 + b"\n")
    assert len(Journal(path, ABOUT)) == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": "e"}, "data was 'd' and is 'e'"),
        ({"model": "n", "alpha": "a"}, r"model was 'm' and is 'n'; alpha was None and is 'a'"),
        ({"versions": {"torch": "3"}}, "versions was"),
    ],
)
def test_the_journal_of_another_run_is_refused_and_left_alone(path: Path, changes: dict[str, object], match: str) -> None:
    filled(path)
    content = path.read_bytes()
    with pytest.raises(CalibrationError, match=match):
        Journal(path, {**ABOUT, **changes})
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a novel", "not a journal"),
        (b"a novel\nof two lines\n", "damaged|not a journal"),
        (b'{"schema_version": 1}\n', "not a journal"),
        (b'{"journal": 99, "about": {}}\n', "not a journal"),
        (b"[1]\n", "not a journal"),
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(path: Path, content: bytes, match: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=match):
        Journal(path, ABOUT)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        b"{broken}\n",
        b'{"key": 3}\n',
        b"[]\n",
        b"[" * 10**5 + b"\n",
        b'{"key": [[1]], "value": {}}\n',
        b'{"key": [1], "value": {}}\n',
    ],
)
def test_damage_before_the_last_line_is_named_by_its_line(path: Path, damage: bytes) -> None:
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], damage, *lines[1:]]))
    with pytest.raises(CalibrationError, match=r"[Ll]ine 2 of the journal"):
        Journal(path, ABOUT)


def test_a_digit_that_changed_is_named_by_its_line(path: Path) -> None:
    filled(path)
    path.write_bytes(path.read_bytes().replace(b"1e-17", b"1e-16"))
    with pytest.raises(CalibrationError, match=r"Line 2 of the journal .* is damaged \(its digest does not fit\)"):
        Journal(path, ABOUT)


def test_a_journal_from_before_the_digests_goes_on_with_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    lines = [{"journal": 1, "about": ABOUT}, {"key": list(ENTRIES[0][0]), "value": ENTRIES[0][1]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal(path, ABOUT)
    assert journal.get(ENTRIES[0][0], dict) == ENTRIES[0][1]
    journal.add(*ENTRIES[1])
    assert len(Journal(path, ABOUT)) == 2
    assert len(caplog.records) == 2  # one an opening
    path.write_bytes(path.read_bytes().replace(b"[0.0, 0.1]", b"[0.0, 0.2]") + b"{}\n")
    with pytest.raises(CalibrationError, match=r"Line 3 .* is damaged"):
        Journal(path, ABOUT)


class Loss(TypedDict):
    kl: float


@pytest.mark.parametrize("value", [{}, {"kl": "x"}, {"kl": None}])
def test_an_entry_of_another_type_is_named_with_its_key_and_file(path: Path, value: dict[str, object]) -> None:
    journal = Journal(path, ABOUT)
    journal.add(("trial", 1), value)
    with pytest.raises(CalibrationError, match=r"The entry \['trial', 1\] of the journal .*journal\.jsonl is damaged: .*kl"):
        journal.get(("trial", 1), Loss)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="Cannot use the journal"):
        Journal(tmp_path, ABOUT)


@pytest.mark.parametrize(
    "content", [b'{"question": "a"}\n{"question": "b"}', b"[\n  1\n]", b"no newline", b'{"journal": 1}', b'{"journal": "mine']
)
def test_a_file_of_somebody_else_is_left_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"is not a journal of calibration .* Name another file"):
        Journal(path, ABOUT)
    assert path.read_bytes() == content


def test_a_full_disk_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    journal = Journal(path, ABOUT)
    monkeypatch.setattr("modes_fx.calib.journal.os.fsync", full)
    with pytest.raises(CalibrationError, match=r"No space left.*make room"):
        journal.add(*ENTRIES[0])


def test_parts_of_a_journal_share_its_file_and_keep_their_entries_apart(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "journal.jsonl", {"model": "a"})
    first, second = whole.under("first"), whole.under("second", 2)
    first.add(("key", 0.5), {"value": 1})
    second.under("deeper").add(("key", 0.5), {"value": 2})
    assert second.get(("key", 0.5), dict) is None
    read = opened(tmp_path / "journal.jsonl", lambda: {"model": "a"})
    assert read.under("first").get(("key", 0.5), dict) == {"value": 1}
    assert read.get(("second", 2, "deeper", "key", 0.5), dict) == {"value": 2}
    assert opened(read, lambda: {}) is read
    assert len(read) == len(first) == 2
