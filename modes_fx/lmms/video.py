"""A video as pictures spread evenly over it, which any processor of images takes."""

from __future__ import annotations

from math import sqrt
from typing import Any

from PIL import Image

from modes_fx.errors import ModesFxError


def frames_of(video: Any, most: int, pixels: int) -> list[Image.Image]:
    """Read frames of a video, the first and the last among them.

    Args:
        video: Path of a file.
        most: How many frames; all of them where the video has fewer.
        pixels: A larger frame is shrunk to about as many.

    Returns:
        RGB images in the video's order.

    Raises:
        ModesFxError: PyAV is not installed, the file cannot be read, or it is no path (such as a part of a video).
    """
    if not isinstance(video, str):
        raise ModesFxError(
            f"--model modes_fx reads whole videos from files, and a question has {video!r}. Choose another task."
        )
    try:
        import av
    except ImportError as error:
        raise ModesFxError("Reading videos needs PyAV: pip install av, or choose tasks of images.") from error
    try:
        with av.open(video) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            count = stream.frames
            if not count:  # some formats do not tell
                count = sum(1 for _ in container.decode(stream))
                container.seek(0)
            taken = min(most, count)
            wanted = {index * (count - 1) // max(taken - 1, 1) for index in range(taken)}
            chosen = (frame for index, frame in enumerate(container.decode(stream)) if index in wanted)
            frames = [_shrunk(frame.to_image(), pixels) for frame in chosen]
    except (av.FFmpegError, OSError, IndexError) as error:  # a file without pictures has no such stream
        raise ModesFxError(f"Cannot read the video {video}: {error}.") from error
    if not frames:
        raise ModesFxError(f"Cannot read the video {video}: it has no frames.")
    return frames


def _shrunk(image: Image.Image, pixels: int) -> Image.Image:
    factor = sqrt(pixels / (image.width * image.height))
    if factor >= 1:
        return image
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.BICUBIC)
