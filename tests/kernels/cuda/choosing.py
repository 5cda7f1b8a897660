"""Times by which Triton chooses a size where nothing can be timed: in its interpreter."""

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import triton
from triton.runtime.autotuner import Autotuner


@contextlib.contextmanager
def in_the_interpreter(time_of: Callable[[Callable[[], None]], float]) -> Iterator[None]:
    """Let a program that tries several sizes run each, and take what ``time_of`` that run says; on a GPU, time them."""

    def bench(self: Autotuner, call: Callable[[], None], quantiles: object) -> list[float]:
        call()
        return [time_of(call)] * 3

    if not triton.knobs.runtime.interpret:
        yield
        return
    with patch.object(Autotuner, "do_bench", bench, create=True):
        yield
