"""What ``optimize`` does for experts that somebody quantised: teach torchao the grouped product, refuse what has none."""

from __future__ import annotations

from collections.abc import Sequence

from modes_fx.models.layers import MoeLayer, has_torchao_weights
from modes_fx.passes.site import SiteRecord


def support_quantised(layers: Sequence[MoeLayer]) -> dict[int, SiteRecord]:
    """Make the grouped products of these layers' quantised weights work, in the whole process.

    Returns:
        By the layer's index, the reason why it cannot be rewritten: ``QUANTISED_ACTIVATIONS`` or ``QUANTISED_DEVICE``.
    """
    if not any(has_torchao_weights(layer.experts) for layer in layers):
        return {}
    from modes_fx.quantise.int8 import in_few_bits, refusal  # imports torchao, which the model has brought along

    refused = {}
    for index, layer in enumerate(layers):
        for reason in filter(None, map(refusal, layer.experts.parameters())):
            refused[index] = SiteRecord("", layer.name, "rejected", "QUANTISED_ACTIVATIONS", reason)
        elsewhere = {weight.device.type for weight in layer.experts.parameters() if in_few_bits(weight)} - {"cpu", "meta"}
        if elsewhere:
            reason = (
                f"the product goes through quantised experts on the CPU, these are on {', '.join(elsewhere)}: move the model "
                "there, or load its experts unquantised"
            )
            refused[index] = SiteRecord("", layer.name, "rejected", "QUANTISED_DEVICE", reason)
    return refused
