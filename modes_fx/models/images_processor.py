"""Qwen3-VL's processor without the video processor, whose every class needs torchvision."""

from typing import Any

from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor


class Qwen3VLImagesProcessor(Qwen3VLProcessor):
    """Images by PIL and text; expands an image's placeholder to its visual tokens and marks them.

    `ProcessorMixin` reads a processor's parts off the signature of `__init__`: leaving `video_processor` out of it is
    what leaves the part out.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        """Take the parts that `from_pretrained` loaded."""
        # Where torchvision is installed, its image processor would have been loaded, whose pixels differ slightly.
        if image_processor is not None and not isinstance(image_processor, Qwen2VLImageProcessorPil):
            image_processor = Qwen2VLImageProcessorPil.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)  # type: ignore[no-untyped-call]
