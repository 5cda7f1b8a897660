"""inspect(): which routing sites of a model would be rewritten, told from its config alone, before any weight is loaded."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import nn

from modes_fx.attach.optimized import report_of, trace_sites
from modes_fx.errors import ModelError
from modes_fx.files.strict_json import INSPECTION_SCHEMA
from modes_fx.modality import token_ids_for
from modes_fx.models.layers import MoeLayer, find_moe_layers, no_moe_layer
from modes_fx.optimize import is_optimized, optimized_state
from modes_fx.report import Report, SiteReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class InspectedSite(SiteReport):
    """One MoE layer's routing site, and its sizes; any number of tokens T may reach it.

    Attributes:
        family: ``model_type`` of the config that the experts were built from.
        hidden_size: H, width of the rows that the experts take.
        expert_width: I, width between an expert's two GEMMs.
        parameters: Parameters of all E experts.
    """

    family: str = ""
    hidden_size: int = 0
    expert_width: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Inspection(Report):
    """What ``optimize`` would find in a model and do to it; ``str()`` of it is a table.

    Attributes:
        sites: One ``InspectedSite`` for each MoE layer.
        family: ``model_type`` of the model's config.
        dtype: Of the experts' weights, such as ``"bfloat16"``; of all weights where there are no experts.
        device: Where the model is meant to run; it decides the dispatch.
        parameters: Parameters of the whole model.
        vision_token_ids: Placeholder ids by which visual tokens are told from text; () for a text model.
        notes: Sentences on what the sites do not show.
    """

    sites: tuple[InspectedSite, ...]
    family: str = ""
    dtype: str = ""
    device: str = "cpu"
    parameters: int = 0
    vision_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts that a router chooses among."""
        return sum(site.parameters for site in self.sites)

    @property
    def active_parameters(self) -> int | None:
        """All parameters but those of the E - K experts that a token's routers do not choose; None where K is unknown."""
        if not all(site.top_k and site.num_experts for site in self.sites):
            return None
        unused = (site.parameters * (site.num_experts - site.top_k) // site.num_experts for site in self.sites)
        return self.parameters - sum(unused)

    @property
    def headline(self) -> str:
        """The answer in one sentence."""
        if not self.sites:
            return f"No routing site found in {self.model}, {_count(self.parameters)} parameters."
        share = f"{self.expert_parameters / self.parameters:.0%} of {_count(self.parameters)} parameters are experts'"
        active = "" if self.active_parameters is None else f"; {_count(self.active_parameters)} are active a token"
        return f"{len(self.rewritten)} of {self.found} routing sites of {self.model} rewritten; {share}{active}."

    def rows(self, *, each: bool = False) -> list[tuple[tuple[str, ...], InspectedSite]]:
        """Return the table's rows, each with a site that it shows.

        Args:
            each: One row for each site. Otherwise sites alike over layers share one, as ``model.layers.{0-47}.mlp.experts``.
        """
        alike: dict[InspectedSite, list[int]] = {}
        for site in self.sites:
            path, layer = (site.name, []) if each else _layer_apart(site.name)
            alike.setdefault(replace(site, name=path), []).extend(layer)
        return [(_row(site, site.name.replace("{}", _ranges(layers))), site) for site, layers in alike.items()]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values; the keys stay as they are while ``schema`` does."""
        from modes_fx.calib.trials import versions  # calibration is not needed to look at a model

        return {
            "schema": INSPECTION_SCHEMA,
            "model": self.model,
            "family": self.family,
            "dtype": self.dtype,
            "device": self.device,
            "found": self.found,
            "rewritten": len(self.rewritten),
            "parameters": self.parameters,
            "expert_parameters": self.expert_parameters,
            "active_parameters": self.active_parameters,
            "vision_token_ids": list(self.vision_token_ids),
            "notes": list(self.notes),
            "versions": versions(),
            "sites": [asdict(site) for site in self.sites],
        }

    def to_json(self) -> str:
        """Return ``as_dict()`` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        rows = [row for row, _ in self.rows()]
        table = tabulate(rows, headers=HEADINGS, disable_numparse=True, colalign=("left", "left", *["right"] * 5, "left"))
        return "\n".join([self.headline, *([table] if rows else []), *self.explanations()])

    def explanations(self) -> list[str]:
        """Return a sentence for each reason of a rejection, what to do about it, and the notes."""
        return [*super().explanations(), *self.notes]


HEADINGS = ("site", "family", "T", "K", "E", "H", "I", "dispatch")


def _row(site: InspectedSite, path: str) -> tuple[str, ...]:
    verdict = f"{site.form} -> {site.dispatch}" if site.status != "rejected" else site.code
    sizes = (size or "?" for size in (site.top_k, site.num_experts, site.hidden_size, site.expert_width))
    return path, site.family, "any", *map(str, sizes), verdict


def inspect(
    model: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Say which routing sites of a model ``optimize`` would rewrite, and why not the others.

    A model that is named, or given by its config, is built without weights (on the meta device) and each of its MoE blocks is
    traced as ``optimize`` does: a minute and little memory suffice for models of any size. A model that is given stays as it
    was, optimised ones too.

    Args:
        model: A model, a config, a folder that holds a ``config.json``, such a file, or the id of a hub model.
        device: Where the model is meant to run, which decides the dispatch. None takes the given model's, else the CPU.
        trust_remote_code: Whether Python code that comes with a named model may run.

    Raises:
        ModelError: There is no such model, or it cannot be built.
        CompilerError: torch.compile is switched off.
    """
    wanted = _device(device)
    if not isinstance(model, nn.Module):
        from modes_fx.models.meta_model import build_on_meta, read_config

        config = read_config(model, trust_remote_code=trust_remote_code) if isinstance(model, (str, os.PathLike)) else model
        model = build_on_meta(config, trust_remote_code=trust_remote_code)
    # An optimised model's stand-ins serve here too: converting its blocks once more would take their weights away.
    layers = optimized_state(model).layers if is_optimized(model) else find_moe_layers(model)
    weight = next((layers[0].experts if layers else model).parameters(), torch.empty(0))
    on = wanted or weight.device
    on = torch.device("cpu") if on.type == "meta" else on
    facts: dict[str, Any] = {
        "model": type(model).__name__,
        "region": "moe",
        "family": getattr(getattr(model, "config", None), "model_type", ""),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": on.type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vision_token_ids": token_ids_for(model)[0],
    }
    if not layers:
        return Inspection(**facts, sites=(), notes=(no_moe_layer(model), *_notes(model)))
    with _uncompiled(model):
        state = trace_sites(model, layers, "moe", "compact" if on.type == "cpu" else "static", "threshold")
        traced = zip(report_of(state).sites, state.layers, strict=True)
        sites = tuple(_inspected(site, layer, facts["family"]) for site, layer in traced)
        state.undo()
    return Inspection(**facts, sites=sites, notes=_notes(model))


def _device(wanted: str | torch.device | None) -> torch.device | None:
    try:
        return None if wanted is None else torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(f"Unknown device {str(wanted)!r}; known: cpu, cuda and torch's others.") from error


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let the modules' own code be traced, not what an earlier ``optimize`` or ``Module.compile`` put in front of it."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def _inspected(site: SiteReport, layer: MoeLayer, family: str) -> InspectedSite:
    config: Any = getattr(layer.experts, "config", None)
    known = asdict(site)
    known["top_k"] = site.top_k or getattr(config, "num_experts_per_tok", None) or 0
    if layer.form is not None:  # refused: what its experts are is not known
        parameters = sum(parameter.numel() for parameter in layer.experts.parameters())
        return InspectedSite(**known, family=family, parameters=parameters)
    source: Any = getattr(layer.experts, "source", layer.experts)  # a stand-in's may compute with another module's weights
    down: Any = getattr(source, "down_proj", None)  # [E, H, I], or [E, I, H] where transposed
    transposed = getattr(layer.experts, "is_transposed", False)
    known["num_experts"] = site.num_experts or down.shape[0]
    return InspectedSite(
        **known,
        family=getattr(config, "model_type", family),
        hidden_size=layer.hidden_size,
        expert_width=0 if down is None else down.shape[-2 if transposed else -1],
        parameters=sum(parameter.numel() for parameter in layer.experts.parameters()),
    )


def _notes(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    vision_ids, sees_images = token_ids_for(model)
    notes = []
    if sees_images and not vision_ids:
        notes.append(
            "The config names no placeholder id of visual tokens: run forwards inside `with modes_fx.token_modality(ids):`."
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        notes.append(
            f"The checkpoint is quantised ({method}): this holds for the model loaded dequantised, since quantised experts may "
            "bring a dispatch of their own."
        )
    return tuple(notes)


def _layer_apart(path: str) -> tuple[str, list[int]]:
    """Put ``{}`` for the last number in a module's path, the layer's; return the number too, if there is one."""
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return path, []
    layer, parts[numbers[-1]] = int(parts[numbers[-1]]), "{}"
    return ".".join(parts), [layer]


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ``{0-2,5}``, one alone as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _count(number: int) -> str:
    """Write a number of parameters: ``31.1 B``."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
