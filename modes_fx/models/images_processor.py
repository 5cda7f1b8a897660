"""Processors without their video processor, whose every class needs torchvision: images by PIL, and text.

`ProcessorMixin` reads a processor's parts off the signature of `__init__`: leaving `video_processor` out of it is what leaves
the part out. Where torchvision is installed, its image processor is loaded, whose pixels differ slightly: PIL's replaces it.
"""

from typing import Any

from transformers import GotOcr2ImageProcessorPil, InternVLProcessor, Qwen2VLImageProcessorPil, Qwen3VLProcessor


class Qwen3VLImagesProcessor(Qwen3VLProcessor):
    """Expands an image's placeholder to its visual tokens and marks them."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        """Take the parts that `from_pretrained` loaded."""
        images = _by_pil(image_processor, Qwen2VLImageProcessorPil)
        super().__init__(images, tokenizer, chat_template=chat_template, **kwargs)  # type: ignore[no-untyped-call]


class InternVLImagesProcessor(InternVLProcessor):
    """Cuts an image into tiles, each of `image_seq_length` visual tokens."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the parts that `from_pretrained` loaded."""
        images = _by_pil(image_processor, GotOcr2ImageProcessorPil)
        super().__init__(images, tokenizer, image_seq_length=image_seq_length, chat_template=chat_template, **kwargs)


def _by_pil(image_processor: Any, kind: Any) -> Any:
    if image_processor is None or isinstance(image_processor, kind):
        return image_processor
    return kind.from_dict(image_processor.to_dict())
