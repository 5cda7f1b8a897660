"""``--model modes_fx`` of lmms-eval: any vision-language model that ``modes_fx.optimize`` handles, or its stock baseline."""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from modes_fx.errors import ModesFxError, PlanError
from modes_fx.lmms.generation import chat, cut, generation_settings
from modes_fx.lmms.ratios import live_stats, measured
from modes_fx.lmms.video import frames_of
from modes_fx.models.device import choose_device
from modes_fx.models.layers import Region
from modes_fx.models.loading import check_torchvision, load
from modes_fx.optimize import optimize as optimize_model


class ModesFx(lmms):  # type: ignore[misc]
    """A chat model for lmms-eval. The arguments are those of ``--model_args``.

    Args:
        pretrained: ``"demo"`` for the embedded model, a folder, or the id of a model on the Hugging Face hub.
        model: An already loaded model instead, with its ``processor``; where it is optimised, it is left so.
        processor: One to use instead of the model's own.
        plan: Path of a plan (from Python, a ``SkipPlan`` too). None keeps every expert.
        target: Target skip ratio, in the plan's range; None takes the largest.
        decode_target: The same for decode steps alone; None takes that of ``target``.
        optimize: False leaves the model as it is: the stock baseline.
        region: As for ``modes_fx.optimize``.
        dtype: Of the weights; ``"auto"`` takes the one they are stored in.
        device: Where the model goes; None takes the process's GPU, or the CPU without one.
        device_map: Instead of ``device``, as transformers takes it, such as ``"auto"``.
        batch_size: Questions at a time.
        max_new_tokens: For tasks that name no limit.
        min_pixels: Smallest image, for processors that know it.
        max_pixels: Largest image, for processors that know it.
        max_frames: Frames of a video, spread evenly; each is an image to the model.
        frame_pixels: Largest frame.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ModesFxError: Arguments that do not go together, or what loading and optimising raise.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: Any = None,
        processor: Any = None,
        plan: Any = None,
        target: float | None = None,
        decode_target: float | None = None,
        optimize: bool = True,
        region: Region = "moe",
        dtype: str = "auto",
        device: str | None = None,
        device_map: Any = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_frames: int = 32,
        frame_pixels: int = 448 * 448,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ModesFxError("--model modes_fx runs as one process. Start it without torchrun or accelerate launch.")
        if (pretrained is None) == (model is None) or (model is not None and processor is None):
            raise ModesFxError("Pass either pretrained=, or model= and processor=.")
        skips = any(given is not None for given in (plan, target, decode_target))
        if skips and not optimize:
            raise PlanError("A plan or a target needs the optimised model, but optimize=False asks for the stock one.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ModesFxError(f"batch_size must be a positive number, got {batch_size!r}.")
        check_torchvision()
        if pretrained is not None:
            sizes = {name: size for name, size in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if size is not None}
            model, processor = load(
                pretrained, dtype=dtype, device_map=device_map, processor=processor,
                trust_remote_code=trust_remote_code, sees_images=True, processor_settings=sizes,
            )  # fmt: skip
            if device_map is None:
                model.to(device or choose_device())
        if optimize and (skips or live_stats(model) is None):
            optimize_model(model, plan, target=target, decode_target=decode_target, region=region)
        self.model, self.processor = model, processor
        self.batch_size, self._max_new_tokens = int(batch_size), max_new_tokens
        self._frames = partial(frames_of, most=int(max_frames), pixels=int(frame_pixels))

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.device
        return device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer each request, and log the speed and the measured skip ratios among lmms-eval's metrics.

        Raises:
            ModesFxError: A request has something other than text, images and videos, or a video that cannot be read.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            _, _, gen_kwargs, _, task, _ = request.args
            groups[f"{task} {gen_kwargs}"].append(index)
        chunks = [
            group[start : start + self.batch_size]
            for group in groups.values()
            for start in range(0, len(group), self.batch_size)
        ]
        answers: dict[int, GenerationResult] = {}
        seconds = 0.0
        with measured(self.model) as ratios:
            for chunk in tqdm(chunks, desc="Model Responding"):
                results, taken = self._answer([requests[index] for index in chunk])
                answers.update(zip(chunk, results, strict=True))
                seconds += taken
        tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        metrics = {"total_requests": len(requests), **ratios}
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, additional_metrics=metrics)
        return [answers[index] for index in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> tuple[list[GenerationResult], float]:
        """Answer one batch whose generation settings are the same; return the answers and the seconds that it took."""
        chats = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            chats.append(chat(doc_to_messages(self.task_dict[task][split][doc_id]), self._frames))
        settings, until = generation_settings(requests[0].args[2], self._max_new_tokens)
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.device, self.model.dtype)  # fmt: skip
        started = time.perf_counter()
        with torch.inference_mode():
            output_BS = self.model.generate(**inputs, **settings, pad_token_id=tokenizer.pad_token_id)
        answer_BS = output_BS[:, inputs["input_ids"].shape[1] :].cpu()  # waits for the GPU
        seconds = time.perf_counter() - started
        texts = self.processor.batch_decode(answer_BS, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        lengths = (answer_BS != tokenizer.pad_token_id).sum(dim=1).tolist()
        return [
            GenerationResult(cut(text, until), TokenCounts(output_tokens=length))
            for text, length in zip(texts, lengths, strict=True)
        ], seconds

    def clean(self) -> None:
        """Free what can be freed and keep the model: lmms-eval calls this after each run, and another may follow."""
        gc.collect()
        torch.cuda.empty_cache()

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Not available: tasks that generate answers are.

        Raises:
            ModesFxError: Always.
        """
        raise ModesFxError("--model modes_fx runs tasks whose output_type is generate_until, not loglikelihood.")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not available: tasks that generate one answer are.

        Raises:
            ModesFxError: Always.
        """
        raise ModesFxError("--model modes_fx runs tasks whose output_type is generate_until, not generate_until_multi_round.")
