"""Find every Mixture-of-Experts family of the installed transformers, from its source: no family may be missing in silence."""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

MODELS = Path(transformers.__file__).parent / "models"

NOT_MOE = {
    "bamba": "names num_experts in a shared loss function, has a dense MLP in every layer",
    "esm": "its mixture is one of distributions over bins, in the structure head",
    "gemma4_assistant": "holds gemma4's language model, with its MoE block left out",
    "gemma3n": "routes among copies of the residual stream (AltUp), all of which are computed",
    "granite_docling": "its router picks the number of image tiles, once an image",
    "pi0": "its expert is one dense model for actions",
    "vitpose_backbone": "the caller names the data set, and so the one expert of all tokens",
}
"""Families whose source speaks of experts, routers or mixtures, with the reason why nothing in them can be skipped."""

_WORDS = re.compile(r"[Ee]xpert|[Mm]ixture|[Rr]outer|[Ss]parse_?MLP|(?<![a-z])moe|MoE|Moe|MOE")


def families() -> dict[str, str]:
    """Return every family that may hold MoE layers, with how it was found.

    Returns:
        Directory under ``transformers/models`` -> ``"dispatch"`` (its experts use transformers' interface), ``"own"`` (its
        code names experts, but never that interface) or ``"wraps FAMILY"`` (its default configuration holds such a family's).
    """
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        name = path.parent.name
        if "use_experts_implementation" in source:
            found[name] = "dispatch"
        elif name not in found and _WORDS.search(source) and names_experts(source, name):
            found[name] = "own"
    for name, wrapped in _wrappers():
        if wrapped in found and wrapped not in NOT_MOE:
            found.setdefault(name, f"wraps {wrapped}")
    return found


def names_experts(source: str, family: str) -> bool:
    """Tell whether code (no docstring, comment or message) has a name that speaks of experts, the family's own name aside."""
    own = re.compile(family.replace("_", "_?"), re.IGNORECASE)
    return any(_WORDS.search(own.sub("", name)) for name in _names(ast.parse(source)))


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def _wrappers() -> Iterator[tuple[str, str]]:
    """Yield (family, another one whose configuration, one that knows experts, a default one of the first holds)."""
    for path in sorted(MODELS.glob("*/configuration_*.py")):
        if "sub_configs_defaults = " not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for specs in (getattr(value, "sub_configs_defaults", {}) for value in vars(module).values()):
            for spec in specs.values():
                part = spec.config_class
                if part is AutoConfig and spec.model_type not in CONFIG_MAPPING:
                    continue  # nobody can build that default
                if part is AutoConfig:
                    part = CONFIG_MAPPING[spec.model_type]
                if any("expert" in item.name for item in fields(part)):
                    yield path.parent.name, part.__module__.split(".")[-2]
