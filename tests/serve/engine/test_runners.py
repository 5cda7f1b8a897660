"""vLLM's second model runner, which needs Triton and so does not run here: its own classes have what the plug-in reads."""

import numpy as np
import pytest
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - as its CPU worker does first: buffers that want no GPU
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.states import RequestState

from modes_fx.serve.batch import of_runner_v2
from modes_fx.serve.thresholds import Thresholds
from modes_fx.serve.worker import _follow

CPU = torch.device("cpu")
IMAGE = 60


class Runner(CPUModelRunner):
    """The runner without a model: three requests in a batch of nine tokens, two of which are of an image."""

    def __init__(self) -> None:
        self.req_states = RequestState(4, 64, 16, 0, 128, CPU)
        self.req_states.prompt_len.np[:3] = (8, 2, 1)  # a prompt's end and on, a chunk's, and generated tokens alone
        self.dummies = 0

    def prepare_inputs(self, *_: object) -> InputBatch:
        batch = InputBatch.make_dummy(3, 9, InputBuffers(4, 16, CPU))
        batch.num_computed_tokens_np[:] = (6, 0, 5)
        batch.input_ids[:2] = IMAGE
        batch.num_tokens_after_padding = 12
        return batch

    def _dummy_run(self, *_: object) -> None:
        self.dummies += 1


def test_the_batch_it_prepares() -> None:
    runner = Runner()
    visual = torch.tensor([IMAGE], dtype=torch.int32)
    classes = of_runner_v2(runner, runner.prepare_inputs(), visual)
    assert classes.tolist() == [1, 1, 2, 0, 0, 2, 2, 2, 2]


def test_following_it() -> None:
    runner = Runner()
    thresholds = Thresholds([2], 16, CPU)
    _follow(runner, thresholds, torch.tensor([], dtype=torch.int32))
    batch = runner.prepare_inputs()
    assert thresholds.batch == batch.num_tokens_after_padding == 12
    assert np.array_equal(thresholds.classes[:12], [0, 0, 2, 0, 0, 2, 2, 2, 2, 4, 4, 4])
    runner._dummy_run()
    assert runner.dummies == 1
    assert thresholds.batch == 0


@pytest.mark.parametrize("name", ["prepare_inputs", "_dummy_run"])
def test_it_has_the_methods_that_are_followed(name: str) -> None:
    assert callable(getattr(CPUModelRunner, name))
    assert not hasattr(CPUModelRunner, "_preprocess")  # by which the first is known
