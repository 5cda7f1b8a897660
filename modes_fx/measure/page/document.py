"""Sections of a report as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from modes_fx.files.writing import write_atomically
from modes_fx.measure.page.markup import lines


def section(title: str, *parts: str) -> str:
    """Return a headed section; "" where all its parts are empty."""
    filled = [part for part in parts if part]
    return f"<section>\n<h2>{escape(title)}</h2>\n{lines(filled)}\n</section>" if filled else ""


def write_page(path: Path, title: str, subtitle: str, sections: Iterable[str]) -> Path:
    """Write a page; its colours follow the reader's light or dark setting.

    Args:
        path: The file to write.
        title: Its heading, as text.
        subtitle: A line below it, as text.
        sections: HTML; empty ones are left out.

    Returns:
        The path written.
    """
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    body = lines(part for part in sections if part)
    return write_atomically(path, template.substitute(title=escape(title), subtitle=escape(subtitle), body=body))
