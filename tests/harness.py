"""Run rewritten graphs without Inductor, and see what reaches the experts' GEMMs."""

import contextlib
import copy
import functools
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers the float32 GEMM
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

from modes_fx.attach import optimized
from modes_fx.graph import marker
from modes_fx.graph.backend import SkipBackend, rewrite
from modes_fx.passes import kept_blocks, kept_gemms
from modes_fx.passes.mark_sites import mark_sites
from modes_fx.passes.site import RoutingSite, SiteRecord
from modes_fx.passes.values import fake_mode_of, under_fake, value_of
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import key_of
from tests import oracle, tiny

GEMMS = (torch.ops.transformers.grouped_mm_fallback, torch._grouped_mm)
"""The float32 form and the bfloat16 form of ``grouped_mm``; ``batched_mm`` has ``torch.bmm``."""

KERNELS = (torch.ops.modes_fx.linear.default, torch.ops.modes_fx.linear_combine.default)

ATEN = "compact, ATen"
"""The compact dispatch as it is where the kernels cannot be used."""
SORTED, PAIRS = "static, sorted rows", "static, pairs"
"""The static dispatch as an NVIDIA GPU gets it, with many rows and with few; without one, Triton's interpreter runs it."""


def compile_with(monkeypatch: pytest.MonkeyPatch, compile_graph: Callable[..., Any]) -> None:
    """Make ``modes_fx.optimize`` hand the rewritten graphs to ``compile_graph`` instead of Inductor."""
    monkeypatch.setattr(optimized, "SkipBackend", functools.partial(SkipBackend, compile_graph=compile_graph))


