"""Pictures and questions whose tokens are coloured by how many of their experts they keep."""

from __future__ import annotations

import base64
from html import escape

from modes_fx.measure.page.closeup import Closeup, Grid, Picture
from modes_fx.measure.page.markup import ABSENT, facts, lines, paragraph, short

NO_GRID = (
    "The processor does not say where an image's visual tokens stand in it (image_grid_thw), so that these pictures are not "
    "coloured."
)
NO_IMAGES = "The test data have no images: questions alone are coloured."
NONE_KEPT = "No visual token of these images keeps any expert."


def pictures(closeup: Closeup) -> str:
    """Return cards of the samples, with the key to their colours."""
    found = closeup.pictures
    if not found:
        return ""
    squares = max((share for picture in found for row in picture.grid for share in row), default=0.0)
    words = max((share for picture in found for _, share in picture.words), default=0.0)
    said = (
        "The more of its experts a token keeps, mean over the layers, the stronger its colour. Squares of images and words of "
        "questions have scales of their own:"
    )
    keys = [_key(kind, most, closeup.top_k) for kind, most in (("squares", squares), ("words", words)) if most]
    notes = []
    if not any(picture.image for picture in found):
        notes.append(NO_IMAGES)
    elif not all(picture.grid for picture in found if picture.image):
        notes.append(NO_GRID)
    elif not squares:
        notes.append(NONE_KEPT)
    cards = lines(_card(picture, closeup.top_k, squares or 1.0, words or 1.0) for picture in found)
    return lines(
        [
            paragraph(said),
            f'<div class="keys">{lines(keys)}</div>',
            *(paragraph(note, "missing") for note in notes),
            f'<div class="samples">\n{cards}\n</div>',
        ]
    )


def _key(kind: str, most: float, top_k: int) -> str:
    return f'<p class="scale"><span>{kind}: 0</span><i class="{kind}"></i><span>{short(most * top_k)} of {top_k}</span></p>'


def _card(picture: Picture, top_k: int, most: float, most_words: float) -> str:
    tiles = []
    if picture.image:
        source, kind = _source(picture.image)
        tiles.append(_tile("image", f'<img class="{kind}" alt="" src="{source}">'))
        if picture.grid:
            tiles.append(_tile(f"kept: {_kept(picture.grid, top_k)}", _map(picture.grid, source, kind, top_k, most)))
    words = " ".join(_word(word, share, top_k, most_words) for word, share in picture.words)
    heading = f'<h3 class="words">{words}</h3>' if words else f"<h3>{escape(picture.question)}</h3>"
    answers = (
        ("right", picture.reference),
        ("unskipped", _judged(picture.unskipped, picture.reference)),
        ("skipped", _judged(picture.skipped, picture.reference)),
    )
    row = f'<div class="row">{"".join(tiles)}</div>' if tiles else ""
    return f'<article class="sample">{row}{heading}{facts(answers)}</article>'


def _map(grid: Grid, source: str, kind: str, top_k: int, most: float) -> str:
    """The image in grey, below one square a visual token."""
    height, width = len(grid), len(grid[0])
    squares = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" opacity="{0.88 * share / most:.3f}">'
        f"<title>{share * top_k:.2f}</title></rect>"
        for y, row in enumerate(grid)
        for x, share in enumerate(row)
    )
    grey = f'<image class="grey {kind}" href="{source}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="experts kept">{grey}{squares}</svg>'


def _word(word: str, share: float, top_k: int, most: float) -> str:
    strength = 0.85 * share / most
    ink = "; color: #14171b" if strength > 0.4 else ""  # legible on the colour, in the dark too
    return (
        f'<span style="background: rgb(255 166 0 / {strength:.3f}){ink}" title="{share * top_k:.2f}">'
        f"{escape(word.strip()) or ABSENT}</span>"
    )


def _tile(caption: str, content: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _kept(grid: Grid, top_k: int) -> str:
    shares = [share for row in grid for share in row]
    return f"{short(sum(shares) / len(shares) * top_k)} a token"


def _judged(answer: str, reference: str) -> str:
    return f"{'✓' if answer.split() == reference.split() else '✗'} {answer or ABSENT}"


def _source(image: bytes) -> tuple[str, str]:
    """Return an image as an address, and the class of one so small that its own pixels are shown."""
    small = image.startswith(b"\x89PNG")  # a larger one is a JPEG
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(image).decode()}", "pixels" if small else ""
