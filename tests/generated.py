"""Write those parts of README and docs/ that are made of the code anew: ``python -m tests.generated``.

Each part stands in its page between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; ``tests/test_docs.py`` fails where
one is not what the code says.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from benchmarks import chart
from modes_fx import errors
from modes_fx.files import plan_fields
from modes_fx.passes.reasons import REASONS
from modes_fx.plan import PlanPoint, SkipPlan
from tests import test_rooms
from tests.test_rooms import ROOMS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

API = {
    "A model": ("modes_fx", "modes_fx.report", "modes_fx.plan"),
    '`torch.compile(model, backend="modes_fx")`': ("modes_fx.graph.stock.modes_fx",),
    "Calibration and search": ("modes_fx.calib",),
    "Calibration data": ("modes_fx.data",),
    "Keep-rules": ("modes_fx.policies.register", "modes_fx.policies.Rule"),
    "Quantised experts": ("modes_fx.quantise",),
    "Comparison": ("modes_fx.measure.compare",),
    "The embedded model": ("modes_fx.demo",),
}
"""The sections of the reference: packages, whose public names all stand there, or single names."""


def rooms() -> str:
    """Return the rooms from the top down: a picture of which one builds on which, and a table of what is in each."""
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for file in test_rooms.PACKAGE.rglob("*.py"):
        if (room := test_rooms._room(file)) in ROOMS:
            below[room] |= {imported.split(".")[1] for _, imported in test_rooms._imports(file)} - {room}
    reached: dict[str, set[str]] = {}
    for room in ROOMS:  # from the ground up
        reached[room] = below[room].union(*(reached[other] for other in below[room]))
    arrows = [
        f"    {room} --> {other}"
        for room in reversed(ROOMS)
        for other in reversed(ROOMS)
        if other in below[room] and not any(other in reached[between] for between in below[room])
    ]
    table = _table(("room", "what is in it"), [(f"`{room}`", what) for room, what in reversed(ROOMS.items())])
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```", "", table])


def plan_file() -> str:
    """Return the fields of a plan file, those of its points and of its model: name, type, meaning."""
    meanings = _attributes(plan_fields.PlanFields) | _attributes(SkipPlan)
    parts = (
        ("### The file", plan_fields.PlanFields, meanings),
        ("### Each of `points` and `frontier`", plan_fields.PointFields, _attributes(PlanPoint)),
        ("### `model`", plan_fields.ModelFields, _attributes(plan_fields.ModelFields)),
    )
    return "\n\n".join(f"{title}\n\n{_fields(kind, said)}" for title, kind, said in parts)


def reasons() -> str:
    """Return what each reason code of a rejected site means, and what to do."""
    return _table(
        ("code", "what was found", "what to do"), [(f"`{c}`", r.meaning, r.advice) for c, r in sorted(REASONS.items())]
    )


def exceptions() -> str:
    """Return what each exception means, and what to do."""
    found = [item for item in vars(errors).values() if inspect.isclass(item) and item.__module__ == errors.__name__]
    rows = [(f"`{item.__name__}`", *map(_line, inspect.cleandoc(str(item.__doc__)).split("\n\n", 1))) for item in found]
    return _table(("exception", "what it says", "what to do"), rows)


def api() -> str:
    """Return the public names by section; the site puts their whole reference in the place of each line."""
    lines: list[str] = []
    for title, names in API.items():
        lines += ["", f"## {title}", ""]
        for item in dict.fromkeys(item for name in names for item in _public(name)):
            lines += [f"<!-- name: {item.__module__}.{item.__qualname__} -->", _said(item), "<!-- /name -->", ""]
    return "\n".join(lines).strip()


def gains() -> str:
    """Return what skipping costs and gains, in figures."""
    return chart.table(json.loads(chart.FIGURES.read_text(encoding="utf-8")))


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "gains": ("../README.md", gains),
    "rooms": ("architecture.md", rooms),
    "plan-file": ("plans.md", plan_file),
    "reasons": ("troubleshooting.md", reasons),
    "exceptions": ("troubleshooting.md", exceptions),
    "api": ("api.md", api),
}
"""By name: the page, and what makes the part."""


def part_of(page: str, name: str) -> str:
    """Return a part of a page."""
    return page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def with_part(page: str, name: str, content: str) -> str:
    """Return a page with another content of a part."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"The page lacks the lines {begin} and {end}; put them where the part goes.")
    return f"{page.split(begin)[0]}{begin}\n\n{content}\n\n{end}{page.split(end)[1]}"


def _attributes(kind: Any) -> dict[str, str]:
    """Return what a class's docstring says of each attribute."""
    said = inspect.cleandoc(kind.__doc__).partition("Attributes:\n")[2]
    return {name: _line(text) for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", said, flags=re.MULTILINE)}


def _fields(kind: Any, meanings: dict[str, str]) -> str:
    hints = {name: str(item).removeprefix("<class '").removesuffix("'>") for name, item in get_type_hints(kind).items()}
    short = {name: re.sub(r"\b(?:typing|modes_fx\.files\.plan_fields)\.", "", hint) for name, hint in hints.items()}
    return _table(
        ("field", "type", "meaning"), [(f"`{name}`", f"`{short[name]}`", meanings[name]) for name in kind.__struct_fields__]
    )


def _public(name: str) -> Iterator[Any]:
    """Yield the functions and classes that a package shows, or the one that is named."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        package, _, single = name.rpartition(".")
        yield getattr(importlib.import_module(package), single)
        return
    shown = getattr(module, "__all__", None) or _own(module)
    found = (getattr(module, shown_name) for shown_name in shown if not shown_name.startswith("_"))
    yield from (item for item in found if inspect.isclass(item) or inspect.isfunction(item))


def _own(module: ModuleType) -> list[str]:
    return [name for name, item in vars(module).items() if getattr(item, "__module__", "") == module.__name__]


def _said(item: Any) -> str:
    """Return a public name's line: how it is called, where it is, and the first sentence of what it says of itself."""
    called = item.__qualname__
    if inspect.isfunction(inspect.unwrap(item)):
        signature = inspect.signature(item)
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        called += str(signature.replace(parameters=bare, return_annotation=signature.empty))
    first = _line(inspect.cleandoc(item.__doc__).split("\n\n")[0])
    return f"- `{called}` in `{item.__module__.replace('.', '/')}.py`: {first}"


def _line(text: str) -> str:
    """Return a docstring's paragraph as one line of markdown."""
    return " ".join(text.split()).replace("``", "`")


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table whose source lines stay short: no padding."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [headings, ["---"] * len(headings), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write all parts."""
    for name, (file, make) in PARTS.items():
        path = DOCS / file
        path.write_text(with_part(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
