"""Kernels that compute kept pairs alone: ``cpu`` in C++, ``cuda`` in Triton.

``passes/kept_gemms.py`` and ``passes/kept_blocks.py`` put them in the place of ``grouped_mm``, and ``passes/dense.py`` one of
them in the place of other linear layers that meet few rows.
"""
