"""The Triton programs as they are compiled for NVIDIA GPUs, here where there is none."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (9, 0): 227 * 1024}
"""The most shared memory of a block, by compute capability: CUDA C++ Programming Guide, "Technical Specifications"."""


def said_by(module: str, *arguments: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


@pytest.mark.wide
@pytest.mark.parametrize("sizes", ["table", pytest.param("tried", marks=pytest.mark.slow)])
def test_no_program_spills_registers_or_takes_more_shared_memory_than_its_card_has(sizes: str) -> None:
    programs = said_by("tests.kernels.cuda.compiled", sizes)
    named = {program["program"] for program in programs}
    assert named >= {"block_linear", "pair_linear", "pair_combine"}
    assert named >= {"cut_rows", "pair_sum"} or sizes == "tried"
    assert [program for program in programs if program["spilled"]] == []
    for program in programs:
        assert program["shared"] <= SHARED[tuple(program["capability"])], program


@pytest.mark.wide
def test_inductor_sees_the_programs_and_the_sizes_to_try() -> None:
    traced = said_by("tests.kernels.cuda.traced")
    tried = {"one": [1, 1, 1, 1, 1, 1], "several": [1, 5, 5, 1, 3, 3]}  # that differ, for these few columns
    for name, sizes in tried.items():
        for calls in traced[name]:
            programs = [call.partition(" changes ")[2] for call in calls if "triton_kernel_wrapper_functional" in call]
            changed = ["blocks", "out", "out", "out", "out", "out"]
            assert programs == [f"{result}, of {count} sizes" for result, count in zip(changed, sizes, strict=True)]
            assert not [call for call in calls if "modes_fx" in call]
    assert traced["code"] == [0, 5, 5, 0, 3, 3]
