"""What is timed: stock settings, vLLM's kernel and modes-fx, all on one set of weights but where they are packed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from modes_fx.errors import ModelError, in_a_line
from modes_fx.measure.bench import peer
from modes_fx.measure.bench.models import Routing
from modes_fx.measure.twins import OURS, Setting, as_one_graph, stock_twin
from modes_fx.models.layers import Region
from modes_fx.optimize import optimize, set_plan
from modes_fx.plan import SkipPlan

Kind = Literal["stock", "peer", "ours"]

DEFAULT = Setting("grouped_mm")  # the setting that transformers itself takes

BLOCK_SETTINGS = (
    DEFAULT, Setting("grouped_mm", "moe"), Setting("eager"), Setting("eager", "moe"), Setting("batched_mm"),
    Setting("batched_mm", "moe"),
)  # fmt: skip
# Of layers not the loop compiled: it breaks into graphs by expert, and compiling them takes minutes. Eager attention is slower
# on its own, but a compiler fuses what it does for one token.
LAYER_SETTINGS = (
    DEFAULT, Setting("grouped_mm", "moe"), Setting("grouped_mm", "layer"), Setting("grouped_mm", "model"), Setting("eager"),
    Setting("batched_mm"), Setting("batched_mm", "moe"), Setting("batched_mm", "layer"), Setting("batched_mm", "model"),
    Setting("batched_mm", "layer", "eager"), Setting("batched_mm", "model", "eager"),
)  # fmt: skip
ONE_GRAPH_SETTINGS = (
    Setting("grouped_mm", "graph"), Setting("batched_mm", "graph"), Setting("grouped_mm", "graph", "eager"),
    Setting("batched_mm", "graph", "eager"),
)  # fmt: skip
_FEW = 8  # tokens: batched_mm copies each pair's weights, eager attention holds all scores


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    Attributes:
        name: As rows show it.
        kind: Whose it is.
        model: What runs; it shares its weights with all others, unless it holds packed ones.
        skip: Ratio of pairs that its thresholds are to skip.
        taus: Thresholds on the dispatched weights of (text, visual) tokens; None keeps all pairs.
        static: Whether it decodes over a static cache.
    """

    name: str
    kind: Kind
    model: nn.Module
    skip: float = 0.0
    taus: tuple[float, float] | None = None
    static: bool = False

    def prepare(self) -> None:
        """Put its thresholds in force."""
        if self.kind == "ours":
            set_plan(self.model, self.taus and SkipPlan.uniform(text=self.taus[0], vision=self.taus[1]))


@dataclass
class Twins:
    """Copies of a model in all settings, made when they are first asked for; they share its weights.

    Args:
        model: The model.

    Attributes:
        failed: Why a setting that was asked for does not run, by its name.
    """

    model: nn.Module
    failed: dict[str, str] = field(default_factory=dict)
    _made: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def stock(self, settings: Sequence[Setting], tokens: int) -> list[Contender]:
        """Return stock in those settings that can take so many tokens."""
        fitting = [each for each in settings if tokens <= _FEW or (each.experts != "batched_mm" and each.attention is None)]
        twins = {str(each): self._twin(str(each), partial(stock_twin, self.model, each)) for each in fitting}
        static = {str(each) for each in fitting if each.compiled == "graph"}
        return [Contender(f"stock {name}", "stock", twin, static=name in static) for name, twin in twins.items()]

    def peer(self) -> list[Contender]:
        """Return vLLM's kernel, if it runs here; it skips nothing."""
        if peer.NAME not in self._made and peer.NAME not in self.failed:
            why = peer.why_not(self.model)
            try:
                if not why:
                    self._twin(peer.NAME, self._with_peer)
            except RuntimeError as error:  # operations of another release, or weights that they do not take
                why = in_a_line(error)
            if why:
                self.failed[peer.NAME] = why
        return [Contender(peer.NAME, "peer", self._made[peer.NAME])] if peer.NAME in self._made else []

    def ours(
        self, taus: Mapping[float, tuple[float, float] | None], region: Region = "moe", attention: str | None = None
    ) -> list[Contender]:
        """Return modes-fx at each skip ratio."""
        name = str(Setting(OURS, region, attention))
        setting = Setting(DEFAULT.experts, attention=attention)
        model = self._twin(name, lambda: optimize(stock_twin(self.model, setting), region=region))
        return [Contender(name, "ours", model, skip, pair) for skip, pair in taus.items()]

    def one_graph(self, taus: Mapping[float, tuple[float, float] | None], attention: str | None = None) -> list[Contender]:
        """Return modes-fx at each skip ratio, decoding over a static cache in one graph."""
        name = str(Setting(OURS, "graph", attention))
        setting = Setting(DEFAULT.experts, attention=attention)
        model = self._twin(name, lambda: as_one_graph(optimize(stock_twin(self.model, setting))))
        return [Contender(name, "ours", model, skip, pair, static=True) for skip, pair in taus.items()]

    def packed(self, taus: Mapping[float, tuple[float, float] | None]) -> list[Contender]:
        """Return modes-fx with packed weights at each skip ratio, if this CPU and these weights take that."""
        name = "modes-fx, packed"
        if name in self.failed:
            return []
        try:
            model = self._twin(name, lambda: optimize(copy.deepcopy(self.model), prepack=True))
        except ModelError as error:
            self.failed[name] = str(error)
            return []
        return [Contender(name, "ours", model, skip, pair) for skip, pair in taus.items()]

    def _twin(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _with_peer(self) -> nn.Module:
        twin = stock_twin(self.model, DEFAULT)
        peer.use(twin)
        return twin


def thresholds(routings: Sequence[Routing], visual: Any, skips: Sequence[float]) -> dict[float, tuple[float, float] | None]:
    """Return the thresholds that reach skip ratios, in each modality, on the routing of random inputs.

    Args:
        routings: Of each MoE layer.
        visual: bool [T], which tokens are visual.
        skips: Ratios in [0, 1); 0 stands for no thresholds.
    """
    found: dict[float, tuple[float, float] | None] = {}
    for skip in skips:
        taus = []
        for mine in (~visual, visual):
            weights = torch.cat([routing.weights[mine].reshape(-1) for routing in routings])
            taus.append(_quantile(weights, skip) if weights.numel() else 0.0)
        found[skip] = (taus[0] or taus[1], taus[1] or taus[0]) if skip else None
    return found


def _quantile(weights: torch.Tensor, share: float) -> float:
    """Return the smallest weight above that share of them; by sorting, since ``torch.quantile`` takes no large input."""
    return float(weights.sort().values[min(int(share * weights.numel()), weights.numel() - 1)])