@dataclass
class GemmLog:
    """A ``compile_graph`` that interprets the graph node by node and notes, of every GEMM of experts:

    its rows, how many of them it computes, its input, and the experts whose matrices it reads.
    """

    rows: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    experts: list[set[int]] = field(default_factory=list)

    def clear(self) -> None:
        for noted in vars(self).values():
            noted.clear()

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        log = self

        class Noting(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target in GEMMS:
                    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
                    log.rows.append(args[0].shape[0])
                    log.computed.append(int(offsets[-1]))
                    log.inputs.append(args[0].detach().clone())
                    log.experts.append(set(offsets.diff(prepend=offsets.new_zeros(1)).nonzero().flatten().tolist()))
                if target in KERNELS:
                    x, pairs, top_k = args[:3]
                    gathered = x[pairs // top_k] if target is KERNELS[0] and pairs is not None else x
                    offsets = args[-1 if target is KERNELS[0] else -2]
                    log.rows.append(len(gathered))
                    log.computed.append(int(offsets[-1]))
                    log.inputs.append(gathered.clone())
                    log.experts.append(set(offsets.diff().nonzero().flatten().tolist()))
                if target is torch.bmm:
                    vectors = next(operand for operand in args if 1 in operand.shape[1:])
                    log.rows.append(len(vectors))
                    log.computed.append(len(vectors))
                    log.inputs.append(vectors.detach().flatten(1))
                if target is operator.getitem and isinstance(args[1], Tensor) and args[0].dim() == 3:
                    log.experts.append(set(args[1].tolist()))
                return super().call_function(target, args, kwargs)

        return lambda *values: Noting(module).run(*values)


def uncompiled(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A ``compile_graph`` that runs the rewritten graph as it is."""
    return module.forward


def ungenerated(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that is Inductor up to where it generates code: its hook, its passes before AOTAutograd, and AOTAutograd."""

    def as_it_is(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        return make_boxed_func(graph.forward)

    return compile_fx(module, inputs, inner_compile=as_it_is)  # type: ignore[return-value]


@dataclass
class FixedRuntime:
    """What the markers of one block take, set by the test, and what they said was kept."""

    token_classes: Tensor | None = None
    bounds: Tensor = field(default_factory=lambda: torch.tensor([0.0, 0.0, float("inf")]))
    table: Tensor | None = None
    graphs: list[tuple[SiteRecord, ...]] = field(default_factory=list)
    recorded: list[Tensor] = field(default_factory=list)

    def given(self, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        classes = torch.zeros(tokens, dtype=torch.int64) if self.token_classes is None else self.token_classes
        assert len(classes) == tokens
        return classes, self.bounds, self.table


@dataclass
class Marked:
    """A backend that marks the sites of a graph, rewrites them and runs the result: ``FixedRuntime`` is asked in every call.

    The markers' inputs are inputs of the graph that is compiled, as they are of an optimised model's; which pairs are kept is
    its last output. ``rewritten`` is the graph, ``sites`` are what became of its candidates.
    """

    runtime: FixedRuntime
    dispatch: str
    compile_graph: Callable[..., Any]
    rule: str = "threshold"
    sites: tuple[SiteRecord, ...] = ()
    rewritten: fx.GraphModule | None = None
    marked_text: str = ""

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        module = fx.GraphModule(module, copy.deepcopy(module.graph))
        added: list[fx.Node] = []

        def given(site: RoutingSite) -> Any:
            hidden = next(node for node in module.graph.nodes if node.name == site.hidden_TH)
            real = self.runtime.given(len(self.runtime.token_classes) if self.runtime.token_classes is not None else 1)
            tokens = value_of(hidden).shape[0]
            shapes = [((tokens,), torch.int64), *((value.shape, value.dtype) for value in real[1:] if value is not None)]
            nodes = [
                _placeholder(module.graph, f"modes_fx_{name}_{len(added)}", *of, hidden)
                for name, of in zip(_GIVEN, shapes, strict=False)
            ]
            added.extend(nodes)
            return (*nodes, *[None] * (3 - len(nodes)))

        with kernels(self.dispatch):
            rejected = mark_sites(module.graph, given, key_of(self.rule), dispatch_of(self.dispatch))
            markers = [node for node in module.graph.nodes if node.target is marker.keep]
            output = module.graph.output_node()
            for node in markers:
                with module.graph.inserting_before(output):
                    kept = module.graph.call_function(operator.getitem, (node, 1))
                    kept.meta["example_value"] = value_of(node)[1]
                output.args = ((*output.args[0], kept),)
            self.marked_text = text(module)
            self.sites = (*rejected, *rewrite(module))
        self.runtime.graphs.append(self.sites)
        self.rewritten = module
        run = self.compile_graph(module, (*inputs, *(node.meta["example_value"] for node in added)))
        hidden = next((node for node in added), None)

        def call(*inputs: Any) -> Any:
            outputs = run(*inputs, *self._real(module, added, inputs))
            for kept in outputs[len(outputs) - len(markers) :]:
                self.runtime.recorded.append(kept.reshape(-1).nonzero().squeeze(1))
            return outputs[: len(outputs) - len(markers)]

        return call if hidden is not None else run

    def _real(self, module: fx.GraphModule, added: list[fx.Node], inputs: Sequence[Any]) -> list[Tensor]:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder" and node not in added]
        wanted = added[0].meta["example_value"].shape[0]
        tokens = _size(wanted, placeholders, inputs)
        given = [value for value in self.runtime.given(tokens) if value is not None]
        return given * (len(added) // len(given))


_GIVEN = ("token_class", "bounds", "table")


def _placeholder(graph: fx.Graph, name: str, shape: Any, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    with under_fake(fake_mode_of(graph)):
        node.meta["example_value"] = torch.empty(shape, dtype=dtype, device=value_of(like).device)
    return node


def _size(wanted: int | torch.SymInt, placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> int:
    """Return a size of the traced graph in one of its calls: that of an input which has it."""
    if isinstance(wanted, int):
        return wanted
    for node, value in zip(placeholders, inputs, strict=True):
        known = node.meta["example_value"]
        if isinstance(known, torch.SymInt) and known.node.expr == wanted.node.expr:
            return int(value)
        for size, actual in zip(getattr(known, "shape", ()), getattr(value, "shape", ()), strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                return int(actual)
    raise AssertionError(f"no input has the size {wanted}")


def compiled_block(
    block: nn.Module,
    dispatch: str,
    runtime: FixedRuntime,
    compile_graph: Callable[..., Any] = uncompiled,
    rule: str = "threshold",
    **options: Any,
) -> Callable[..., Any]:
    """Return the block as dynamo traces it, rewritten, with a cache of graphs of its own; fullgraph."""
    return compiled(getattr(block, "forward", block), Marked(runtime, dispatch, compile_graph, rule), **options)


def dispatch_of(form: str) -> Any:
    """Return the dispatch of a form, which may be ``ATEN``, ``SORTED`` or ``PAIRS``."""
    return form.partition(",")[0]


@contextlib.contextmanager
def kernels(form: str) -> Iterator[None]:
    """Let the pass take the kernels of a form, or leave them aside where it is ``ATEN``."""
    with pytest.MonkeyPatch.context() as patch:
        if form == ATEN:
            patch.setattr(kept_gemms, "why_not", lambda graph, site: "as a test wants it")
        if form in (SORTED, PAIRS):
            patch.setattr(kept_blocks, "_capability", lambda device: (9, 0))
            patch.setattr(kept_blocks, "takes_pairs", lambda pairs, num_experts: form == PAIRS)
        yield


def compiled(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile``, fullgraph, through a copy of the code object, so that no other test's graphs are tried first."""

    def call(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, backend=backend, fullgraph=True, **options)


@dataclass
class Capture:
    """A backend that keeps dynamo's graph as text and what the passes make of it; the function itself runs as it was."""

    marked: Marked
    before: str = ""
    inputs: int = 0

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.before = text(module)
        self.inputs = len(inputs)
        self.marked(module, inputs)
        assert text(module) == self.before
        return module.forward

    @property
    def module(self) -> fx.GraphModule:
        assert self.marked.rewritten is not None
        return self.marked.rewritten

    @property
    def records(self) -> tuple[SiteRecord, ...]:
        return self.marked.sites


def capture(function: Callable[..., Any], *args: Any, dispatch: str = "compact", **options: Any) -> Capture:
    """Trace ``function`` with fixed shapes and run the passes on its graph."""
    backend = Capture(Marked(FixedRuntime(), dispatch, uncompiled))
    with torch.no_grad():
        compiled(function, backend, **{"dynamic": False, **options})(*args)
    return backend


def text(module: fx.GraphModule) -> str:
    """Print a graph with all targets and arguments."""
    return "\n".join(node.format_node() or f"{node.name} {node.args}" for node in module.graph.nodes)


def targets(module: fx.GraphModule) -> list[Any]:
    """Return the targets of a graph's calls, in order."""
    return [node.target for node in module.graph.nodes if node.op in ("call_function", "call_method")]


def plan_of(bounds: Tensor) -> SkipPlan:
    """A plan that gives each layer its own bounds: tau 1 and alpha 1 / bound."""
    return SkipPlan((PlanPoint(None, 1.0, 1.0),), tuple((1 / float(text), 1 / float(vision)) for text, vision in bounds))


def judged(model: nn.Module, inputs: dict[str, Tensor], plan: SkipPlan, dtype: torch.dtype = torch.float32) -> oracle.Oracle:
    """Return an oracle of a plan for a tiny model of two layers, its model ready for calls with gradients too."""
    judge = oracle.Oracle(model, plan.bounds(2), dtype)
    judge(tiny.classes(inputs), **inputs, use_cache=False)
    return judge


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def relative_error(actual: Tensor, wanted: Tensor, real: Tensor) -> float:
    """Largest difference on tokens that are no padding, relative to the largest logit."""
    return float((actual.double() - wanted.double())[real].abs().max() / wanted.double()[real].abs().max())


def model_state(model: nn.Module) -> dict[str, Any]:
    """All that optimize could change."""
    modules = list(model.modules())
    return {
        "classes": [type(m) for m in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called)) for m in modules],
        "compiled": [m._compiled_call_impl for m in modules],
        "experts": model.get_experts_implementation(),
        "attributes": [sorted(set(vars(m)) - {"_compiled_call_impl"}) for m in modules],
        "parameters": [id(parameter) for parameter in model.parameters()],
        "training": [m.training for m in modules],
    }
