"""What mkdocs does beyond showing the pages as they are: the reference in the place of each public name's line in api.md."""

import re
from typing import Any

_NAME = re.compile(r"<!-- name: (\S+) -->\n.*?\n<!-- /name -->", flags=re.DOTALL)


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Return a page with each name's line replaced by its docstring, which mkdocstrings reads; called by mkdocs."""
    return _NAME.sub(r"::: \1", markdown)
