"""What is imported before a command has something to do, and by ``import modes_fx`` alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer.main

import modes_fx
from modes_fx import cli
from modes_fx.demo import CHECKPOINT

HEAVY = {
    "PIL", "accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "pandas", "pyarrow", "safetensors", "scipy",
    "sympy", "torch", "torchvision", "transformers",
}  # fmt: skip
RUN = """
import json, sys
sys.argv = ["modes-fx"]
from modes_fx import cli
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    print("\\n" + json.dumps([arguments, code, sorted({name.partition(".")[0] for name in sys.modules})]), flush=True)
"""


def python(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with the package at hand, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(modes_fx.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], input=given, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def commands(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    command = command or typer.main.get_command(cli.app)
    below = [each for name, part in getattr(command, "commands", {}).items() for each in commands(part, (*path, name))]
    return [path, *below]


def outputs() -> set[tuple[str, str]]:
    """Return each option of a command that names a file or a folder, but not either."""
    found = set()
    for command in cli.app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            option = next(iter(getattr(hint, "__metadata__", ())), None)
            if option is not None and not (option.file_okay and option.dir_okay):
                spelled = option.default if isinstance(option.default, str) else f"--{name}"  # where typer keeps a first name
                found.add((command.name or command.callback.__name__, spelled))
    return found


def outcomes(cases: list[tuple[str, ...]]) -> list[tuple[list[str], int, set[str]]]:
    done = python("-c", RUN, given=json.dumps(cases))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(rows) == len(cases)
    return [(arguments, code, set(modules)) for arguments, code, modules in rows]


def test_help_version_and_wrong_options_import_nothing_heavy() -> None:
    every = commands()
    assert {("calibrate",), ("plan", "sign")} <= set(every)
    cases = [("--version",), ("nonsense",)] + [(*path, option) for path in every for option in ("--help", "--nonsense")]
    for arguments, code, modules in outcomes(cases):
        assert code == (0 if arguments[-1] in ("--help", "--version") else 2), arguments
        assert not modules & HEAVY, arguments


def test_what_cannot_be_read_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    none, broken, demo = str(tmp_path / "none"), str(tmp_path / "config.json"), str(CHECKPOINT)
    Path(broken).write_text('{"model_type": ')
    cases: list[tuple[str, ...]] = [
        ("demo", "--checkpoint", none),
        ("inspect", none),
        ("inspect", broken),
        ("inspect", broken, "--json"),
        ("calibrate", none, "--data", demo),
        ("calibrate", demo),
        ("calibrate", demo, "--data", none),
        ("calibrate", demo, "--data", demo, "--mode", "none"),
        ("calibrate", demo, "--data", demo, "--method", "none"),
        ("search", none, "--data", demo),
        ("search", demo, "--data", demo, "--importance", none),
        ("search", demo, "--data", demo, "--importance", broken),
        ("compare", none, "--data", demo, "--test-data", demo),
        ("compare", demo, "--data", none, "--test-data", demo),
        ("compare", demo, "--data", demo, "--test-data", none),
        ("compare", demo, "--data", demo),
        ("import-reference", none, "--importance", demo, "--tau", demo),
        ("import-reference", demo, "--importance", none, "--tau", broken),
        ("plan", "check", none),
        ("plan", "sign", broken),
    ]
    for arguments, code, modules in outcomes(cases):
        assert code == 1, arguments
        assert not modules & HEAVY, arguments


def test_an_output_that_cannot_be_written_is_told_before_anything_heavy_is_imported() -> None:
    demo = str(CHECKPOINT)
    cases: list[tuple[str, ...]] = [
        ("demo", "--out", "/proc/demo"),
        ("calibrate", demo, "--data", demo, "--out", "/proc/x.json"),
        ("calibrate", demo, "--data", demo, "--journal", "/proc/x.jsonl"),
        ("search", demo, "--data", demo, "--out", "/proc/x.json"),
        ("search", demo, "--data", demo, "--journal", "/proc/x.jsonl"),
        ("compare", demo, "--data", demo, "--test-data", demo, "--out", "/proc/out"),
        ("compare", demo, "--data", demo, "--test-data", demo, "--journal", "/proc/x.jsonl"),
        ("bench", "--json", "/proc/x.json"),
        ("bench", "--plot", "/proc/x.svg"),
        ("import-reference", demo, "--importance", demo, "--tau", demo, "--out", "/proc/x.json"),
    ]
    assert outputs() == {(case[0], case[-2]) for case in cases}
    for arguments, code, modules in outcomes(cases):
        assert code == 2, arguments
        assert not modules & HEAVY, arguments


def test_a_value_that_no_machine_can_take_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    demo, none = str(CHECKPOINT), str(tmp_path / "none")
    refused: list[tuple[str, ...]] = [
        ("bench", "--preset", "none"),
        ("bench", "--parts", "block", "none"),
        ("bench", "--tokens", "0"),
        ("bench", "--skip", "1"),
        ("bench", "--threads", "0"),
        ("bench", "--skew", "none"),
        ("bench", "--parts", "layers", "--plot", str(tmp_path / "plot.svg")),
        ("search", demo, "--data", demo, "--held-out", none),
        ("compare", demo, "--data", demo, "--test-data", demo, "--importance-mode", "none"),
        ("compare", demo, "--data", demo, "--test-data", demo, "--phase", "none"),
    ]
    misspelled: list[tuple[str, ...]] = [
        ("bench", "--rounds", "0"),
        ("search", demo, "--data", demo, "--targets", "0.5", "1.5"),
        ("search", demo, "--data", demo, "--gammas", "inf"),
        ("search", demo, "--data", demo, "--time-budget", "soon"),
        ("compare", demo, "--data", demo, "--test-data", demo, "--targets", "2"),
    ]
    for arguments, code, modules in outcomes(refused + misspelled):
        assert code == (1 if tuple(arguments) in refused else 2), arguments
        assert not modules & HEAVY, arguments


def test_the_module_starts_as_the_script_does() -> None:
    done = python("-X", "importtime", "-m", "modes_fx", "--help")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert (done.returncode, "typer" in imported, imported & HEAVY) == (0, True, set())


PROGRAM = """
import modes_fx, sys
assert not {"sympy", "torch._dynamo", "transformers", "modes_fx.optimize"} & sys.modules.keys(), "imports too much"
import torch
ops = [torch.ops.modes_fx.keep.default, torch.ops.modes_fx.linear.default, torch.ops.modes_fx.sort_pairs.default]
assert "modes_fx" in torch.compiler.list_backends(), "no backend"
import modes_fx.optimize, modes_fx.report
assert callable(modes_fx.optimize) and callable(modes_fx.report), "a submodule stands in a function's place"
assert {"optimize", "SkipPlan", "stats"} <= set(dir(modes_fx)), dir(modes_fx)
assert [getattr(modes_fx, name).__name__ for name in modes_fx.__all__] == modes_fx.__all__
from modes_fx import *
assert optimize is modes_fx.optimize
"""


def test_a_program_that_imports_the_package_has_its_operations_and_its_backend_and_each_name_once_it_asks() -> None:
    done = python("-W", "error::ImportWarning", "-c", PROGRAM)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_none_is_refused_as_ever() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        modes_fx.optimise  # noqa: B018
