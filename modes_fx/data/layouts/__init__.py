"""The layouts in which calibration data is read, one a file: each says what it reads, and how it is told from the others."""

from __future__ import annotations

from pathlib import Path

from modes_fx.data.layouts import coco, gqa, jsonl, table, videommmu
from modes_fx.data.layouts.layout import Layout
from modes_fx.errors import CalibrationError

_LAYOUTS = (jsonl.LAYOUT, gqa.LAYOUT, videommmu.LAYOUT, coco.LAYOUT, table.LAYOUT)  # the general one last
FORMATS = tuple(layout.name for layout in _LAYOUTS)


def find_layout(source: Path, name: str | None) -> Layout:
    """Return the layout of that name, or the first that the files fit.

    Raises:
        CalibrationError: There is no such layout, or none fits.
    """
    for layout in _LAYOUTS:
        if layout.name == name or (name is None and layout.fits(source)):
            return layout
    if name is not None:
        raise CalibrationError(f"Unknown data format {name!r}; known: {', '.join(FORMATS)}.")
    raise CalibrationError(f"Cannot tell the format of {source}. Pass one of: {', '.join(FORMATS)} (--data-format).")
