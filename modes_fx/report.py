"""What was rewritten and what was not, and live skip statistics."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from modes_fx.errors import ModesFxError
from modes_fx.modality import MODALITIES, Phase
from modes_fx.passes.reasons import REASONS
from modes_fx.passes.site import SiteRecord

PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class SiteReport:
    """One MoE layer's routing site.

    Attributes:
        name: Path of the experts module in the model.
        status: ``"rewritten"``; ``"converted"``, which is rewritten too, after the block was made to use transformers' dispatch
            (``modes_fx.models.convert``); or ``"rejected"``.
        code: Reason code of a rejection, else "".
        detail: A sentence on it, else "".
        form: The stock dispatch found last, ``"grouped_mm"`` or ``"batched_mm"``.
        dispatch: ``"compact"`` or ``"static"``; "" when rejected.
        top_k: K, experts a token.
        num_experts: E, experts of the layer.
        gemms: ``"kernels"``, ``"packed kernels"`` or ``"Triton kernels"`` (``modes_fx.kernels``), the last perhaps with
            ``", and work on all rows between them"``; or why the experts' GEMMs are torch's own.
    """

    name: str
    status: str
    code: str = ""
    detail: str = ""
    form: str = ""
    dispatch: str = ""
    top_k: int = 0
    num_experts: int = 0
    gemms: str = ""


def _dispatch(site: SiteReport) -> str:
    return f"{site.dispatch}, {site.gemms}" if site.gemms.endswith("kernels") else site.dispatch or "-"


@dataclass(frozen=True)
class Report:
    """All routing sites of a model, in layer order.

    Attributes:
        model: The model's class name.
        region: What is compiled: ``"moe"``, ``"layer"`` or ``"model"``.
        sites: One for each MoE layer.
        graphs: Graphs compiled so far.
    """

    model: str
    region: str
    sites: tuple[SiteReport, ...]
    graphs: int = 0

    @property
    def found(self) -> int:
        """Number of candidate sites."""
        return len(self.sites)

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        """Sites whose skipped experts are not computed, converted ones among them."""
        return tuple(site for site in self.sites if site.status in ("rewritten", "converted"))

    @property
    def converted(self) -> tuple[SiteReport, ...]:
        """Those of the rewritten sites whose block was converted to transformers' dispatch."""
        return tuple(site for site in self.sites if site.status == "converted")

    @property
    def rejected(self) -> tuple[SiteReport, ...]:
        """Sites left as they were, each with its reason."""
        return tuple(site for site in self.sites if site.status == "rejected")

    def reasons(self) -> str:
        """Count the rejections by code, such as ``16 x WEIGHTS_HAVE_OTHER_USERS``."""
        codes = [site.code for site in self.rejected]
        return ", ".join(f"{codes.count(code)} x {code}" for code in sorted(set(codes)))

    def explanations(self) -> list[str]:
        """Return a sentence for each reason of a rejection, and what to do about it."""
        counts = Counter((site.code, site.detail) for site in self.rejected)
        return [
            f"{code} ({count} of {self.found}): {detail.rstrip('.')}. {REASONS[code].advice}"
            for (code, detail), count in counts.items()
        ]

    def __str__(self) -> str:
        rows = [
            (site.name, site.status, site.form, _dispatch(site), site.top_k, site.num_experts, site.code or "-")
            for site in self.sites
        ]
        title = f"{self.model}, region {self.region!r}: {self.found} sites found, {len(self.rewritten)} rewritten"
        title += f" ({len(self.converted)} converted)" if self.converted else ""
        headers = ("site", "status", "form", "dispatch", "K", "E", "reason")
        return "\n".join([title, tabulate(rows, headers=headers), *self.explanations()])


