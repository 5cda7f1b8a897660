"""Compile the Triton programs for NVIDIA GPUs, where there may be none, and print what each takes, as JSON.

``python -m tests.kernels.cuda.compiled table`` (or ``tried``): a process of its own, since Triton's interpreter is chosen
when it is imported.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modes_fx.kernels.cuda import programs
from modes_fx.kernels.cuda.epilogues import program_with
from modes_fx.kernels.cuda.sizes import PairSize, Size, pair_sizes_to_try, sizes_to_try

CAPABILITIES = [(8, 0), (8, 6), (9, 0)]
ROWS_AN_EXPERT = [8, 40, 100, 1000]
HIDDEN, INNER, TOP_K, EXPERTS = 2048, 768, 8, 128
"""Of Qwen3-VL-30B-A3B."""
ENDS = {
    "": ("", ""),
    "SiLU": ("halves", "return a * tl.sigmoid(a) * b"),
    "biases": ("", "return a + bias_a"),
    "clamped, biases": ("interleaved", """a = tl.minimum(a + bias_a, 7.0, propagate_nan=tl.PropagateNan.ALL)
b = tl.clamp(b + bias_b, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
return (b + 1.0) * (a * tl.sigmoid(1.702 * a))"""),
}  # fmt: skip
"""How products end: parts and epilogue."""


def compiled(
    program: Any, capability: tuple[int, int], given: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    """Return the bytes of shared memory and of spilled registers of a program, whose arguments are aligned to 16."""
    names = program.arg_names
    source = ASTSource(
        fn=program,
        signature={name: given.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in given if name != "most"},
    )
    architecture = capability[0] * 10 + capability[1]
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        call = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(call, capture_output=True, text=True, check=True)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said.stderr + said.stdout)
    assert spilled, said
    return {"shared": binary.metadata.shared, "spilled": sum(map(int, spilled.groups()))}


class Compiled:
    """Programs for one card and dtype, each with what it takes."""

    def __init__(self, capability: tuple[int, int], kind: str) -> None:
        self.capability, self.kind = capability, kind
        self.named = {"capability": capability, "dtype": kind}
        self.tensors = dict.fromkeys(("x", "weight", "bias", "out"), kind)

    def block(self, size: Size, ends: str) -> dict[str, Any]:
        parts, epilogue = ENDS[ends]
        columns, width = (INNER, HIDDEN) if parts else (HIDDEN, INNER)
        along = "stride_n" if parts == "interleaved" else "stride_d"  # as GPT-OSS stores it
        constants = {
            along: 1, "N": columns, "D": width, "TOP_K": TOP_K, "GATHER": bool(parts), "SCATTER": not parts, "PARTS": parts,
            "BIASED": "bias" in epilogue, "PRECISION": "ieee" if self.kind == "*bf16" else "tf32", "ROWS": size.rows,
            "COLUMNS": size.columns, "INNER": size.inner // (2 if self.kind == "*fp32" else 1),
        }  # fmt: skip
        other = "stride_d" if along == "stride_n" else "stride_n"
        given = {**self.tensors, "order": "*i64", "blocks": "*i32", "most": "i32", "stride_e": "i32", other: "i32"}
        program, options = program_with(programs.block_linear, epilogue), {"num_warps": size.warps, "num_stages": size.stages}
        taken = compiled(program, self.capability, given, constants, **options)
        return {"program": "block_linear", "size": astuple(size), "ends": ends, **self.named, **taken}

    def pairs(self, size: PairSize, row_major: bool, ends: str) -> Iterator[dict[str, Any]]:
        parts, epilogue = ENDS[ends]
        along, other = ("stride_d", "stride_n") if row_major else ("stride_n", "stride_d")
        constants = {
            along: 1, "E": EXPERTS, "N": INNER, "D": HIDDEN, "TOP_K": TOP_K, "BIASED": "bias" in epilogue,
            "COLUMNS": size.columns, "INNER": size.inner,
        }  # fmt: skip
        given = {**self.tensors, "experts": "*i32", "stride_e": "i32", other: "i32"}
        named = {"size": astuple(size), "along": along, "ends": ends, **self.named}
        program, options = program_with(programs.pair_linear, epilogue), {"num_warps": size.warps}
        taken = compiled(program, self.capability, given, {**constants, "PARTS": parts}, **options)
        yield {"program": "pair_linear", **named, **taken}
        if not parts:
            program, given = program_with(programs.pair_combine, epilogue), {**given, "routing": self.kind}
            yield {"program": "pair_combine", **named, **compiled(program, self.capability, given, constants, **options)}

    def others(self) -> Iterator[dict[str, Any]]:
        constants = {"E": EXPERTS, "N": HIDDEN, "TOP_K": TOP_K, "WEIGHTED": True, "COLUMNS": 1024}
        given = {"x": self.kind, "out": self.kind, "experts": "*i32", "routing": self.kind}
        yield {"program": "pair_sum", **self.named, **compiled(programs.pair_sum, self.capability, given, constants)}
        constants = {"E": EXPERTS, "PADDED": EXPERTS, "ROWS": 64, "STEP": 64}
        given = {"ends": "*i32", "blocks": "*i32", "most": "i32"}
        yield {"program": "cut_rows", **self.named, **compiled(programs.cut_rows, self.capability, given, constants)}


def all_compiled(tried: bool) -> Iterator[dict[str, Any]]:
    """Yield what programs take: those that run by default, or those that are tried under ``max-autotune``."""
    for capability, kind in itertools.product(CAPABILITIES, ("*bf16", "*fp32")):
        each = Compiled(capability, kind)
        for ends, (parts, _) in ENDS.items():
            if "biases" in ends and not tried and (capability, kind) != ((8, 6), "*bf16"):
                continue  # what they add is the same on each
            count = 2 if parts else 1
            sizes = [sizes_to_try(capability, rows, count) for rows in ROWS_AN_EXPERT]
            for size in dict.fromkeys(size for some in sizes for size in (some[1:] if tried else some[:1])):
                yield each.block(size, ends)
            for row_major in (True, False):
                pair_sizes = pair_sizes_to_try(row_major, count)
                for pair_size in pair_sizes[1:] if tried else pair_sizes[:1]:
                    yield from each.pairs(pair_size, row_major, ends)
        if not tried:
            yield from each.others()


if __name__ == "__main__":
    json.dump(list(all_compiled(tried="tried" in sys.argv)), sys.stdout)
