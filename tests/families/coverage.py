"""Print the table of docs/supported-models.md, which says what becomes of each model family: ``-m tests.families.coverage``.

Every line is found out by running ``optimize`` on a tiny model of the family.
"""

import argparse
from pathlib import Path

from tabulate import tabulate
from torch import nn

import modes_fx
from tests.families.family import Family, outcome
from tests.families.text import TEXT
from tests.families.vision import VISION, WRAPPERS
from tests.oracle import experts_of

TABLES = {"text": TEXT, "vision": (*VISION, *WRAPPERS)}
BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"


def row(family: Family, kind: str) -> tuple[str, ...]:
    """Build and optimise a family; return its line of the table."""
    model = family.build()
    how = _words(outcome(model))
    if getattr(model, "_modes_fx", None) is None:
        return f"`{family.name}`", kind, "-", how, "-"
    report, experts = modes_fx.report(model), experts_of(model)
    layers = f"{len(report.rewritten)} of {report.found}"
    return f"`{family.name}`", kind, layers, how, _experts(experts[0]) if experts else "-"


def rows() -> list[tuple[str, ...]]:
    """Return all lines of the table."""
    return [row(family, kind) for kind, families in TABLES.items() for family in families]


def table() -> str:
    """Return the whole table in markdown."""
    return str(tabulate(rows(), headers=("family", "kind", "MoE layers rewritten", "how", "experts"), tablefmt="github"))


def rows_of(page: str) -> list[tuple[str, ...]]:
    """Return the lines of a page's table."""
    lines = page.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def named_in(page: str) -> dict[tuple[str, str], str]:
    """Return what a page's table says: (family, kind) -> outcome."""
    return {(family.strip("`"), kind): how for family, kind, _, how, _ in rows_of(page)}


def promised() -> dict[tuple[str, str], str]:
    """Return what the tables of families expect, in the page's words."""
    return {(item.name, kind): _words(item.expected) for kind, families in TABLES.items() for item in families}


def _words(found: str) -> str:
    how, _, code = found.partition(":")
    return f"{how} ({code})" if code else how


def _experts(experts: nn.Module) -> str:
    own_gate = type(experts)._apply_gate.__name__ != "_default_apply_gate"
    function = getattr(experts, "act_fn", None)
    activation = getattr(function, "__name__", type(function).__name__).removesuffix("Activation")
    parts = {
        "own gate": own_gate,
        f"gated {activation}": experts.has_gate and not own_gate,
        activation: not experts.has_gate,
        "biases": experts.has_bias,
        "transposed": experts.is_transposed,
        "normed": experts.has_post_expert_norm,
    }
    return ", ".join(part for part, holds in parts.items() if holds)


def main() -> None:
    """Print the table, or write it into a file between two markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what is between {BEGIN} and {END}")
    path = parser.parse_args().write
    if path is None:
        print(table())  # noqa: T201
        return
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{path} lacks the lines {BEGIN} and {END}; put them where the table goes")
    path.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
