"""What the commands share: the console, progress bars, and other libraries kept quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from modes_fx.errors import printable

console = Console()
errors = Console(stderr=True)


class _Steps(logging.Handler):
    """Shows what the package logs: each step as it begins, once in the words it has, and every warning."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record where neither results nor JSON go."""
        said = printable(record.getMessage())
        if console.quiet or said in self._said:
            return
        self._said.add(said)
        errors.print(said, style="yellow" if record.levelno > logging.INFO else "dim", highlight=False, markup=False)


@contextmanager
def steps_shown() -> Iterator[None]:
    """Show long steps on the screen as they begin, for the length of a block."""
    logger, handler = logging.getLogger("modes_fx"), _Steps()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Bars:
    """One progress bar for each part, made when the part first reports; above them each step as it begins."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._steps = steps_shown()

    def __enter__(self) -> Bars:
        self._progress.start()
        self._steps.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._steps.__exit__(None, None, None)
        self._progress.stop()

    def __call__(self, part: str, done: int, total: int | None) -> None:
        """Show that ``done`` steps of a part, of ``total`` or of unknown many, are behind it."""
        if part not in self._tasks:
            for task in self._tasks.values():  # a part begins when the one before it has ended
                self._progress.update(task, total=self._progress.tasks[task].completed)
            self._tasks[part] = self._progress.add_task(part, total=total)
        self._progress.update(self._tasks[part], completed=done, total=total)


def be_quiet() -> None:
    """Keep other libraries' notices off the screen."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch").setLevel(logging.ERROR)
