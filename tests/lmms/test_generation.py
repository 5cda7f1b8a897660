"""A task's settings and messages become those of transformers."""

import logging

import pytest
from PIL import Image

from modes_fx import ModesFxError
from modes_fx.lmms.generation import chat, cut, generation_settings

GREEDY = {"max_new_tokens": 99, "do_sample": False}


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({}, GREEDY),
        (
            {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 3},
            GREEDY | {"max_new_tokens": 16, "num_beams": 3},
        ),
        ({"temperature": 0, "do_sample": True}, GREEDY),
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, GREEDY),
        ({"temperature": 0.7, "top_p": None}, GREEDY | {"do_sample": True, "temperature": 0.7}),
        ({"do_sample": True, "top_k": 5}, GREEDY | {"do_sample": True, "top_k": 5}),
    ],
)
def test_settings(asked: dict[str, object], settings: dict[str, object]) -> None:
    assert generation_settings(asked, 99) == (settings, ())


def test_settings_of_other_wrappers_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert generation_settings({"image_aspect_ratio": "original"}, 99) == (GREEDY, ())
    assert "image_aspect_ratio" in caplog.text


@pytest.mark.parametrize(("until", "strings"), [("x", ("x",)), (["x", "yy"], ("x", "yy")), (None, ())])
def test_until(until: object, strings: tuple[str, ...]) -> None:
    assert generation_settings({"until": until}, 99)[1] == strings


def test_an_answer_ends_at_the_first_of_its_ends() -> None:
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one two three", ("four", "")) == "one two three"


def test_messages_keep_their_order_and_images_become_rgb() -> None:
    grey = Image.new("L", (4, 4), 7)
    content = [{"type": "text", "text": "a"}, {"type": "image", "url": grey}, {"type": "image", "url": "a.png"}]
    (message,) = chat([{"role": "user", "content": content}], no_frames)
    assert [part.get("text") for part in message["content"]] == ["a", None, None]
    assert message["content"][1]["image"].mode == "RGB"
    assert message["content"][2] == {"type": "image", "image": "a.png"}


def test_a_videos_frames_stand_in_its_place() -> None:
    frames = {"a.mp4": [Image.new("RGB", (1, 1), colour) for colour in ("red", "blue")]}
    content = [{"type": "text", "text": "a"}, {"type": "video", "url": "a.mp4"}, {"type": "text", "text": "b"}]
    (message,) = chat([{"role": "user", "content": content}], frames.__getitem__)
    assert message["content"] == [
        {"type": "text", "text": "a"},
        *({"type": "image", "image": frame} for frame in frames["a.mp4"]),
        {"type": "text", "text": "b"},
    ]


def test_sound_is_refused() -> None:
    with pytest.raises(ModesFxError, match="text, images and videos, and a question has content of type 'audio'"):
        chat([{"role": "user", "content": [{"type": "audio", "url": "a"}]}], no_frames)


def no_frames(video: object) -> list[Image.Image]:
    raise AssertionError(f"there is no video to read, got {video}")
