"""torch without what it does for its own log, which is most of the time where graphs are small and many."""

import gc
import logging

import torch
import torch._dynamo.guards
import torch._inductor.config


def quicken() -> None:
    """Change torch's settings for this process, and one thread for all: tests run side by side."""
    torch.set_num_threads(1)
    # pytest listens to loggers that do not propagate, and torch writes a trace of every graph as soon as someone listens
    logging.getLogger("torch.__trace").propagate = True
    torch._inductor.config.compile_threads = 1  # a pool of workers takes longer to start than the tiny kernels to compile
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # a time for the log, by emptying caches
    torch._dynamo.guards.get_verbose_code_part = lambda code, _: code  # a line of source for the log, for each guard
    torch._dynamo.config.log_compilation_metrics = False
    if hasattr(torch._dynamo.config, "side_effect_replay_policy"):  # not in 2.11
        torch._dynamo.config.side_effect_replay_policy = "silent"  # else each one's stack is formatted


def freeze_imports() -> None:
    """Keep what is imported out of Python's searches for garbage: they would take a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()
