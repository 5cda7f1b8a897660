"""A seeded share of `make fuzz`: damaged files are refused, or read as what they were."""

import random
from pathlib import Path

import pytest

from tests.fuzz import READERS, Reader, fuzz, quiet, shares


@pytest.mark.parametrize(("reader", "mutations"), list(shares(600)), ids=[reader.name for reader in READERS])
def test_a_damaged_file_is_refused_or_read_as_what_it_was(tmp_path: Path, reader: Reader, mutations: int) -> None:
    with quiet():
        outcomes = fuzz(reader, mutations, random.Random(reader.name), tmp_path)
    assert outcomes.total() == mutations
    assert outcomes["refused"] > 0


def test_a_reader_that_reads_something_else_is_found_out(tmp_path: Path) -> None:
    careless = Reader("careless", 1, lambda path: path.write_text("12345678"), Path.read_bytes)
    with pytest.raises(AssertionError, match="read as something else"):
        fuzz(careless, 20, random.Random(0), tmp_path)


def _divides(path: Path) -> float:
    return 1 / (path.read_text() == "12345678")


def test_a_reader_with_an_error_of_its_own_is_found_out(tmp_path: Path) -> None:
    careless = Reader("careless", 1, lambda path: path.write_text("12345678"), _divides)
    with pytest.raises(AssertionError, match="raised"):
        fuzz(careless, 20, random.Random(0), tmp_path)
