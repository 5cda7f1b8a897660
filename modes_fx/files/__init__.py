"""Files: how they are written, and how what they hold is typed, limited and known to be whole. Imports nothing heavy."""
