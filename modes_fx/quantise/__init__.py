"""Experts whose weights are stored in 8 or 4 bits; the arithmetic stays that of the model's own dtype (weight-only).

Weights are torchao's tensors, so a model that torchao or transformers (``TorchAoConfig``) quantised is optimised as it is::

    weight [E, 2I, H], a tensor subclass  ->  stock dispatch in dynamo's graph, which the pass rewrites as ever
                                          ->  AOT opens the subclass  ->  modes_fx::grouped_mm_int8 on plain tensors

torchao multiplies 2-D weights only; ``int8`` and ``int4`` add the grouped product, ``grouped_mm`` computes it expert by expert:
an expert that no pair keeps is neither read nor dequantised.
"""

from modes_fx.quantise.experts import quantise_experts

__all__ = ["quantise_experts"]
