"""Frames of a real video file."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modes_fx import ModesFxError
from modes_fx.lmms.video import frames_of

COUNT = 10


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten frames, each brighter than the one before."""
    av: Any = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "ten.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for index in range(COUNT):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 32), (20 * index,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def shades(frames: list[Image.Image]) -> list[int]:
    """Which of the ten frames these are."""
    return [round(frame.convert("L").resize((1, 1)).getpixel((0, 0)) / 20) for frame in frames]


@pytest.mark.parametrize(("most", "chosen"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, [*range(10)]), (99, [*range(10)])])
def test_frames_are_spread_over_the_whole_video(video: str, most: int, chosen: list[int]) -> None:
    frames = frames_of(video, most, pixels=10**6)
    assert shades(frames) == chosen
    assert {frame.size for frame in frames} == {(64, 32)}


def test_large_frames_shrink_and_keep_their_form(video: str) -> None:
    assert frames_of(video, 1, pixels=512)[0].size == (32, 16)


def test_what_cannot_be_read(video: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "none.mp4", tmp_path / "text.mp4"):
        with pytest.raises(ModesFxError, match=f"Cannot read the video {path}"):
            frames_of(str(path), 4, 512)
    with pytest.raises(ModesFxError, match="whole videos from files"):
        frames_of({"url": video, "video_start": 1.0}, 4, 512)
