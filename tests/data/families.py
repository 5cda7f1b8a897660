"""Processors and tokenizers in the manner of real families: real classes, vocabularies of a few lines, own templates."""
# ruff: noqa: RUF001 - DeepSeek's markers are written with such bars

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    DeepseekVLProcessor,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

LINES = ["What is in the picture? A cat sits on a mat.", "Is it a dog? No, it is not.", "yes no user assistant model system\n"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer(kind: str, template: str, special: Mapping[str, str], **options: Any) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a few lines.

    Args:
        kind: "bytes" as GPT-2, "pieces" as Llama 2 (a space before the first word, no word bounds), "words" as Gemma.
        template: Chat template.
        special: Special tokens by attribute; with "bos_token", the tokenizer adds it itself too.
        options: Further options of the tokenizer.
    """
    names = list(special.values())
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[^\s\w]+\n*|\s*\w+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        space = normalizers.Replace(" ", "▁")
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if kind == "pieces" else space
        strip = [decoders.Strip(" ", 1, 0)] if kind == "pieces" else []
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<unk>", *names, *_BYTES], show_progress=False)
    core.train_from_iterator(LINES * 20, trainer)
    if "bos_token" in special:
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    standard = {key: value for key, value in special.items() if key in ("bos_token", "eos_token", "pad_token")}
    others = {key: value for key, value in special.items() if key not in standard}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, extra_special_tokens=others, **standard, **options
    )


@dataclass(frozen=True)
class Family:
    """One way to write a conversation.

    Attributes:
        make: Makes the processor, or the tokenizer of a text model.
        before: What stands right before the answer.
        end: What ends the turn, labelled with the answer.
        images: Whether it takes images.
    """

    make: Callable[[], Any]
    before: str
    end: str
    images: bool = False


_PARTS = """{%- macro parts(content, image) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{{ image if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}"""

QWEN_THINKING = (
    _PARTS
    + """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}
{{- parts(message.content, '').split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\n' + parts(message.content, '') + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"""
)

INTERNVL = (
    _PARTS
    + """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + parts(message.content, '<IMG_CONTEXT>\n') + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
)

LLAVA = """{%- for message in messages -%}
{%- if message.role == 'user' -%}USER: {% else -%}ASSISTANT: {% endif -%}
{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{ part.text + ' ' }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""

LLAVA_STRINGS = """{%- for message in messages -%}
{{ ('USER: ' if message.role == 'user' else ' ASSISTANT: ') + message.content }}
{{- '</s>' if message.role == 'assistant' else '' }}
{%- endfor -%}"""

LLAMA_3 = """{{ bos_token }}{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""

MISTRAL = """{{ bos_token }}{%- for message in messages -%}
{%- if message.role == 'user' -%}
[INST] {% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ '[IMG]' if part.type == 'image' else part.text }}{% endfor %}{% endif %} [/INST]
{%- else -%}{{ ' ' + message.content + eos_token }}{%- endif -%}
{%- endfor -%}"""

GEMMA = (
    _PARTS
    + """{{ bos_token }}{%- for message in messages -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- parts(message.content, '<start_of_image>') | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
)

KIMI = """{%- for message in messages -%}
{%- if loop.first -%}<|im_system|>system<|im_middle|>You are helpful<|im_end|>{%- endif -%}
{{ '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""

HARMONY = """{{ '<|start|>system<|message|>It is ' + strftime_now('%Y-%m-%d') + '.<|end|>' }}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else -%}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""

DEEPSEEK = """{{ bos_token }}{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '<｜User｜>' + message.content }}
{%- else -%}{{ '<｜Assistant｜></think>' + message.content.split('</think>')[-1] + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}"""

DEEPSEEK_VL = (
    _PARTS
    + """{{ bos_token }}{%- for message in messages -%}
{{ ('User: ' if message.role == 'user' else 'Assistant: ') + parts(message.content, '<image_placeholder>') }}
{{- eos_token if message.role == 'assistant' else '\n\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""
)

_IM_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "start": "<|im_start|>"}
_LLAMA_2_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_DEEPSEEK_TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


def _clip() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def _llava(template: str) -> LlavaProcessor:
    core = tokenizer("pieces", template, {**_LLAMA_2_TOKENS, "image_token": "<image>"})
    return LlavaProcessor(_clip(), core, patch_size=4, vision_feature_select_strategy="full", chat_template=template)


def _gemma() -> Gemma3Processor:
    special = {
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "a": "<start_of_turn>", "b": "<end_of_turn>",
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    }  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    return Gemma3Processor(images, tokenizer("words", GEMMA, special), chat_template=GEMMA, image_seq_length=4)


def _internvl() -> InternVLProcessor:
    special = {
        **_IM_TOKENS, "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    core = tokenizer("bytes", INTERNVL, special)

    class WithoutVideo(InternVLProcessor):
        """As the demo's: the video processor needs torchvision."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
            super().__init__(image_processor, tokenizer, image_seq_length=4, chat_template=chat_template)

    images = GotOcr2ImageProcessorPil(size={"height": 8, "width": 8}, crop_to_patches=False)
    return WithoutVideo(images, core, chat_template=INTERNVL)


def _deepseek_vl() -> DeepseekVLProcessor:
    core = tokenizer("bytes", DEEPSEEK_VL, {**_DEEPSEEK_TOKENS, "image_token": "<image_placeholder>"})
    return DeepseekVLProcessor(_clip(), core, chat_template=DEEPSEEK_VL, num_image_tokens=4)


def _kimi() -> PreTrainedTokenizerFast:
    names = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>")
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "im_end": "<|im_end|>"}
    return tokenizer("bytes", KIMI, {**special, **{f"name_{index}": name for index, name in enumerate(names)}})


def _harmony() -> PreTrainedTokenizerFast:
    names = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    special = {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    return tokenizer("bytes", HARMONY, {**special, **{f"name_{index}": name for index, name in enumerate(names)}})


def _llama_3() -> PreTrainedTokenizerFast:
    names = {"a": "<|start_header_id|>", "b": "<|end_header_id|>", "c": "<|eot_id|>"}
    return tokenizer("bytes", LLAMA_3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **names})


def _bytes_alone() -> ByT5Tokenizer:
    return ByT5Tokenizer(chat_template=LLAVA_STRINGS)


FAMILIES = {
    "internvl": Family(_internvl, "assistant\n", "<|im_end|>", images=True),
    "llava": Family(lambda: _llava(LLAVA), "ASSISTANT: ", "", images=True),
    "llava, strings": Family(lambda: _llava(LLAVA_STRINGS), "ASSISTANT: ", "</s>", images=True),
    "gemma": Family(_gemma, "model\n", "<end_of_turn>", images=True),
    "deepseek-vl": Family(_deepseek_vl, "Assistant: ", "<｜end▁of▁sentence｜>", images=True),
    "qwen, thinking": Family(lambda: tokenizer("bytes", QWEN_THINKING, _IM_TOKENS), "</think>\n\n", "<|im_end|>"),
    "llama-3": Family(_llama_3, "<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": Family(
        lambda: tokenizer("pieces", MISTRAL, {**_LLAMA_2_TOKENS, "a": "[INST]", "b": "[/INST]"}), "[/INST] ", "</s>"
    ),
    "kimi": Family(_kimi, "assistant<|im_middle|>", "<|im_end|>"),
    "gpt-oss": Family(_harmony, "<|channel|>final<|message|>", "<|return|>"),
    "deepseek": Family(lambda: tokenizer("bytes", DEEPSEEK, _DEEPSEEK_TOKENS), "</think>", "<｜end▁of▁sentence｜>"),
    "without offsets": Family(_bytes_alone, "ASSISTANT: ", "</s>"),
}
