"""The forward that runs: which tokens it has, and the thresholds that hold for it from its first layer to its last.

It is made once a forward, in front of the outermost module's call (``watch``): outside any graph, or inside the one that is
being traced, where it dissolves into the graph's own data flow. Every thread has its own, so that concurrent calls do not mix.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modes_fx.errors import ModalityError, ModelError
from modes_fx.modality import CLASSES, MODALITIES, Phase
from modes_fx.plan.budget import Steering
from modes_fx.report import PHASES

if TYPE_CHECKING:
    from modes_fx.graph.in_force import InForce
    from modes_fx.graph.runtime import Runtime


class Forward:
    """One forward of an optimised model. A plain class, which dynamo traces.

    Args:
        runtime: The model's.
        plan: What is in force, read once: a snapshot.
        ids: int64 [B, S], each token's class: ``TEXT``, ``VISION`` or ``PADDING``. Without dimensions where all tokens are of
            one class and any number of them may come: those of a vision tower, say.
        phase: ``"decode"`` for a step of one token a sequence over a cache, else ``"prefill"``.
        expert_groups: bool [B, S], which of two groups of experts a token goes to in models that have a group for each
            modality: True the one for vision. None where all tokens go to the same experts.
        outer: The forward of which this one is a part, with tokens of its own.

    Attributes:
        counts: int64 [L, modalities, phases, 2], pairs routed and kept so far; None unless somebody counts.
        norms: float32 [B, S], of the hidden states, where a decoder layer is watched for tokens to protect; else None.
        observed: Whether that layer's attention has run.
    """

    def __init__(
        self,
        runtime: Runtime,
        plan: InForce,
        ids: Tensor,
        phase: Phase,
        expert_groups: Tensor | None = None,
        outer: Forward | None = None,
    ) -> None:
        self.runtime = runtime
        self.plan = plan
        self.ids = ids
        self.phase: Phase = phase
        self.expert_groups = expert_groups
        self.counts: Tensor | None = None
        self.norms: Tensor | None = None
        self.observed = False
        self._outer = outer
        self._flat = ids.reshape(-1)
        self._steering: Steering | None = None
        self._of_group: dict[bool, Forward] = {}
        if outer is None and runtime.stats.recording:
            shape = (len(runtime.layers), len(MODALITIES), len(PHASES), 2)
            self.counts = torch.zeros(shape, dtype=torch.int64, device=ids.device)

    def flat(self, tokens: int, device: torch.device) -> Tensor:
        """Return the ids as int64 [T] on ``device``.

        Args:
            tokens: T, as many as the block that asks was called with.
            device: Where the ids are wanted.

        Raises:
            ModalityError: The forward has another number of tokens.
        """
        if self._flat.device != device:
            self._flat = self._flat.to(device)
        if not self.ids.dim():
            return self._flat.expand(tokens).contiguous()
        if self.ids.numel() != tokens:
            raise ModalityError(
                f"An MoE block was called with {tokens} tokens, but the running forward has {list(self.ids.shape)}. If the "
                "model drops or merges tokens on the way, call it inside `with modes_fx.token_modality(ids):`, where ids has "
                "the shape that the language model gets."
            )
        return self._flat

    def given(self, layer: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what a layer's marker takes: classes int64 [T], bounds float32 [classes], and the rule's table if it has one.

        Raises:
            ModalityError: See ``flat``.
            ModelError: Tokens are to be protected, and attention was not seen.
        """
        if self.norms is not None and not self.observed and not self.plan.keeps_all:
            raise ModelError(
                f"{self.runtime.layers[layer].name} ran before any attention of its decoder layer was observed, so it is "
                "unknown which tokens the rule protects. Choose a rule that protects none: naee."
            )
        classes = self.flat(tokens, device)
        phase = PHASES.index(self.phase)
        if self.plan.budget is not None and self.phase == "prefill":
            if self._steering is None:
                self._steering = Steering(self.plan.budget, classes, layer)
            bounds = self._steering.row(layer)
        elif self.plan.rows:
            # Ready made: outside a graph every operation costs, and inside one the layer's index would go into the code of a
            # kernel, which no other layer could share.
            bounds = self.plan.rows[phase][layer]
        else:
            bounds = self.plan.bounds[phase, layer]
        table = self.plan.tables[layer] if self.plan.tables else None
        if bounds.device != device:
            bounds, table = bounds.to(device), None if table is None else table.to(device)
        return classes, bounds, table

    def note(
        self, layer: int, classes: Tensor, keep_TK: Tensor, expert_ids_TK: Tensor, counted_TK: Tensor | None = None
    ) -> None:
        """Take note of what a layer kept: count it, and steer by it.

        Args:
            layer: Its index.
            classes: int64 [T], those of its tokens.
            keep_TK: bool [T, K].
            expert_ids_TK: int64 [T, K], the experts that were computed, or would have been.
            counted_TK: bool [T, K], the pairs that this process counts; None where it counts all.
        """
        whole = self
        while whole._outer is not None:
            whole = whole._outer
        if whole.counts is not None:
            counts = whole.counts.clone()
            counts[layer, :, PHASES.index(self.phase)] += _tally(classes, keep_TK, counted_TK).to(counts.device)
            whole.counts = counts
        if self._steering is not None:
            self._steering.note(layer, keep_TK)
        if not torch.compiler.is_compiling():
            self.runtime.stats.see(layer, self.phase, keep_TK, expert_ids_TK)

    def end(self) -> None:
        """Hand over what was counted; the forward is over and nothing was raised."""
        if self.counts is not None:
            self.runtime.stats.add(self.counts)

    def refresh(self) -> None:
        """Take what is in force now, in the middle of the forward."""
        self.plan = self.runtime.in_force.snapshot()

    def observe(self, ids: Tensor) -> None:
        """Take the classes that observed attention gives the tokens; protected ones are ``CLASSES`` higher."""
        self.ids, self._flat, self.observed = ids, ids.reshape(-1), True

    def narrowed(self, ids: Tensor, phase: Phase, expert_groups: Tensor | None = None) -> Forward:
        """Return a forward of other tokens inside this one, under the same plan."""
        return Forward(self.runtime, self.plan, ids, phase, expert_groups, outer=self)

    def of_group(self, vision: bool) -> Forward:
        """Return those tokens that go to the experts for vision, or to the others; picked once a forward."""
        if self.expert_groups is None:
            return self
        if vision not in self._of_group:
            mine = self.expert_groups.reshape(-1) == vision
            self._of_group[vision] = self.narrowed(self.ids.reshape(-1)[mine].unsqueeze(0), self.phase)
        return self._of_group[vision]


def _tally(classes: Tensor, keep_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
    """Return int64 [modalities, 2]: pairs routed and kept."""
    modality = torch.arange(len(MODALITIES), device=classes.device).unsqueeze(1)
    mine_MT = classes % CLASSES == modality  # protected tokens are classes of their own
    if counted_TK is None:
        routed = mine_MT.sum(dim=1) * keep_TK.shape[1]
    else:
        routed, keep_TK = (mine_MT * counted_TK.sum(dim=1)).sum(dim=1), keep_TK & counted_TK
    return torch.stack([routed, (mine_MT * keep_TK.sum(dim=1)).sum(dim=1)], dim=1)


class _Running(threading.local):
    __slots__ = ()  # or dynamo would write into the dictionary of the instance, which no thread reads

    def __init__(self) -> None:  # in every thread: dynamo does not guard an attribute that the class alone has
        self.forward: Forward | None = None


RUNNING = _Running()


def running() -> Forward | None:
    """Return the forward that runs in this thread, or None outside any."""
    return RUNNING.forward


def traced() -> bool:
    """Return whether calls are recorded instead of run: by dynamo, an exporter, a tracer, or a mode that sees each of them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
