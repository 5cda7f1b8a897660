"""Which tokens of a conversation are the answer's."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from modes_fx.data.chat import Turn, name_of, tokenizer_of
from modes_fx.errors import CalibrationError


@dataclass(frozen=True)
class Answer:
    """The answer's place, counted from the end of the conversation: images, which take more tokens in a batch, stand before it.

    Attributes:
        ids: Token ids from the answer's first to the conversation's last.
        length: How many of ``ids`` are to be labelled: the answer's, and the one that ends the turn if there is one.
    """

    ids: tuple[int, ...]
    length: int


def adds_special_tokens(turn: Turn, processor: Any) -> bool:
    """Whether the tokenizer should add its special tokens to a conversation.

    Not to one that begins with them already; a tokenizer alone leaves them to its template, as ``apply_chat_template`` does.
    """
    tokenizer = tokenizer_of(processor)
    bos = getattr(tokenizer, "bos_token", None)
    return tokenizer is not processor and not (bos and turn.text.startswith(bos))


def find_answer(turn: Turn, processor: Any, sample_id: str) -> Answer:
    """Find the tokens of a conversation's answer and of the end of its turn, and check that they spell it.

    Args:
        turn: The conversation.
        processor: Whose tokenizer to use.
        sample_id: Names the sample in errors.

    Raises:
        CalibrationError: The tokens do not decode to the answer.
    """
    tokenizer, add = tokenizer_of(processor), adds_special_tokens(turn, processor)
    ids, (start, stop) = (_by_offsets if tokenizer.is_fast else _by_prefix)(turn, tokenizer, add)
    found = tokenizer.decode(ids[start:stop])
    if _plain(found) != _plain(turn.answer):
        raise CalibrationError(
            f"The tokens in the answer's place of sample {sample_id} decode to {found!r} instead of {turn.answer!r}: "
            f"the tokenizer of {name_of(processor)} cannot write it, or its chat template joins it to the text around it "
            f"({turn.head[-20:]!r} before, {turn.tail[:20]!r} after). Leave the sample out."
        )
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    blank = list(takewhile(lambda token: token not in special and not tokenizer.decode([token]).strip(), ids[stop:]))
    end = stop + len(blank)
    if end < len(ids) and ids[end] in special:
        stop = end + 1
    return Answer(tuple(ids[start:]), stop - start)


def _by_offsets(turn: Turn, tokenizer: Any, add: bool) -> tuple[list[int], tuple[int, int]]:
    encoded = tokenizer(turn.text, add_special_tokens=add, return_offsets_mapping=True)
    first, last = len(turn.head), len(turn.head) + len(turn.answer)
    within = [index for index, (start, stop) in enumerate(encoded["offset_mapping"]) if start < last and stop > first]
    ids: list[int] = encoded["input_ids"]
    return ids, (within[0], within[-1] + 1) if within else (0, 0)


def _by_prefix(turn: Turn, tokenizer: Any, add: bool) -> tuple[list[int], tuple[int, int]]:
    """For tokenizers that tell no offsets: what the head, and the head with the answer, have in common with the whole."""
    texts = (turn.text, turn.head, turn.head + turn.answer)
    whole, head, answered = (list(tokenizer(text, add_special_tokens=add)["input_ids"]) for text in texts)
    start, stop = _common(whole, head), _common(whole, answered)
    if _plain(tokenizer.decode(whole[start:stop])) != _plain(turn.answer):
        stop += 1  # the answer's last token holds the tail's first space too
    return whole, (start, stop)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _plain(text: str) -> str:
    """Text as far as decoders keep it: they differ in spaces, and tokenizers in Unicode's equivalent forms."""
    return "".join(unicodedata.normalize("NFKC", text).split())
