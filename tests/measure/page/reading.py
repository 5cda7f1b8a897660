"""How tests read a page."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

VOID = {"br", "hr", "img", "link", "meta"}


class Reader(HTMLParser):
    """Collects attributes and text, and fails on a tag that is not closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(" ".join(data.split()))

    @property
    def whole(self) -> str:
        """All text in one line."""
        return " ".join(self.text)


def read(path: Path) -> Reader:
    """Read a page, and check that it loads nothing and that its ids are its own."""
    content = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)|<script|<link|DejaVu", content)
    reader = Reader()
    reader.feed(content)
    reader.close()
    assert not reader.open
    assert "$" not in reader.whole
    loaded = [value or "" for _, name, value in reader.attributes if name in ("src", "href", "srcset", "data", "poster")]
    assert all(value.startswith(("data:image/", "#")) for value in loaded)
    ids = [value for _, name, value in reader.attributes if name == "id" and value]
    used = {*re.findall(r"url\(#([^)]*)\)", content), *(value[1:] for value in loaded if value.startswith("#"))}
    assert used <= set(ids)
    assert all(ids.count(each) == 1 for each in used)  # no drawing takes another's clip path or marker
    return reader


def png(colour: object = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a picture's file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()
