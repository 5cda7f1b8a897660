"""How much memory weights take, quantised ones with their scales."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all parameters of these modules, shared ones once; a tensor subclass by the tensors inside."""
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(map(_bytes, parameters.values()))


def _bytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)
