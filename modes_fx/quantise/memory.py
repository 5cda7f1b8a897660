"""What a quantised weight is made of, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a tensor subclass holds, its values and scales; a plain tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_parts(getattr(tensor, name))


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all parameters of these modules, shared ones once; quantised ones with their scales."""
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(part.nbytes for parameter in parameters.values() for part in plain_parts(parameter))
