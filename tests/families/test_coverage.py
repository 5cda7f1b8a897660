"""No family of the installed transformers is missing from the tables, and none is named that is not there."""

from pathlib import Path

import pytest

from tests.families import coverage, scan

TABLED = {family.name for families in coverage.TABLES.values() for family in families}
PAGE = Path(__file__).parents[2] / "docs" / "supported-models.md"


def test_every_family_is_in_the_tables_or_named_as_no_mixture() -> None:
    found = scan.families()
    known = {name for name in TABLED if "-" not in name} | set(scan.NOT_MOE)  # WRAPPER-FAMILY: any model over another's
    missing = {name: how for name, how in found.items() if name not in known}
    assert not missing, "add a line to tests/families/text.py or vision.py, or an entry with a reason to scan.NOT_MOE"
    assert not known - set(found), "transformers no longer has these, or they no longer hold experts"
    assert not TABLED & set(scan.NOT_MOE)


def test_each_table_names_a_family_once() -> None:
    for families in coverage.TABLES.values():
        names = [family.name for family in families]
        assert len(names) == len(set(names))


def test_the_page_says_what_the_tables_say() -> None:
    assert coverage.named_in(PAGE.read_text(encoding="utf-8")) == coverage.promised()


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_the_page_says_what_optimising_each_family_finds() -> None:
    assert coverage.rows_of(PAGE.read_text(encoding="utf-8")) == coverage.rows()


@pytest.mark.parametrize(
    ("source", "speaks"),
    [
        ("class NewExperts: ...", True),
        ("def forward(self, router_logits): ...", True),
        ("self.block = SparseMLP(config)", True),
        ("self.num_experts = 8", True),
        ('"""A mixture of experts."""  # with a router', False),
        ("class NewMoeRMSNorm: ...", False),  # the family's own name
        ("is_torchdynamo_exporting()", False),
    ],
)
def test_scan_reads_code_and_neither_prose_nor_the_familys_name(source: str, speaks: bool) -> None:
    assert scan.names_experts(source, "new_moe") == speaks


def test_table_is_read_as_it_is_written() -> None:
    row = "| `olmoe` | text | 3 of 3 | rewritten | gated SiLU |"
    page = f"{coverage.BEGIN}\n\n| family | ... |\n|---|---|\n{row}\n\n{coverage.END}"
    assert coverage.named_in(page) == {("olmoe", "text"): "rewritten"}
