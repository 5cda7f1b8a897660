"""A model family: how to build a tiny random model of it, what to feed it, and what is expected of ``optimize``."""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import modes_fx
from modes_fx.errors import NoRoutingSiteError
from tests import oracle
from tests.families.shrink import VOCABULARY, tiny_config


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Attributes:
        name: The directory under ``transformers/models``; WRAPPER-FAMILY where one holds any language model.
        build: Makes the tiny model: in evaluation mode, float32, the same weights every time.
        inputs: Makes the keyword arguments of one forward.
        expected: ``"rewritten"``, ``"converted"`` (its loop over experts was, then rewritten) or ``"rejected:CODE"``, where
            ``NOT_FOUND`` says that ``optimize`` knows no MoE layer in it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    expected: str = "rewritten"


def token_ids() -> dict[str, Tensor]:
    """Return two sequences of nine tokens."""
    return {"input_ids": torch.randint(2, VOCABULARY - 4, (2, 9), generator=torch.Generator().manual_seed(0))}


def family(
    name: str,
    expected: str = "rewritten",
    *,
    kind: str | None = None,
    auto: Any = transformers.AutoModelForCausalLM,
    inputs: Callable[[], dict[str, Tensor]] = token_ids,
    **changes: Any,
) -> Family:
    """Describe a family whose model an auto class makes from a configuration.

    Args:
        name: The directory under ``transformers/models``.
        expected: See ``Family``.
        kind: The configuration's model type, where it differs from the name.
        auto: An auto class, or the model's own class.
        inputs: See ``Family``.
        changes: See ``tiny_config``.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(name.encode()))
            config = tiny_config(kind or name, **changes)
            return spread(auto.from_config(config) if hasattr(auto, "from_config") else auto(config))

    return Family(name, build, inputs, expected)


def spread(model: nn.Module) -> nn.Module:
    """Give a model random weights that matter: the stock ones make routed outputs so small that no test would miss them."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            if "bias" in name:
                tensor.normal_(std=0.3)
            elif tensor.dim() >= 2 and isinstance(tensor, nn.Parameter):
                tensor.normal_(std=1.0 if "gate.weight" in name or "router" in name else 0.3)
    return model.eval()


def outcome(model: nn.Module) -> str:
    """Optimise a model and say how that ended, as ``Family.expected`` does."""
    dispatching = len(oracle.experts_of(model))
    try:
        modes_fx.optimize(model)
    except NoRoutingSiteError as error:
        return "rejected:" + ("+".join(re.findall(r"\d+ x (\w+)", str(error))) or "NOT_FOUND")
    report = modes_fx.report(model)
    if report.rejected:
        return "rejected:" + "+".join(sorted({site.code for site in report.rejected}))
    return "rewritten" if report.found == dispatching else "converted"
