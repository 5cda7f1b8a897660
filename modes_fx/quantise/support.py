"""What ``optimize`` does for experts that somebody quantised: teach torchao the grouped product, refuse what has none."""

from __future__ import annotations

from collections.abc import Sequence

from modes_fx.passes.site import SiteRecord
from modes_fx.regions import MoeLayer


def support_quantised(layers: Sequence[MoeLayer]) -> dict[int, SiteRecord]:
    """Make the grouped products of these layers' quantised weights work, in the whole process.

    Returns:
        By the layer's index, the reason why it cannot be rewritten: ``QUANTISED_ACTIVATIONS``.
    """
    weights = {index: list(layer.experts.parameters()) for index, layer in enumerate(layers)}
    if not any(type(weight).__module__.startswith("torchao") for own in weights.values() for weight in own):
        return {}
    from modes_fx.quantise.int8 import refusal  # imports torchao, which the model has brought along

    refused = {index: reason for index, own in weights.items() for weight in own if (reason := refusal(weight)) is not None}
    return {
        index: SiteRecord("", layers[index].name, "rejected", "QUANTISED_ACTIVATIONS", reason)
        for index, reason in refused.items()
    }