@dataclass
class GraphReport:
    """What ``torch.compile(model, backend="modes_fx", options={"report": report})`` made of each graph.

    A model that does not trace whole is compiled in parts, one graph each, when it first runs.

    Attributes:
        graphs: For each graph, in the order of compilation, what became of its candidate sites; () where it has none.
    """

    graphs: list[tuple[SiteRecord, ...]] = field(default_factory=list)

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The candidate sites of all graphs."""
        return tuple(site for graph in self.graphs for site in graph)

    def __str__(self) -> str:
        rows = [
            (index, site.source or site.anchor, site.status, site.form, site.dispatch or "-", site.code or "-")
            for index, graph in enumerate(self.graphs)
            for site in graph
        ]
        rewritten = sum(site.status == "rewritten" for site in self.sites)
        title = f"{len(self.graphs)} graphs: {len(self.sites)} sites found, {rewritten} rewritten"
        return f"{title}\n{tabulate(rows, headers=('graph', 'site', 'status', 'form', 'dispatch', 'reason'))}"


class SkipStats:
    """Counts of routed and of kept (token, expert) pairs, by layer, modality and phase.

    Kept pairs are counted by the very mask that selects the rows that the experts compute, when a forward ends. Recording is
    off until asked for, and costs nothing then; a graph around whole layers (``region="layer"`` and ``"model"``,
    ``torch.compile``, a static cache) is compiled once more when it is switched on::

        with modes_fx.stats(model) as stats:
            model.generate(**inputs)
        print(stats, stats.skip_ratio(modality="vision", phase="prefill"))

    Padding counts nowhere.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers
        self.recording = False
        with torch.inference_mode(False):
            shape = len(layers), len(MODALITIES), len(PHASES), 2
            self._pairs = torch.zeros(shape, dtype=torch.int64, device="cpu")
        self._before: list[bool] = []  # what each enclosing `with` block found
        self._by_token: list[tuple[int, Tensor]] | None = None
        self._experts_read: list[tuple[int, Phase, int]] | None = None

    def start(self) -> SkipStats:
        """Count from now on."""
        self.recording = True
        return self

    def stop(self) -> SkipStats:
        """Count no more; what was counted stays."""
        self.recording = False
        return self

    def reset(self) -> SkipStats:
        """Set all counts to 0."""
        self._pairs.zero_()
        return self

    @contextlib.contextmanager
    def counting(self) -> Iterator[SkipStats]:
        """Count inside the block; afterwards go on or stay off as before. So does ``with stats:``."""
        with self:
            yield self

    @contextlib.contextmanager
    def by_token(self) -> Iterator[list[tuple[int, Tensor]]]:
        """Count inside the block, and yield a list that grows by (layer, int64 [T], experts kept of each token) a dispatch.

        Dispatches inside a graph around whole layers are not seen.
        """
        self._by_token, before = [], self._by_token
        try:
            with self.counting():
                yield self._by_token
        finally:
            self._by_token = before

    @contextlib.contextmanager
    def experts_read(self) -> Iterator[list[tuple[int, Phase, int]]]:
        """Yield a list that grows by (layer, phase, distinct experts that were computed) a dispatch, inside the block.

        That is how many experts' weights the call read. Dispatches inside a graph around whole layers are not seen.
        """
        self._experts_read, before = [], self._experts_read
        try:
            yield self._experts_read
        finally:
            self._experts_read = before

    def __enter__(self) -> SkipStats:
        self._before.append(self.recording)
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.recording = self._before.pop()

    @property
    def pairs_routed(self) -> Tensor:
        """int64 [layers, modalities (text, vision), phases (prefill, decode)]: pairs that the routers chose."""
        return self._pairs[..., 0].cpu().clone()

    @property
    def pairs_kept(self) -> Tensor:
        """int64, same shape: pairs whose experts were computed."""
        return self._pairs[..., 1].cpu().clone()

    def skip_ratio(self, *, layer: int | None = None, modality: str | None = None, phase: str | None = None) -> float:
        """Return dropped / routed pairs, in [0, 1], over what is selected; NaN where nothing was routed.

        Raises:
            ModesFxError: An unknown modality or phase.
        """
        index: tuple[Any, ...] = (
            slice(None) if layer is None else layer,
            _position("modality", modality, MODALITIES),
            _position("phase", phase, PHASES),
        )
        routed = int(self.pairs_routed[index].sum())
        return 1 - int(self.pairs_kept[index].sum()) / routed if routed else float("nan")

    def add(self, pairs: Tensor) -> None:
        """Add what a forward counted, int64 [layers, modalities, phases, 2]: pairs routed and kept."""
        self._pairs += pairs.to(self._pairs.device)

    def see(self, layer: int, phase: Phase, keep_TK: Tensor, expert_ids_TK: Tensor) -> None:
        """Note what one dispatch computes, bool and int64 [T, K], if somebody asked by ``by_token`` or ``experts_read``."""
        if self._by_token is not None:
            self._by_token.append((layer, keep_TK.sum(dim=1).cpu()))
        if self._experts_read is not None:
            self._experts_read.append((layer, phase, len(expert_ids_TK[keep_TK].unique())))

    def follow(self, device: torch.device) -> None:
        """Count on this device, where the model's inputs are."""
        with torch.inference_mode(False):
            self._pairs = self._pairs.to(device)

    def __str__(self) -> str:
        if not int(self.pairs_routed.sum()):
            state = "recording, nothing routed yet" if self.recording else "not recording: use `with modes_fx.stats(model):`"
            return f"Skip statistics: {state}"
        headers = ["layer", *(f"{modality} {phase}" for modality in MODALITIES for phase in PHASES)]
        rows = [
            [name, *(self.skip_ratio(layer=i, modality=m, phase=p) for m in MODALITIES for p in PHASES)]
            for i, name in enumerate(self.layers)
        ]
        rows.append(["all", *(self.skip_ratio(modality=m, phase=p) for m in MODALITIES for p in PHASES)])
        return "Skip ratios\n" + str(tabulate(rows, headers=headers, floatfmt=".3f"))


def _position(kind: str, name: str | None, known: tuple[str, ...]) -> Any:
    if name is None:
        return slice(None)
    if name not in known:
        raise ModesFxError(f"Unknown {kind} {name!r}; known: {', '.join(known)}.")
    return known.index(name)
