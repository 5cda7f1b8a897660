"""What ``optimize`` puts around a model and takes away again.

``watch`` and ``protection`` see which tokens a forward holds, ``probe`` finds out how each layer's site ends, ``regions`` are
what is compiled for models that are called from Python, and ``optimized`` holds it all together.
"""
