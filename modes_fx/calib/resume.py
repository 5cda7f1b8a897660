"""Forwards that differ from an earlier one only from some MoE layer on, run from there on.

NOTE [what is answered from the tape] A module that had returned before a layer's region was called cannot know what that
region skips: the vision tower, the embeddings, the decoder layers before, the attention of the layer itself. A stand-in before
its call returns a copy of what it returned; masks, norms and all that lies between modules run as they are, so nothing here
depends on the family. What reaches later layers by another way than outputs (a dictionary that attention fills, say) is lost:
whoever resumes asks ``mistrust`` first, as ``layer_importance`` does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from modes_fx.graph.running import Forward, running
from modes_fx.modality import MODALITIES, TEXT
from modes_fx.optimize import optimized_state

_EVERY = tuple(range(len(MODALITIES)))
_TOLERANCE = 8  # times the unit of rounding: grouped GEMMs over fewer rows may sum in another order


@dataclass
class _Call:
    """A module's call in the recorded forward.

    Attributes:
        started: On the tape's clock.
        ended: On the tape's clock; infinite where what it returned is not kept, so that nobody asks for it.
        output: What it returned.
        silenced: What it would have returned with all its routed experts skipped; None where that is unknown.
        tokens: Those of the forward.
    """

    started: int
    ended: float = math.inf
    output: Any = None
    silenced: Any = None
    tokens: Forward | None = None


class Tape:
    """Records one forward of an optimised model, and answers from it what later ones need not compute.

    Its stand-ins are in force inside its ``with`` block. It holds copies of what each decoder layer, its attention and (twice)
    its MoE block returned, for one batch: about 4 x layers x tokens x hidden size elements.

    Args:
        model: An optimised model, with bounds that the caller puts back.
        blank: Record nothing, so that every forward runs whole.

    Attributes:
        num_layers: MoE layers of the model, L.
        num_regions: Regions that they lie in.
        regions_run: How often a region was computed instead of answered from the tape.
    """

    def __init__(self, model: nn.Module, *, blank: bool = False) -> None:
        self._blank = blank
        state = optimized_state(model)
        self._runtime = state.runtime
        self._regions = [layer.region(state.region) for layer in state.layers]
        self._layers = {id(region): index for index, region in enumerate(self._regions)}
        # The rows of an MoE block do not know each other: those that skip are the rows of a block where all skip.
        self._by_row = state.region == "moe"
        self._watched = _worth_recording(model, self._regions)
        self._calls: dict[int, _Call] = {}  # by the module's id
        self._clock = 0
        self._recording = False
        self._resumed: tuple[nn.Module, _Call, Sequence[int]] | None = None
        self.num_layers, self.num_regions = len(self._regions), len(self._layers)
        self.regions_run = 0

    def __enter__(self) -> Tape:
        self._before = [(module, module._compiled_call_impl) for module in self._watched]
        for module, before in self._before:
            module._compiled_call_impl = self._stand_in(module, before or module._call_impl)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module, before in self._before:
            module._compiled_call_impl = before
        self._calls.clear()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the one forward that is run inside, nothing skipped; what was recorded before is forgotten."""
        self._calls.clear()
        self.skip(0, ())
        self._recording = not self._blank
        try:
            yield
        finally:
            self._recording = False

    @contextlib.contextmanager
    def resumed(self, layer: int, modalities: Sequence[int]) -> Iterator[None]:
        """Skip all routed experts of one layer, and let forwards of the recorded inputs compute only what that can change.

        Args:
            layer: Index of an MoE layer that ``concerns`` the recorded forward.
            modalities: The tokens that skip them; () skips none.
        """
        region = self._regions[layer]
        self.skip(layer, modalities)
        if not self._blank:
            self._resumed = region, self._calls[id(region)], modalities
        try:
            yield
        finally:
            self._resumed = None

    def concerns(self, layer: int, modalities: Sequence[int]) -> bool:
        """Say whether the recorded forward had tokens of these modalities in a layer; if not, skipping changes nothing."""
        if self._blank:
            return True
        call = self._calls.get(id(self._regions[layer]))
        return call is not None and (call.tokens is None or bool(among(call.tokens.ids, modalities).any()))

    def skip(self, layer: int, modalities: Sequence[int]) -> None:
        """Let the forwards from now on skip all routed experts of one layer for tokens of some modalities, and no others."""
        bounds = torch.full((len(self._regions), len(MODALITIES)), self._runtime.rule.keep_all)
        bounds[layer, list(modalities)] = self._runtime.rule.skip_all
        self._runtime.set_bounds(bounds)
        if (forward := running()) is not None:  # in the middle of one, whose layer is looked at twice
            forward.refresh()

    def _stand_in(self, module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._recording:
                return self._record(module, run, args, kwargs)
            recorded = self._calls.get(id(module))
            if self._resumed is not None and recorded is not None:
                region, start, modalities = self._resumed
                if module is region and start.silenced is not None:
                    return _mixed(start, modalities)
                if recorded.ended < start.started:
                    return _copy(recorded.output)
            self.regions_run += id(module) in self._layers
            return run(*args, **kwargs)

        return call

    def _record(self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer, known = self._layers.get(id(module)), self._calls.get(id(module))
        self.regions_run += layer is not None
        if known is not None:  # which of its calls a later one stands for would be a guess
            known.ended, known.output, known.silenced = math.inf, None, None
            return run(*args, **kwargs)
        call = self._calls[id(module)] = _Call(self._tick(), tokens=running())
        if layer is not None and self._by_row and call.tokens is not None:
            self.skip(layer, _EVERY)
            silenced = _copy(run(*_copy(args), **_copy(kwargs)))
            self.skip(layer, ())
            if next(_rows(silenced)) == call.tokens.ids.numel():
                call.silenced = silenced
        output = run(*args, **kwargs)
        # Nobody resumes after the last region, so what ends later (the language model, the head's logits) is never asked for.
        if layer is not None or not all(id(region) in self._calls for region in self._regions):
            call.ended, call.output = self._tick(), _copy(output)
        return output

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def mistrust(tape: Tape, run: Callable[[], Tensor], reference: Tensor) -> str:
    """Compare resumed forwards with whole ones.

    Args:
        tape: Has a forward recorded.
        run: Runs it again, and returns float [n, V] logits.
        reference: What it returned when it was recorded.

    Returns:
        Why resuming is not to be trusted; "" if it is.
    """
    layers = [layer for layer in range(tape.num_layers) if tape.concerns(layer, _EVERY)]
    if not layers:
        return ""
    middle = layers[len(layers) // 2]
    try:
        with tape.resumed(layers[-1], ()):
            unskipped = run()
        with tape.resumed(middle, (TEXT,)):
            skipped = run()
    except Exception as error:  # whatever a model's code raises when its state is missing is the reason, and is reported
        return f"a resumed forward failed with {type(error).__name__}: {error}"
    tape.skip(middle, (TEXT,))
    whole = run()
    for got, wanted, what in ((unskipped, reference, "nothing"), (skipped, whole, f"the text of MoE layer {middle}")):
        off = float((got.double() - wanted.double()).norm() / wanted.double().norm())
        if not off <= _TOLERANCE * torch.finfo(wanted.dtype).eps:
            return f"a resumed forward's logits were off by {off:.1e} of their norm with {what} skipped"
    return ""


def _mixed(call: _Call, modalities: Sequence[int]) -> Any:
    """Return a block's output with the routed experts skipped for tokens of some modalities."""
    tokens = call.tokens
    assert tokens is not None

    def mix(kept: Any, silenced: Any) -> Any:
        rows = kept.shape[:-1].numel() if isinstance(kept, Tensor) else 0
        if not isinstance(kept, Tensor) or (tokens.ids.dim() and rows != tokens.ids.numel()):
            return kept
        skips = among(tokens.flat(rows, kept.device), modalities)
        return torch.where(skips.view(*kept.shape[:-1], 1), silenced, kept)

    return tree_map(mix, call.output, call.silenced)


def among(ids: Tensor, modalities: Sequence[int]) -> Tensor:
    """Say of each token whether it is of one of the modalities: bool, of the shape of ``ids``."""
    return torch.isin(ids, torch.tensor(modalities, dtype=ids.dtype, device=ids.device))


def _copy(values: Any) -> Any:
    """Copy tensors and the containers around them: what follows a module may write into what it returned."""
    return tree_map_only(Tensor, torch.clone, values)


def _rows(values: Any) -> Iterator[int]:
    return (leaf.shape[:-1].numel() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _worth_recording(model: nn.Module, regions: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the regions, and what is called beside them or on the way down to them; norms are as cheap to run again."""
    modules = dict(model.named_modules())
    own = {id(region) for region in regions}
    paths = [name.split(".") for name, module in modules.items() if id(module) in own]
    above = {".".join(path[:depth]) for path in paths for depth in range(len(path))}
    found = {id(region): region for region in regions}
    for name in above:
        for child in modules[name].children():
            if any(parameter.dim() > 1 for parameter in child.parameters()):
                found[id(child)] = child
    return list(found.values())
