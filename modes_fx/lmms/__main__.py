"""``python -m modes_fx.lmms`` prints the folder to pass to lmms-eval as ``--include_path``."""

import sys

from modes_fx.lmms import TASKS

sys.stdout.write(f"{TASKS}\n")
