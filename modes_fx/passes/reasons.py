"""Why a routing site may be rejected: each code with what it means and what to do; docs/troubleshooting.md is made of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """What stands behind a reason code.

    Attributes:
        meaning: A sentence on what was found.
        advice: A sentence or two on what to do about it.
    """

    meaning: str
    advice: str


_REPORT_IT = "Nothing to set: report the model, with what `modes-fx inspect --json` prints."
_NOT_SUPPORTED = "Nothing to set: such experts cannot be skipped pair by pair."

REASONS: dict[str, Reason] = {
    # a graph's dispatch (passes)
    "NOT_A_DISPATCH": Reason(
        "The graph holds an operation that dispatches begin with, but what follows is none that is known.",
        _REPORT_IT,
    ),
    "NO_DISPATCH": Reason(
        "The traced block hands its tokens to no expert dispatch.",
        "`model.set_experts_implementation('grouped_mm')`, of the text model within where the whole refuses, before "
        "`torch.compile(model, backend='modes_fx')`; under `optimize`, report the model.",
    ),
    "WEIGHTS_HAVE_OTHER_USERS": Reason(
        "The routing weights do more than multiply the experts' output, so that a weight of 0 would not silence a pair.",
        _NOT_SUPPORTED,
    ),
    "BODY_MIXES_ROWS": Reason(
        "Between the experts' GEMMs one token's row depends on another's, so that none can be left out.",
        _NOT_SUPPORTED,
    ),
    "BODY_HAS_FIXED_ROWS": Reason(
        "The work between the experts' GEMMs names the number of pairs, which skipping changes.",
        "In code of your own write -1 for the number of rows; else report the model.",
    ),
    "OUTPUT_WIDTH": Reason(
        "The experts' output is not as wide as their input.",
        _REPORT_IT,
    ),
    "NO_EXPERT_WEIGHTS": Reason(
        "The experts' weights are made inside the graph instead of coming in, so that layers cannot be told apart.",
        "Compile the model, not a function that makes its weights.",
    ),
    "EXPERT_PARALLEL": Reason(
        "Some experts live in another process, and tokens reach them in a way that is not known.",
        "Load the model with `ep_implementation='all_reduce'` or `'all_to_all'`, as docs/serving.md has it; the bare backend "
        "takes no expert parallelism.",
    ),
    # a block that is to be traced or converted (attach, models.convert)
    "NOT_TRACEABLE": Reason(
        "The block's own code cannot be traced as one graph; the detail is what torch said.",
        "Run it once under `torch.compile(block, fullgraph=True)` to see where it breaks; report the model if it is not yours.",
    ),
    "UNKNOWN_EXPERTS": Reason(
        "The block keeps its experts to itself, in a form that no conversion knows.",
        'Write a form for it (CONTRIBUTING.md, "A model family"), or report the model.',
    ),
    "EXPERTS_NOT_PLAIN": Reason(
        "The experts of a list are no gated MLPs of three plain linear layers without biases.",
        "Optimise before adapters are added or layers are replaced; merge adapters first.",
    ),
    "EXPERTS_DIFFER": Reason(
        "The experts of a list differ in class, shape, dtype or device, or share weights, so that they cannot be stacked.",
        "Load all of them alike: one dtype, one device for each layer.",
    ),
    "EXPERTS_ARE_EMBEDDINGS": Reason(
        "The experts are rows of embeddings, for which there is no dispatch (Doge).",
        _NOT_SUPPORTED,
    ),
    "CAPACITY": Reason(
        "Tokens compete for the places of an expert, so that what one skips changes another (Switch, NLLB-MoE).",
        _NOT_SUPPORTED,
    ),
    "WEIGHTS_ON_INPUT": Reason(
        "The routing weights multiply the experts' input, which can be followed for one expert a token alone.",
        _NOT_SUPPORTED,
    ),
    "COMPUTES_OTHERWISE": Reason(
        "The block has the structure of a form that can be converted, but computes something else.",
        'Write a form for it (CONTRIBUTING.md, "A model family"), or report the model.',
    ),
    "FORWARD_REPLACED": Reason(
        "The block's forward was replaced on the instance, by offloading, say, so that its code cannot be followed.",
        "Load the model without offloading, or optimise before its forward is replaced.",
    ),
    "WEIGHTS_NOT_LOADED": Reason(
        "Some of the experts' weights are not in memory, so that they cannot be stacked.",
        "Load all of a layer's experts: without offloading to disk, on one device.",
    ),
    "TRAINING": Reason(
        "The block is in training mode, and converted blocks are for inference alone.",
        "Call `model.eval()` and optimise again.",
    ),
    # quantised experts (quantise)
    "QUANTISED_ACTIVATIONS": Reason(
        "Their quantisation covers the experts' input too, for which there is no grouped product.",
        "Quantise weights alone: `modes_fx.quantise.quantise_experts`, or torchao's `Int8WeightOnlyConfig`.",
    ),
    "QUANTISED_DEVICE": Reason(
        "The product goes through quantised experts on the CPU alone, and these are elsewhere.",
        "Move the model to the CPU, or load its experts unquantised.",
    ),
}
"""By code; codes are stable across releases."""


def explained(code: str) -> str:
    """Return a code that this table explains.

    Raises:
        ValueError: It does not, so that nobody could look it up.
    """
    if code not in REASONS:
        raise ValueError(f"The reason code {code!r} is not explained: add it to modes_fx/passes/reasons.py.")
    return code
