"""The ``modes-fx`` command, run in this process as a user types it."""

from typing import Any

from typer.testing import CliRunner

from modes_fx import cli


def run(*arguments: object) -> Any:
    """Return what a command printed and its exit code; an error that is no exit is raised, as it is for ``cli.main``."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
