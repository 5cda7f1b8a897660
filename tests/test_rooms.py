"""The rooms of the package: imports point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import modes_fx

PACKAGE = Path(modes_fx.__file__).parent

ROOMS = {
    "errors": "what may go wrong, and what to do",
    "modality": "text, vision, padding: the classes of tokens",
    "files": "reading and writing",
    "policies": "keep-rules",
    "plan": "thresholds by layer and modality, for each target",
    "kernels": "compute kept pairs alone",
    "passes": "find a site in a graph and rewrite it",
    "report": "how each site ended, and what was skipped",
    "graph": "what a traced model carries",
    "models": "loaded, looked through, converted",
    "quantise": "experts in 8 and 4 bits",
    "attach": "what is put around a model",
    "optimize": "the public functions",
    "data": "samples and batches",
    "calib": "importance and search",
    "demo": "the embedded model and its data",
    "measure": "inspection, comparison, benchmarks and their pages",
    "lmms": "in lmms-eval",
    "serve": "in vLLM",
    "cli": "the command",
}
"""From the ground up, with what is in each: a room imports from itself and from those below it."""


def test_imports_point_down() -> None:
    order = list(ROOMS)
    upwards = [
        f"{file.relative_to(PACKAGE)}:{line} imports {imported}"
        for file in PACKAGE.rglob("*.py")
        if (room := _room(file)) not in {"__init__", "__main__"}
        for line, imported in _imports(file)
        if order.index(imported.split(".")[1]) > order.index(room)
    ]
    assert not upwards


def test_every_room_is_named() -> None:
    assert {_room(file) for file in PACKAGE.rglob("*.py")} - {"__init__", "__main__"} == set(ROOMS)


def test_few_loose_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def _room(file: Path) -> str:
    return Path(file.relative_to(PACKAGE).parts[0]).stem


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines and names of what a module imports of the package, wherever in it; the version is no room's."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "modes_fx":
            yield from ((node.lineno, f"modes_fx.{alias.name}") for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modes_fx."):
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("modes_fx."))
