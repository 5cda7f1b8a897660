"""The experts over kept pairs on NVIDIA GPUs, in Triton: fixed shapes, nothing read on the host, so that CUDA graphs hold them.

``passes/kept_blocks.py`` puts them in the place of ``grouped_mm``. ``ops`` needs Triton, which CUDA builds of torch bring.
"""
