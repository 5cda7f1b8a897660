"""``python -m modes_fx``."""

from modes_fx.cli import main

main()
