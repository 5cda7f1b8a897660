"""Run rewritten graphs without Inductor, and see what reaches the experts' GEMMs."""

import contextlib
import functools
import importlib
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers the float32 GEMM
from torch import Tensor, fx, nn

from modes_fx.backend import SkipBackend
from modes_fx.passes import kept_gemms
from modes_fx.passes.skip_experts import Binding, Rewritten, skip_experts
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES

GEMMS = (torch.ops.transformers.grouped_mm_fallback, torch._grouped_mm)
"""The float32 form and the bfloat16 form of ``grouped_mm``; ``batched_mm`` has ``torch.bmm``."""

KERNELS = (torch.ops.modes_fx.linear.default, torch.ops.modes_fx.linear_combine.default)

ATEN = "compact, ATen"
"""The compact dispatch as it is where the kernels cannot be used."""


_OPTIMIZE = importlib.import_module("modes_fx.optimize")  # `modes_fx.optimize` is the function of that name


def compile_with(monkeypatch: pytest.MonkeyPatch, compile_graph: Callable[..., Any]) -> None:
    """Make ``modes_fx.optimize`` hand the rewritten graphs to ``compile_graph`` instead of Inductor."""
    monkeypatch.setattr(_OPTIMIZE, "SkipBackend", functools.partial(SkipBackend, compile_graph=compile_graph))


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


@dataclass
class FixedRuntime:
    """A runtime for one block: the classes and bounds are set by the test."""

    token_classes: Tensor | None = None
    bounds: Tensor = field(default_factory=lambda: torch.tensor([0.0, 0.0, float("inf")]))
    recording: bool = False
    num_classes: int = 3
    graphs: list[Rewritten] = field(default_factory=list)
    recorded: list[Tensor] = field(default_factory=list)

    def compiled(self, rewritten: Rewritten) -> None:
        self.graphs.append(rewritten)

    def bind(self, binding: Binding, inputs: Sequence[Any]) -> tuple[int, Tensor, Tensor]:
        tokens = binding.token_count(inputs)
        classes = torch.zeros(tokens, dtype=torch.int64) if self.token_classes is None else self.token_classes
        assert len(classes) == tokens
        return 0, classes, self.bounds

    def record(self, layer: int, top_k: int, token_class: Tensor, pairs: Tensor) -> None:
        self.recorded.append(pairs)


def compiled_block(
    block: nn.Module,
    dispatch: str,
    runtime: FixedRuntime,
    compile_graph: Callable[..., Any] = uncompiled,
    rule: str = "threshold",
    **options: Any,
) -> Callable[..., Any]:
    """Return the block as dynamo traces it, rewritten, with a cache of graphs of its own; fullgraph."""
    backend = SkipBackend(runtime, RULES[rule].keep, dispatch_of(dispatch), compile_graph)

    def traced(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with kernels(dispatch):
            return backend(module, inputs)

    return compiled(getattr(block, "forward", block), traced, **options)


def dispatch_of(form: str) -> Any:
    """Return the dispatch of a form, which may be ``ATEN``."""
    return "compact" if form == ATEN else form


@contextlib.contextmanager
def kernels(form: str) -> Iterator[None]:
    """Let the pass leave the kernels aside where the form is ``ATEN``."""
    with pytest.MonkeyPatch.context() as patch:
        if form == ATEN:
            patch.setattr(kept_gemms, "why_not", lambda graph, site: "as a test wants it")
        yield


def compiled(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile``, fullgraph, through a copy of the code object, so that no other test's graphs are tried first."""

    def call(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, backend=backend, fullgraph=True, **options)


@dataclass
class Capture:
    """A backend that keeps dynamo's graph, its text from before the pass and what the pass made of it."""

    dispatch: str = "compact"
    graph: fx.GraphModule | None = None
    before: str = ""
    rewritten: Rewritten | None = None

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from modes_fx.backend import _allow_kept_lengths

        _allow_kept_lengths(module)
        self.graph, self.before = module, text(module)
        with kernels(self.dispatch):
            self.rewritten = skip_experts(module, RULES["threshold"].keep, dispatch_of(self.dispatch), 3)
        return module.forward


def capture(function: Callable[..., Any], *args: Any, dispatch: str = "compact", **options: Any) -> Capture:
    """Trace ``function`` with fixed shapes and run the pass on its graph; the function itself runs as it was."""
    backend = Capture(dispatch)
    with torch.no_grad():
        compiled(function, backend, **{"dynamic": False, **options})(*args)
    assert backend.rewritten is not None
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
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called)) for m in modules],
        "compiled": [m._compiled_call_impl for m in modules],
        "experts": model.get_experts_implementation(),
        "attributes": [sorted(set(vars(m)) - {"_compiled_call_impl"}) for m in modules],
        "parameters": [id(parameter) for parameter in model.parameters()],
        "training": [m.training for m in modules],
    }
