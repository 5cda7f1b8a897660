"""Look-ups that may wait for a network: they say what they wait for, and end."""

from __future__ import annotations

import logging
import os
import socket
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar
from urllib.parse import urlsplit

from modes_fx.errors import ModelError

logger = logging.getLogger(__name__)

NOTICE_S = 1.5
LIMIT_S = 9.0

T = TypeVar("T")


def look_up(what: str, call: Callable[[], T], *, ends: bool = True) -> T:
    """Return what a call returns that may ask the Hugging Face hub; after ``NOTICE_S`` it says so.

    Args:
        what: What is asked for.
        call: Asks for it, in a thread of its own, which nobody waits for at exit.
        ends: Whether to give up after ``LIMIT_S``; not for what may be large.

    Raises:
        ModelError: There was no answer in time.
        Exception: What the call raises.
    """
    answer: Future[T] = Future()
    threading.Thread(target=_answer, args=(call, answer), daemon=True).start()
    wait([answer], NOTICE_S)
    if not answer.done():
        logger.warning("waiting for %s from the Hugging Face hub", what)
        wait([answer], LIMIT_S - NOTICE_S if ends else None)
    if not answer.done():
        raise ModelError(
            f"The Hugging Face hub did not send {what} within {LIMIT_S:g} s. Without network, pass a local folder or "
            "config.json, or set HF_HUB_OFFLINE=1 to use what was downloaded before."
        )
    return answer.result()


def hub_answers() -> bool:
    """Say whether the hub can be reached, as it is assumed to be through a proxy."""
    if urllib.request.getproxies():
        return True
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    address = hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)
    try:
        look_up("an answer", lambda: socket.create_connection(address, timeout=LIMIT_S).close())
    except (ModelError, OSError):
        return False
    return True


def _answer(call: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:  # on its way to the thread that waits
        answer.set_exception(error)
