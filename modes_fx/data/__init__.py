"""Calibration data: from files in the layouts people have them in to batches of a model's forward arguments.

``load_samples`` picks and checks questions with their images and answers; ``make_batches`` turns them into batches through the
model's own processor. Images are opened when a batch is made, never all at once.
"""

from modes_fx.data.collate import Batches, make_batches
from modes_fx.data.layouts import FORMATS
from modes_fx.data.load import LoadReport, Samples, load_samples
from modes_fx.data.sample import Sample

__all__ = ["FORMATS", "Batches", "LoadReport", "Sample", "Samples", "load_samples", "make_batches"]
