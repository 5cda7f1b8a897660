"""Every reason code that the code names is explained, none is explained in vain, and one that is not cannot be raised."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import modes_fx
from modes_fx.passes.reasons import REASONS
from modes_fx.passes.site import Reject, SiteRecord

POSITIONS = {"Reject": 0, "_refusing": 0, "SiteRecord": 3}


def test_each_code_of_the_package_is_explained_and_no_other() -> None:
    assert set(codes()) == set(REASONS)


def test_each_explanation_is_made_of_sentences() -> None:
    for reason in REASONS.values():
        assert reason.meaning.endswith(".")
        assert reason.advice.endswith(".")


def test_a_code_that_nobody_explains_cannot_be_raised() -> None:
    with pytest.raises(ValueError, match="'NO_SUCH_CODE' is not explained"):
        Reject("NO_SUCH_CODE", "for a test")


def test_a_site_cannot_be_rejected_with_it_either() -> None:
    with pytest.raises(ValueError, match="'' is not explained"):
        SiteRecord("histc", "", "rejected")


def codes() -> Iterator[str]:
    for file in Path(modes_fx.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in POSITIONS):
                continue
            position = POSITIONS[node.func.id]
            code = node.args[position] if len(node.args) > position else None
            if isinstance(code, ast.Constant) and code.value:
                yield str(code.value)
