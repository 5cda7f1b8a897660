"""A small MoE vision-language model, shipped with the package, and the data it was trained for.

It is of the real class, `Qwen3VLMoeForConditionalGeneration`, trained on handwritten digits; it needs no network.
"""

from modes_fx.demo.data import Sample, as_data, collate, make_batches, make_samples
from modes_fx.models.embedded import load
from modes_fx.models.locating import CHECKPOINT

__all__ = ["CHECKPOINT", "Sample", "as_data", "collate", "load", "make_batches", "make_samples"]
