"""What is put into a model that a vLLM worker has loaded, and what that worker then answers to."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from modes_fx.errors import PlanError, ServingError
from modes_fx.modality import vision_token_ids
from modes_fx.serve import cpu_experts, triton_experts
from modes_fx.serve.batch import of_runner_v1, of_runner_v2, visual_ids
from modes_fx.serve.settings import Settings, layer_numbers
from modes_fx.serve.thresholds import LayerThresholds, Thresholds, find_layers_by

logger = logging.getLogger("vllm.modes_fx")  # a child of vLLM's own, whose form and level it has
_ATTRIBUTE = "modes_fx_thresholds"


class Serving:
    """Thresholds in a worker's model; its methods are reached by ``collective_rpc`` as ``modes_fx_NAME``.

    Args:
        settings: What was asked for.
        thresholds: The tensors.
        layers: vLLM's names of the MoE layers.
        counts: Whether this worker counts, or another that computes the same layers.
    """

    def __init__(self, settings: Settings, thresholds: Thresholds, layers: list[str], counts: bool) -> None:
        self._settings = settings
        self._thresholds = thresholds
        self._layers = layers
        self._counts = counts
        self._taken = [0] * 8
        thresholds.set_bounds(settings.bounds(layers))

    def set_target(self, target: float | None = None, decode_target: float | None = None) -> dict[str, float | None]:
        """Put the thresholds of other targets in force, from the next batch on; what has been cached stays as it is.

        Args:
            target: As in the settings.
            decode_target: The same.

        Returns:
            Both targets.

        Raises:
            PlanError: The plan has no such target; the thresholds stay.
        """
        settings = self._settings.with_targets(target, decode_target)
        self._thresholds.set_bounds(settings.bounds(self._layers))
        self._settings = settings
        return {"target": target, "decode_target": decode_target}

    def pairs(self) -> list[int] | None:
        """Return pairs routed and kept since the start, as ``Thresholds.pairs``; None where another worker counts."""
        return self._thresholds.pairs() if self._counts else None

    def take_pairs(self) -> list[int] | None:
        """Return what ``pairs`` has grown by since the last call."""
        now = self.pairs()
        if now is None:
            return None
        before, self._taken = self._taken, now
        return [new - old for new, old in zip(now, before, strict=True)]


def check_config(settings: Settings, config: Any) -> None:
    """Refuse a server that could not skip as asked; before any weights are loaded.

    Args:
        settings: What was asked for.
        config: A ``VllmConfig``.

    Raises:
        ServingError: The server is set up in a way that modes-fx does not serve.
        PlanError: The plan is for another model.
    """
    parallel = config.parallel_config
    refused = {
        "data parallelism (--data-parallel-size)": parallel.data_parallel_size > 1,
        "expert load balancing (--enable-eplb)": parallel.enable_eplb,
        "micro-batches (--enable-dbo)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "LoRA (--enable-lora)": config.lora_config is not None,
        "prompt embeddings (--enable-prompt-embeds)": config.model_config.enable_prompt_embeds,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    if found := [name for name, used in refused.items() if used]:
        raise ServingError(f"modes-fx does not serve with {found[0]}. Leave it out, or start without modes_fx.")
    _check_model(settings, config.model_config)


def _check_model(settings: Settings, model_config: Any) -> None:
    try:
        settings.plan.check_model(model_config.hf_config)
    except PlanError:  # vLLM has classes of its own for some configs, and completes others
        from transformers import AutoConfig

        settings.plan.check_model(
            AutoConfig.from_pretrained(
                model_config.model, revision=model_config.revision, trust_remote_code=model_config.trust_remote_code
            )
        )


def install(worker: Any, settings: Settings) -> Serving:
    """Make a worker's loaded model skip by a plan.

    Args:
        worker: A vLLM worker, after ``load_model``.
        settings: What was asked for.

    Returns:
        What the worker answers to; its methods are put on the worker.

    Raises:
        ServingError: The model, or the way it computes its experts, is not one that skips.
        PlanError: The plan is for another model.
    """
    check_config(settings, worker.vllm_config)
    model, runner = worker.get_model(), worker.model_runner
    layers = {
        module.layer_name: module
        for module in model.modules()
        if hasattr(module, "routed_experts") and hasattr(module, "router")
    }
    names = list(layers)
    start, end = worker.model_config.get_layers_start_end_indices(worker.parallel_config)
    if not layers and worker.parallel_config.pipeline_parallel_size == 1:
        raise ServingError(f"{type(model).__name__} has no MoE layers in vLLM: there is nothing to skip.")
    settings.check_layers(layer_numbers(names), start, end)
    visual = torch.tensor(_visual(settings, worker, model), dtype=torch.int32, device=worker.device)
    thresholds = Thresholds([each.router.top_k for each in layers.values()], _max_tokens(worker), worker.device)
    for index, layer in enumerate(layers.values()):
        _skip_in(layer, LayerThresholds(thresholds, index, layer.moe_config.num_experts))
    find_layers_by(_find)
    _follow(runner, thresholds, visual)
    serving = Serving(settings, thresholds, names, counts=_is_first_of_its_stage())
    for name in ("set_target", "pairs", "take_pairs"):
        setattr(worker, f"modes_fx_{name}", getattr(serving, name))
    logger.info(
        "modes-fx: %d MoE layers skip experts by a plan, target %s, decode target %s, %s",
        len(layers), settings.target, settings.decode_target, _names(layers.values()),
    )  # fmt: skip
    return serving


def _find(layer: str) -> LayerThresholds:
    from vllm.forward_context import get_forward_context

    found: LayerThresholds = getattr(get_forward_context().no_compile_layers[layer], _ATTRIBUTE)
    return found


def _skip_in(layer: Any, own: LayerThresholds) -> None:
    """Put thresholds behind a layer's router, and make its experts leave out what they drop."""
    experts, routed = _experts_of(layer), layer.routed_experts
    divisor = layer.routed_scaling_factor  # what scales the sum here scales the weights in transformers
    choose = layer.router.select_experts
    name = layer.layer_name

    def select_experts(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = choose(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.ops.modes_fx.serve_keep(weights, ids, name)  # type: ignore[no-any-return]
        return (weights, ids) if own.thresholds.idle else own.keep(weights, ids)

    own.thresholds.scales[own.index] = 1 / divisor
    setattr(layer, _ATTRIBUTE, own)
    layer.router.select_experts = select_experts
    if type(experts).__name__ == "TritonExperts":
        extended = triton_experts.extended_map(routed.expert_map, own.num_experts, own.thresholds.classes.device)
        experts.apply = triton_experts.skipping_apply(experts, own.num_experts, extended)
    else:
        experts.apply = cpu_experts.skipping_apply(experts, own.thresholds, own.num_experts)


def _experts_of(layer: Any) -> Any:
    """Return what computes a layer's experts.

    Raises:
        ServingError: It is not known to leave out dropped pairs.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    name, method, router = layer.layer_name, layer.routed_experts.quant_method, layer.router
    if layer.moe_config.is_sequence_parallel:
        raise ServingError(f"{name} spreads its tokens over ranks (sequence parallel MoE), which modes-fx does not serve.")
    if not isinstance(router, BaseRouter) or type(router).__name__ in ("ZeroExpertRouter", "AiterSharedRoutedFusedMoERouter"):
        raise ServingError(f"{name} routes by {type(router).__name__}, which modes-fx does not serve.")
    if getattr(router, "num_fused_shared_experts", 0):
        raise ServingError(f"{name} computes shared experts among the routed ones, which modes-fx does not serve.")
    kernel = method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if type(experts) is TritonExperts:
        return experts
    if isinstance(experts, CPUUnquantizedExperts) and not experts._use_zentorch and layer.routed_experts.expert_map is None:
        return experts
    what = type(method if experts is None else experts).__name__
    advice = (
        "On a CPU, modes-fx serves experts that are not quantised, without expert parallelism."
        if isinstance(own := layer.moe_config.device, torch.device) and own.type == "cpu"
        else "Start with --moe-backend triton."
    )
    raise ServingError(f"{name} computes its experts by {what}, which would compute what is skipped. {advice}")


def _follow(runner: Any, thresholds: Thresholds, visual: torch.Tensor) -> None:
    """Note the classes of the tokens whenever the runner has prepared a batch."""
    prepared = "_preprocess" if hasattr(runner, "_preprocess") else "prepare_inputs"
    prepare, dummy_run = getattr(runner, prepared), runner._dummy_run

    @functools.wraps(prepare)
    def prepare_v1(scheduler_output: Any, num_input_tokens: int, *args: Any, **kwargs: Any) -> Any:
        result = prepare(scheduler_output, num_input_tokens, *args, **kwargs)
        thresholds.begin(of_runner_v1(runner, scheduler_output, visual), num_input_tokens)
        return result

    @functools.wraps(prepare)
    def prepare_v2(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        thresholds.begin(of_runner_v2(runner, batch, visual), batch.num_tokens_after_padding)
        return batch

    @functools.wraps(dummy_run)
    def run_dummy(*args: Any, **kwargs: Any) -> Any:
        thresholds.begin_dummy()
        return dummy_run(*args, **kwargs)

    setattr(runner, prepared, prepare_v1 if prepared == "_preprocess" else prepare_v2)
    runner._dummy_run = run_dummy


def _visual(settings: Settings, worker: Any, model: nn.Module) -> tuple[int, ...]:
    config = worker.model_config.hf_config
    ids = {*settings.plan.model.get("vision_token_ids", ()), *vision_token_ids(config), *visual_ids([config, model])}
    if hasattr(model, "img_context_token_id"):  # InternVL's own code knows it by its name alone
        from vllm.tokenizers import cached_tokenizer_from_config

        ids.add(cached_tokenizer_from_config(worker.model_config).convert_tokens_to_ids("<IMG_CONTEXT>"))
    if worker.model_config.is_multimodal_model and not ids:
        raise ServingError(f"{type(model).__name__} does not say which token stands for an image; modes-fx cannot serve it.")
    return tuple(sorted(ids))


def _max_tokens(worker: Any) -> int:
    sizes = worker.vllm_config.compilation_config.cudagraph_capture_sizes or []
    return int(max([worker.model_runner.max_num_tokens, *sizes]))


def _is_first_of_its_stage() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def _names(layers: Any) -> str:
    return ", ".join(sorted({type(each.routed_experts.quant_method.moe_kernel.fused_experts).__name__ for each in layers}))
