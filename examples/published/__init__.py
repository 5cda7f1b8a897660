"""What ``examples/paper.py`` compares with: MoDES's published figures, and the memory and time that ours will take."""
