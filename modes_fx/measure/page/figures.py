"""Matplotlib figures inside a page, in its own colours and letters.

They are drawn in stand-in colours that become the page's CSS variables, so that one drawing serves light and dark. Matplotlib
is optional and imported when a figure is drawn; ``Figure`` is used directly, so that no window system, backend or figure list
of the caller is touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from modes_fx.measure.page.markup import lines, paragraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
ACCENT, TEXT, VISION = "#050505", "#060606", "#070707"
_VARIABLES = dict(zip((INK, QUIET, LINE, PAPER, ACCENT, TEXT, VISION),
                      ("ink", "quiet", "line", "paper", "accent", "text", "vision"), strict=True))  # fmt: skip
# Okabe and Ito's, told apart under the common colour-vision deficiencies and legible on white and on near-black.
COLOURS = (QUIET, "#cc79a7", "#e69f00", "#56b4e9", "#d55e00", "#009e73")
SIZE_IN = (4.2, 3.0)  # about a phone's width, so that two stand side by side on a desk and letters keep their size
SMALL_IN = (2.9, 2.5)
_FONT_PT = 8.5
_STYLE = {
    "svg.fonttype": "none",
    "font.size": _FONT_PT,
    "axes.titlesize": _FONT_PT,
    "axes.labelsize": _FONT_PT,
    "xtick.labelsize": _FONT_PT,
    "ytick.labelsize": _FONT_PT,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Drawing:
    """A figure to draw.

    Attributes:
        title: Says what is shown, with units; above it.
        draw: Draws it.
        caption: Below it; "" for none.
        size_in: Width and height in inches.
    """

    title: str
    draw: Callable[[Figure], None]
    caption: str = ""
    size_in: tuple[float, float] = SIZE_IN


def figures(drawings: Sequence[Drawing], beside: str = "", kind: str = "plots") -> str:
    """Return drawings as inline SVG, side by side where there is room; a sentence where matplotlib is not installed.

    Args:
        drawings: What to draw.
        beside: HTML that stands among them, the last.
        kind: ``"plots"``, or ``"plots small"`` for drawings of ``SMALL_IN``.
    """
    try:
        import matplotlib  # noqa: F401 - found here although absent, a submodule could still be in sys.modules
    except ImportError:
        said = "Figures are left out: they need matplotlib (pip install 'modes-fx[viz]')."
        return lines([paragraph(said, "missing"), beside])
    parts = [*map(_figure, drawings), *([f"<div>{beside}</div>"] if beside else [])]
    return f'<div class="{kind}">\n{lines(parts)}\n</div>' if parts else ""


def _figure(drawing: Drawing) -> str:
    caption = f"<p>{escape(drawing.caption)}</p>" if drawing.caption else ""
    return f"<figure><figcaption><strong>{escape(drawing.title)}</strong>{caption}</figcaption>{_svg(drawing)}</figure>"


def _svg(drawing: Drawing) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    salt = {"svg.hashsalt": f"{drawing.title} {drawing.caption}"}  # ids that no other figure of the page has
    with style.context(["default", {**_STYLE, **salt}]):  # whatever matplotlibrc the user has; restored on the way out
        figure = Figure(figsize=drawing.size_in, layout="constrained")
        drawing.draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), drawing.title)


def _inline(svg: str, title: str) -> str:
    """Take a file's frame off, which would name addresses, and put the page's colours and letters in."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{escape(title)}">', svg, count=1)
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
