"""What ships with the package beside code, and how it is known to be whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modes_fx.errors import ModelError

FOLDER = Path(__file__).parent.parent / "demo"
SHA256 = {
    "digits.npz": "617a5e4a23426661f31be5d2be76324e9d31e62b432fa89f4dfead1033366b2e",
    "checkpoint/chat_template.jinja": "2a2277ead875fcbbb57d0bb912ac6981d714d88feeb21486c85ac368343521e8",
    "checkpoint/config.json": "b7a1fa37238398a2493a87083d13202c767c5612bf8099c349098cdde22c180e",
    "checkpoint/generation_config.json": "c1e1a8c6f49f04b9cd6d5e63bcc55493f3166cc102711b9bc1e2b7b47393cc65",
    "checkpoint/model.safetensors": "87d55d87a68bf19109d30292f59037dfdd435027be7eba40ee0d18ca2709d07c",
    "checkpoint/processor_config.json": "0d94cda453519e5dc856d8de165f413f970cec2692c18312977d1909aba485f6",
    "checkpoint/tokenizer.json": "39a08317e6073fdda16bbfe0d2fede5fb89275b244567ed698d312d3c084364f",
    "checkpoint/tokenizer_config.json": "1c2585d29636d5de453733bab9ebfb9781ab68b89a6a62b1ff3a9942490cc8eb",
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
