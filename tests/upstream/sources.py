"""Import transformers' own tests from where ``make test-upstream`` put them; two parts of them are not published."""

import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / ".upstream"
_PACKAGE = "transformers_tests"
_NOT_PUBLISHED = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def make_importable() -> None:
    """Let ``transformers_tests.test_modeling_common`` be imported; mixins that it lacks have no tests."""
    if not (FOLDER / _PACKAGE).is_dir():
        raise FileNotFoundError(
            f"transformers' tests are not in {FOLDER}: run them by `make test-upstream`, which fetches them."
        )
    sys.path.insert(0, str(FOLDER))
    for path, mixin in _NOT_PUBLISHED.items():
        for name in (path.split(".")[0], path):
            sys.modules[f"{_PACKAGE}.{name}"] = ModuleType(f"{_PACKAGE}.{name}")
        setattr(sys.modules[f"{_PACKAGE}.{path}"], mixin, type(mixin, (), {}))
