"""What ships with the package beside code, and how it is known to be whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modes_fx.errors import ModelError

FOLDER = Path(__file__).parent.parent / "demo"
SHA256 = {
    "digits.npz": "617a5e4a23426661f31be5d2be76324e9d31e62b432fa89f4dfead1033366b2e",
    "checkpoint/chat_template.jinja": "2a2277ead875fcbbb57d0bb912ac6981d714d88feeb21486c85ac368343521e8",
    "checkpoint/config.json": "cbca2d72ed2f0bee38303cc5669474b2ee458d212fc179e4fe136b5d832fbeda",
    "checkpoint/generation_config.json": "c1e1a8c6f49f04b9cd6d5e63bcc55493f3166cc102711b9bc1e2b7b47393cc65",
    "checkpoint/model.safetensors": "0309d971aeffcacecb55cabcf7e58f7028edcb76fa04cd3a3cdc4b31c6b5c397",
    "checkpoint/processor_config.json": "7bdfd7d697cc743f6251825d1bfedd14c5ad8cb9e69c2a51055026d736ca7f6f",
    "checkpoint/tokenizer.json": "39a08317e6073fdda16bbfe0d2fede5fb89275b244567ed698d312d3c084364f",
    "checkpoint/tokenizer_config.json": "bb4ce8af6c1824bcaed596415555ad260a2dcabacda5975b94fa6b165e22b92a",
}


def read_shipped(name: str, folder: Path = FOLDER) -> bytes:
    """Return a shipped file's content.

    Args:
        name: One of ``SHA256``.
        folder: Where it lies.

    Raises:
        ModelError: It is missing or damaged.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"Cannot read the demo's {path}: {error.strerror}. Install modes-fx again.") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ModelError(f"The demo's {path} is not as it was shipped. Install modes-fx again.")
    return content


def check_checkpoint() -> None:
    """See that the embedded checkpoint is whole.

    Raises:
        ModelError: A file of it is missing or damaged.
    """
    for name in SHA256:
        if name.startswith("checkpoint/"):
            read_shipped(name)
