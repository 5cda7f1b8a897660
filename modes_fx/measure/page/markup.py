"""Pieces of a page: tables, cards, lists of facts, and how numbers are written. All text that comes in is escaped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

Groups = Sequence[tuple[str, Sequence[str]]]  # headings of columns, each with the headings below it
Interval = Sequence[float]
ABSENT = "–"
_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def table(
    name: str,
    groups: Groups,
    rows: Iterable[Sequence[str]],
    best: Collection[tuple[int, int]] = (),
    strong: Collection[int] = (),
) -> str:
    """Return a table that scrolls in a box of its own.

    Args:
        name: Of the box, for screen readers.
        groups: Headings; if any names columns below it, they are a second line. The first is of the rows' labels.
        rows: A label and its cells. A row of a label alone heads the rows below it.
        best: (row, column) of cells that stand out, counted without the labels.
        strong: Rows that stand out.
    """
    height = 2 if any(columns for _, columns in groups) else 1
    first, second = [], []
    for index, (group, columns) in enumerate(groups):
        kind = "name" if index == 0 else "group" if columns else ""
        span = f'colspan="{len(columns)}"' if columns else f'rowspan="{height}"'
        first.append(f'<th class="{kind}" {span}>{escape(group)}</th>')
        second += [f"<th>{escape(column)}</th>" for column in columns]
    width = 1 + sum(len(columns) or 1 for _, columns in groups[1:])
    body = []
    for row, (label, *cells) in enumerate(rows):
        if not cells:
            body.append(f'<tr class="head"><th class="name" scope="rowgroup" colspan="{width}">{escape(label)}</th></tr>')
            continue
        kinds = ("best" if (row, column) in best else "" for column in range(len(cells)))
        filled = "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, cells, strict=True))
        kind = ' class="strong"' if row in strong else ""
        body.append(f'<tr{kind}><th class="name" scope="row">{escape(label)}</th>{filled}</tr>')
    head = "".join(f"<tr>{''.join(line)}</tr>" for line in (first, second) if line)
    whole = f"<table>\n<thead>{head}</thead>\n<tbody>\n{lines(body)}\n</tbody>\n</table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{whole}</div>'


def cards(values: Iterable[tuple[str, str]]) -> str:
    """Return headline numbers, each with what it is."""
    items = (
        f'<li><span class="value">{escape(value)}</span><span class="label">{escape(label)}</span></li>'
        for value, label in values
    )
    return f'<ul class="cards">\n{lines(items)}\n</ul>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return names with their values."""
    return f"<dl>{''.join(f'<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>' for key, value in pairs)}</dl>"


def columns_of_facts(groups: dict[str, dict[str, object]]) -> str:
    """Return headed lists of facts side by side; empty ones are left out."""
    parts = (f"<div><h3>{escape(name)}</h3>{facts(pairs.items())}</div>" for name, pairs in groups.items() if pairs)
    return f'<div class="facts">\n{lines(parts)}\n</div>'


def paragraph(text: str, kind: str = "") -> str:
    """Return text as a paragraph; ``kind`` is ``"quiet"`` or ``"missing"`` for what is no finding itself."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def lines(parts: Iterable[str]) -> str:
    """Return parts one a line."""
    return "\n".join(parts)


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as per cent."""
    return ABSENT if share is None or share != share else f"{100 * share:.{digits}f}%"


def target(ratio: float) -> str:
    """Write a share as per cent, as short as it is."""
    return f"{100 * ratio:.4g}%"


def short(value: float | None) -> str:
    """Write three significant digits; whole numbers in full, very small ones with a power of ten."""
    if value is None or value != value:
        return ABSENT
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10{power(int(exponent))}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def power(exponent: int) -> str:
    """Write an exponent in superscript."""
    return str(exponent).translate(_DIGITS)


def times(ratio: float | None) -> str:
    """Write a factor."""
    return ABSENT if ratio is None or ratio != ratio else f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×"


def between(ends: Interval | None) -> str:
    """Write an interval of shares."""
    return "" if ends is None else f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"
