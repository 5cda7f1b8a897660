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


def said_by(module: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_no_program_spills_registers_or_takes_more_shared_memory_than_its_card_has() -> None:
    programs = said_by("tests.kernels.cuda.compiled")
    named = {program["program"] for program in programs}
    assert named == {"cut_rows", "block_linear", "pair_sum", "pair_linear", "pair_combine"}
    assert [program for program in programs if program["spilled"]] == []
    for program in programs:
        assert program["shared"] <= SHARED[tuple(program["capability"])], program


def test_inductor_sees_the_programs_and_that_they_change_their_results_alone() -> None:
    for calls in said_by("tests.kernels.cuda.traced"):
        programs = [call.partition(" changes ")[2] for call in calls if "triton_kernel_wrapper_functional" in call]
        assert programs == ["blocks", "out", "out", "out", "out", "out"]
        assert not [call for call in calls if "modes_fx" in call]
