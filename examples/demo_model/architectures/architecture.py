"""What an architecture is made of, and what all of them share: word-level tokenizer, chat template, start of attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_model.jobs.job import Job
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, ProcessorMixin

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"

# Qwen's, without tools and system prompts. IMAGE stands for what an image is written as.
_CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ IMAGE }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build, train and store one kind of model.

    Attributes:
        name: What the training script calls it.
        build_processor: The processor that knows a job's words.
        build_model: The untrained model in float32, for that processor and job.
        tower: The modules that turn pixels into visual tokens, in a trained order.
        visual_tokens: The visual tokens of the image processor's output, float [T, H], image by image, row by row.
        vision_steps: Steps of the tower alone that it needs for each of a job's pictures.
        steps: Steps of the whole model, by job.
        experts_implementation: What computes the experts in training.
        attention_implementation: What computes the language model's attention in training.
        to_hub_form: Brings a saved checkpoint into the form that lies on the hub.
    """

    name: str
    build_processor: Callable[[Job], ProcessorMixin]
    build_model: Callable[[Any, Job], nn.Module]
    tower: Callable[[Any], dict[str, nn.Module]]
    visual_tokens: Callable[[Any, Mapping[str, Tensor]], Tensor]
    vision_steps: int
    experts_implementation: str
    attention_implementation: str
    to_hub_form: Callable[[Path], None]
    steps: Mapping[str, int] = field(default_factory=lambda: {"grid": 1000, "pairs": 2000})


def build_tokenizer(job: Job, special: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    """One token for each of a job's words; white space costs none. PAD, START, END and UNKNOWN come before `special`."""
    vocabulary = {
        word: index for index, word in enumerate((PAD, START, END, UNKNOWN, *special, "user", "assistant", *job.words))
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=1024,
        **options,
    )


def chat_template(job: Job, image: str) -> str:
    """The chat template, with each image named before it where a job has several (as Qwen's `add_vision_id` does)."""
    if len(job.image_names) == 1:
        return _CHAT_TEMPLATE.replace("IMAGE", f"'{image}'")
    text = f"{list(job.image_names)}[loop.index0] + ' : {image}'"
    return _CHAT_TEMPLATE.replace("IMAGE", text)


def generation_config(tokenizer: PreTrainedTokenizerFast, job: Job) -> GenerationConfig:
    """Greedy, as long as the longest answer."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=job.longest_answer,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def start_as_lookup(attention: nn.Module) -> None:
    """Let attention start as a look-up: alike tokens attend to each other, and copy what they find.

    Queries equal keys and outputs transpose values, as they come to be in trained models (Trockman and Kolter, Mimetic
    Initialization of Self-Attention Layers, 2023). From a random start, finding the cell that a question names took
    hundreds of steps before anything else was learned.
    """
    groups = attention.num_key_value_groups
    for projection in (attention.k_proj, attention.v_proj):
        nn.init.orthogonal_(projection.weight)

    def per_query_head(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)

    attention.q_proj.weight.copy_(per_query_head(attention.k_proj.weight))
    attention.o_proj.weight.copy_(per_query_head(attention.v_proj.weight).T / groups)
