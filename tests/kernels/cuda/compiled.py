"""Compile the Triton programs for NVIDIA GPUs, where there may be none, and print what each takes, as JSON.

``python -m tests.kernels.cuda.compiled``: a process of its own, since Triton's interpreter is chosen when it is imported.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modes_fx.kernels.cuda import programs
from modes_fx.kernels.cuda.sizes import PAIR_TILE, PAIR_TILE_TURNED, size_of

CAPABILITIES = [(8, 0), (8, 6), (9, 0)]
ROWS_AN_EXPERT = [8, 40, 100, 1000]
HIDDEN, INNER, TOP_K, EXPERTS = 2048, 768, 8, 128
"""Of Qwen3-VL-30B-A3B."""


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


def all_compiled() -> Iterator[dict[str, Any]]:
    for capability in CAPABILITIES:
        for kind, precision in (("*bf16", "ieee"), ("*fp32", "tf32")):
            names = dict.fromkeys(("x", "weight", "out"), kind)
            strides = {"stride_e": "i32", "stride_n": "i32"}
            named = {"capability": capability, "dtype": kind}
            for rows in ROWS_AN_EXPERT:
                size = size_of(capability, rows)
                inner = size.inner // (2 if kind == "*fp32" else 1)
                for gated, columns, width in (("silu", INNER, HIDDEN), ("", HIDDEN, INNER)):
                    constants = {
                        "stride_d": 1, "N": columns, "D": width, "TOP_K": TOP_K, "GATHER": bool(gated), "SCATTER": not gated,
                        "GATED": gated, "PRECISION": precision, "ROWS": size.rows, "COLUMNS": size.columns, "INNER": inner,
                    }  # fmt: skip
                    given = {**names, "order": "*i64", "blocks": "*i32", "most": "i32", **strides}
                    options = {"num_warps": size.warps, "num_stages": size.stages}
                    taken = compiled(programs.block_linear, capability, given, constants, **options)
                    yield {"program": "block_linear", "rows": rows, "gated": gated, **named, **taken}
            for (columns, inner), stride in ((PAIR_TILE, "stride_d"), (PAIR_TILE_TURNED, "stride_n")):
                other = {"stride_e": "i32", "stride_d" if stride == "stride_n" else "stride_n": "i32"}
                sizes = {stride: 1, "E": EXPERTS, "N": INNER, "D": HIDDEN, "TOP_K": TOP_K, "COLUMNS": columns, "INNER": inner}
                given = {**names, "experts": "*i32", **other}
                taken = compiled(programs.pair_linear, capability, given, {**sizes, "GATED": "silu"})
                yield {"program": "pair_linear", "along": stride, **named, **taken}
                taken = compiled(programs.pair_combine, capability, {**given, "routing": kind}, sizes)
                yield {"program": "pair_combine", "along": stride, **named, **taken}
            constants = {"E": EXPERTS, "N": HIDDEN, "TOP_K": TOP_K, "WEIGHTED": True, "COLUMNS": 1024}
            given = {"x": kind, "out": kind, "experts": "*i32", "routing": kind}
            yield {"program": "pair_sum", **named, **compiled(programs.pair_sum, capability, given, constants)}
        constants = {"E": EXPERTS, "PADDED": EXPERTS, "ROWS": 64, "STEP": 64}
        given = {"ends": "*i32", "blocks": "*i32", "most": "i32"}
        taken = compiled(programs.cut_rows, capability, given, constants)
        yield {"program": "cut_rows", "capability": capability, **taken}


if __name__ == "__main__":
    json.dump(list(all_compiled()), sys.stdout)
