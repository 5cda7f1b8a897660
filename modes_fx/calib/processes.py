"""Several processes, each with its share of the data: what they must agree on.

Processes share one ``torch.distributed`` group (``torchrun``, ``accelerate launch`` and ``PartialState`` make it); without one
there is a single process and every function here costs nothing. All processes call these functions in the same order and get
the very same answer, so that all take the same decisions: sums are formed on one process and sent to the others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from modes_fx.errors import CalibrationError

T = TypeVar("T")


def are_launched() -> bool:
    """Say whether ``torchrun`` or ``accelerate launch`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def launched(*, cpu: bool = False) -> Iterator[None]:
    """Join the group of ``torchrun`` or ``accelerate launch``, if one of them started this process, for a block's length.

    Args:
        cpu: Whether the processes leave GPUs alone.
    """
    if _grouped() or not are_launched():
        yield
        return
    from accelerate import PartialState  # type: ignore[import-untyped]

    state = PartialState(cpu=cpu)
    try:
        yield
    finally:
        state.destroy_process_group()


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Return this process's index; 0 is the main process, the only one that writes files and shows progress."""
    return dist.get_rank() if _grouped() else 0


def is_main() -> bool:
    """Say whether this is the main process."""
    return rank() == 0


def total(values: Tensor) -> Tensor:
    """Return the sum over processes, on the CPU.

    Args:
        values: float64 or int64, of one shape on all processes; the integers' sum is exact.
    """
    values = values.detach()
    if world() == 1:
        return values.cpu()
    values = values.to(_device()).clone()
    # Not all_reduce, whose algorithms do not promise every process the same rounding.
    dist.reduce(values, dst=0)
    dist.broadcast(values, src=0)
    return values.cpu()


def gather(value: T) -> list[T]:
    """Return each process's value (anything that pickles), in order of their ranks."""
    if world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled in


def from_main(make: Callable[[], T]) -> T:
    """Return what the main process makes, on all of them; the others do not call ``make``. Its errors are raised on all."""
    if world() == 1:
        return make()
    made: list[T | Exception | None] = [None]
    if is_main():
        try:
            made[0] = make()
        except Exception as error:  # on its way to the other processes, which would wait for ever
            made[0] = error
    dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]  # type: ignore[return-value]


def together(make: Callable[[], T]) -> T:
    """Return what this process makes; an error on one of them is raised on all, so that none waits for it.

    Raises:
        CalibrationError: In place of another process's error of a kind of its own.
    """
    if world() == 1:
        return make()
    made, error = None, None
    try:
        made = make()
    except Exception as raised:  # on its way to the other processes, which would wait for ever
        error = raised
    said = gather(_told(error))
    if error is not None:
        raise error
    if told := next(filter(None, said), None):
        raise CalibrationError(told)
    return made  # type: ignore[return-value]


def _told(error: Exception | None) -> str | None:
    """Return an error as text, which always pickles."""
    if error is None:
        return None
    return str(error) if isinstance(error, CalibrationError) else f"{type(error).__name__} on process {rank()}: {error}"


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Return where the group's backend wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
