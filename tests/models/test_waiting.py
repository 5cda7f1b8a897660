"""Look-ups that wait: they say so, and end; no network is asked here."""

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoProcessor, PretrainedConfig

from modes_fx.cli import shared
from modes_fx.errors import ModelError
from modes_fx.models import waiting
from modes_fx.models.loading import _load_processor
from modes_fx.models.meta_model import read_config
from modes_fx.models.waiting import hub_answers, look_up


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whether the hub answers; both times are short."""
    monkeypatch.setattr(waiting, "NOTICE_S", 0.01)
    monkeypatch.setattr(waiting, "LIMIT_S", 0.1)
    answers = threading.Event()
    yield answers
    answers.set()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "modes_fx.models.waiting"]


def test_the_times_are_those_that_a_user_waits() -> None:
    assert waiting.NOTICE_S < 2
    assert waiting.LIMIT_S < 10


def test_what_is_there_at_once_comes_back_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert look_up("the config", lambda: 3) == 3
    with pytest.raises(KeyError):
        look_up("the config", lambda: {}["x"])
    assert said(caplog) == []


def test_a_hub_that_does_not_answer_is_named_and_given_up(hub: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError, match=r"did not send the config of org/model within.*HF_HUB_OFFLINE=1"):
        look_up("the config of org/model", hub.wait)
    assert said(caplog) == ["waiting for the config of org/model from the Hugging Face hub"]


def test_a_large_file_is_waited_for_with_one_word_of_it(hub: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    threading.Timer(0.2, hub.set).start()
    assert look_up("the weights of org/model", hub.wait, ends=False) is True
    assert said(caplog) == ["waiting for the weights of org/model from the Hugging Face hub"]


def test_the_config_of_a_hub_model_is_looked_up_so(hub: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", lambda name: hub.wait())
    with pytest.raises(ModelError, match=r"the config of org/model within.*local folder or config\.json"):
        read_config("org/model")


def test_the_processor_of_a_hub_model_is_waited_for(
    hub: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(name: str, **settings: Any) -> str:
        threading.Timer(0.2, hub.set).start()
        hub.wait()
        return name

    monkeypatch.setattr(AutoProcessor, "from_pretrained", slow)
    assert _load_processor("org/model", AutoProcessor, False, False, {}) == "org/model"
    assert said(caplog) == ["waiting for the processor of org/model from the Hugging Face hub"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "http://127.0.0.1:{port}/mirror"])
def test_a_hub_is_there_if_it_takes_a_connection(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", endpoint.format(port=listening.getsockname()[1]))
        assert not hub_answers()  # nobody listens yet
        listening.listen()
        assert hub_answers()


def test_through_a_proxy_no_connection_of_our_own_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr("socket.create_connection", lambda *args, **kwargs: 1 / 0)
    assert hub_answers()


def test_a_command_goes_offline_at_once_where_there_is_no_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    shared.check_model("org/model")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE=1" in capsys.readouterr().err
    shared.check_model("org/model")
    assert capsys.readouterr().err == ""
