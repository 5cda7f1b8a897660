"""The experts' GEMMs over the rows of kept pairs, compiled for the CPU at hand.

Their weights are read as they lie in memory, each once for all rows of its expert; gathering the rows that go in and adding up
the weighted rows that come out happen in the same pass.
"""
