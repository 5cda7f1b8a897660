"""An eager oracle of expert skipping, written without modes_fx: stock model, weights of dropped pairs set to 0."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Keep = Callable[[Tensor, Tensor], Tensor]
Told = Callable[[str, int], tuple[Tensor, int]]
"""``told(name, tokens) -> classes, phase``: the classes of the tokens that an experts module of that name is called with."""


def at_least(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """The published rule: a pair is dropped if its weight is below the token's threshold."""
    return ~(weights_TK.float() < bound_T[:, None])


def largest(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Reduce-k, one token after the other."""
    keep = torch.zeros(weights_TK.shape, dtype=torch.bool)
    for token, weights in enumerate(weights_TK.float().tolist()):
        order = sorted(range(len(weights)), key=lambda rank: (-weights[rank], rank))
        for rank in order[: int(min(bound_T[token].item(), len(weights)))]:
            keep[token, rank] = True
    return keep


def token_importance(hidden_SH: Tensor, attention_NSS: Tensor, tokens: list[int]) -> dict[int, float]:
    """MC-MoE's: the L1 norm of each token times what later ones pay attention to it, on average over these and N heads."""
    scores = {}
    for place, token in enumerate(tokens):
        paid = [float(head[later, token]) for head in attention_NSS for later in tokens[place + 1 :]]
        scores[token] = float(hidden_SH[token].abs().sum()) * (sum(paid) / len(paid) if paid else 0.0)
    return scores


@dataclass
class Oracle:
    """Runs forwards of a stock model with pairs dropped, and counts them.

    Attributes:
        model: Left as it is; a copy runs.
        bounds: [L, 2], for (text, vision); None keeps all but padding's.
        dtype: In which the copy computes.
        keep: The rule.
    """

    model: nn.Module
    bounds: Tensor | None
    dtype: torch.dtype = torch.float64
    keep: Keep = at_least
    routed: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    weights: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).to(self.dtype)
        self.model.set_experts_implementation("eager")
        self._experts = experts_of(self.model)
        self.routed = torch.zeros(len(self._experts), 2, 2, dtype=torch.int64)  # [layer, modality, phase]
        self.kept = torch.zeros_like(self.routed)
        self.weights = [[] for _ in self._experts]
        names = {module: name for name, module in self.model.named_modules()}
        for layer, experts in enumerate(self._experts):
            experts.register_forward_pre_hook(self._silence(layer, names[experts]), with_kwargs=True)

    def __call__(self, classes: Tensor | Told, phase: int = 0, **inputs: Any) -> Any:
        """Run one forward of tokens of the given classes: 0 text, 1 vision, 2 padding; or told for each experts module."""
        self._told = classes if callable(classes) else lambda name, tokens: (classes.reshape(-1), phase)
        with torch.no_grad():
            return self.model(**{name: self._cast(value) for name, value in inputs.items()})

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value

    def _silence(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, ids, weights_TK = (*args, *kwargs.values())
            self.weights[layer].append(weights_TK.detach().clone())
            bounds = torch.zeros(2) if self.bounds is None else self.bounds[layer]
            drop_all = 0.0 if self.keep is largest else float("inf")
            if self.bounds is None and self.keep is largest:
                bounds = torch.full((2,), float("inf"))
            classes, phase = self._told(name, len(weights_TK))
            keep = self.keep(weights_TK, torch.cat([bounds, torch.tensor([drop_all])])[classes])
            for modality in range(2):
                mine = classes == modality
                self.routed[layer, modality, phase] += int(mine.sum()) * weights_TK.shape[1]
                self.kept[layer, modality, phase] += int(keep[mine].sum())
            return (hidden, ids, torch.where(keep, weights_TK, torch.zeros_like(weights_TK))), {}

        return hook


def experts_of(model: nn.Module) -> list[nn.Module]:
    """Return the experts modules in layer order: those whose forward asks transformers' interface for a dispatch."""
    return [module for module in model.modules() if "experts_interface" in _free_variables(type(module).forward)]


def _free_variables(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return code.co_freevars if code else ()


def random_bounds(
    model: nn.Module, classes: Tensor | Told, seed: int = 0, dtype: torch.dtype = torch.float64, **inputs: Any
) -> Tensor:
    """Return [L, 2] bounds between the smallest and the largest weight that the model dispatches, one layer at both ends."""
    unskipped = Oracle(model, None, dtype)
    unskipped(classes, **inputs)
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.empty(len(unskipped.weights), 2)
    for layer, (weights,) in enumerate(unskipped.weights):
        levels = torch.rand(2, generator=generator, dtype=torch.float64) * 0.7 + 0.2
        bounds[layer] = torch.quantile(weights.double().flatten(), levels).float()
    return bounds


def decide(rule: str, weights_TK: Tensor, ids_TK: Tensor, bound_T: Tensor, table: Tensor | None = None) -> Tensor:
    """A rule's decisions, one token after the other in plain Python, as its paper or its docstring says.

    Returns:
        float64 [T, K]: the weights that survive; NaN where a pair is dropped.
    """
    result = torch.full(weights_TK.shape, float("nan"), dtype=torch.float64)
    read = {
        expert
        for weights, ids, bound in zip(weights_TK.double().tolist(), ids_TK.tolist(), bound_T.tolist(), strict=True)
        for weight, expert in zip(weights, ids, strict=True)
        if weight >= bound
    }
    for token, (weights, ids) in enumerate(zip(weights_TK.double().tolist(), ids_TK.tolist(), strict=True)):
        beta, order = float(bound_T[token]), sorted(range(len(weights)), key=lambda rank: (-weights[rank], rank))
        kept: list[int] = []
        if rule == "naee_top2":
            first = order[0]
            kept = [rank for rank in order if rank == first or not weights[rank] < beta * weights[first]]
        elif rule in ("naee", "diep"):
            for place, rank in enumerate(order):
                share = beta * (1.0 if table is None else float(table[ids[order[0]], ids[rank]]))
                if sum(weights[other] for other in order[place:]) < share * sum(weights):
                    break
                kept.append(rank)
        elif rule == "batch_threshold":
            assert table is not None
            eased = [beta * (1 - float(table[ids[rank]])) if ids[rank] in read else beta for rank in range(len(weights))]
            kept = [rank for rank in order if weights[rank] >= eased[rank]]
        elif rule == "top_p":
            gathered = 0.0
            for rank in order:
                if gathered < beta:
                    kept.append(rank)
                gathered += weights[rank]
        elif rule == "entropy_k":
            kept = order[: _experts_for(weights, beta)]
        elif rule == "oea":
            assert table is not None
            others = {expert for expert in _among_largest(weights_TK, ids_TK, bound_T) if table[expert] > 0}
            kept = [rank for place, rank in enumerate(order) if place < beta or (beta > 0 and ids[rank] in others)]
        elif rule == "sere":
            kept = order if beta < math.inf else []
        elif rule == "random":
            assert table is not None
            kept = [rank for rank in order if _draw(token, ids[rank], int(table[0])) >= beta]
        whole, left = sum(weights), sum(weights[rank] for rank in kept)
        factor = whole / left if rule in ("naee_top2", "entropy_k", "oea") and left else 1.0
        for rank in kept:
            result[token, rank] = weights[rank] * factor
    return result


def reroute(weights_TK: Tensor, ids_TK: Tensor, bound_T: Tensor, table: Tensor, primary: int = 1) -> Tensor:
    """SERE's experts, int64 [T, K], pair by pair: a similarity of at least 1 / bound is needed to move."""
    firsts = _among_largest(weights_TK, ids_TK, torch.where(bound_T < math.inf, primary, 0))
    result = ids_TK.clone()
    for token, experts in enumerate(ids_TK.tolist()):
        for rank, expert in enumerate(experts):
            if expert in firsts or not firsts:
                continue
            nearest = min(firsts, key=lambda other: (-float(table[expert, other]), other))
            if float(bound_T[token]) * float(table[expert, nearest]) >= 1:
                result[token, rank] = nearest
    return result


def _among_largest(weights_TK: Tensor, ids_TK: Tensor, count_T: Tensor) -> set[int]:
    """The experts of each token's so many largest weights."""
    return set(ids_TK[largest(weights_TK, count_T)].tolist())


def _experts_for(weights: list[float], bound: float) -> int:
    """How many a token gets by the entropy of its weights: the package's ladder of powers of two, its thresholds scaled."""
    whole = sum(weights)
    entropy = -sum(weight / whole * math.log(weight / whole) for weight in weights if weight > 0)
    if math.isinf(bound):
        return 0
    step = 1
    while step < len(weights) and not entropy < bound * math.log(2 * step):
        step *= 2
    return min(step, len(weights))


def _draw(place: int, expert: int, seed: int) -> float:
    mixed = (place * 73856093 ^ expert * 19349663 ^ seed * 83492791) % 2**32
    for factor in (0x45D9F3B, 0x119DE1F3, 0x2C1B3C6D):
        mixed = (mixed ^ mixed // 2**16) * factor % 2**32
    return mixed // 2**8 / 2**24


def received(q: Tensor, k: Tensor, real: Tensor, scaling: float) -> Tensor:
    """Mean attention from later real tokens over heads, entry by entry; causal, q and k [B, heads, S, D]."""
    batch, heads, length, _ = q.shape
    result = torch.zeros(batch, length)
    for row in range(batch):
        for to in range(length):
            later = [i for i in range(to + 1, length) if real[row, i]]
            for head in range(heads):
                for i in later:
                    seen = [j for j in range(i + 1) if real[row, j]]
                    if to in seen:
                        scores = [float(q[row, head, i] @ k[row, head, j]) * scaling for j in seen]
                        result[row, to] += torch.tensor(scores).softmax(0)[seen.index(to)] / (heads * len(later))
    return result
