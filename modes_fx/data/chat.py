r"""A sample as the model's chat template writes it, and where in it the answer stands.

    head                                             answer   tail
    <|im_start|>user ... <|im_start|>assistant\n     a cat    <|im_end|>\n

The template is rendered with a marker in the answer's place: what stands before and after the marker is head and tail. So a
template may put anything between the two, such as an empty ``<think></think>`` or a channel, that its generation prompt lacks
or writes differently; no token id or marker of any family is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modes_fx.data.sample import Sample
from modes_fx.errors import CalibrationError

_MARKER = "ANSWER-5f0c9d1e"
# A prompt that tells today's date would have other tokens, so another hash of the data, tomorrow.
_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2025') | replace('%m', '01') | replace('%d', '01') "
    "| replace('%b', 'Jan') | replace('%B', 'January') }}{%- endmacro -%}{{ '' }}"
)
Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A conversation's text in three parts."""

    head: str
    answer: str
    tail: str

    @property
    def text(self) -> str:
        """The whole conversation."""
        return self.head + self.answer + self.tail


class _UnfitError(Exception):
    """The template does not take content of this form."""


def render(sample: Sample, processor: Any, template_kwargs: Mapping[str, Any]) -> Turn:
    """Write a sample through a processor's chat template.

    Content is given as a list of parts or as a string, whichever the template takes; in a string the processor's own
    ``image_token`` stands for each image.

    Args:
        sample: What to write.
        processor: A processor or tokenizer with a chat template.
        template_kwargs: Further variables of the template, such as ``enable_thinking``.

    Raises:
        CalibrationError: The template leaves out the question, an image or the answer, or changes the answer.
    """
    variables = dict(template_kwargs)
    if isinstance(template := _template(processor), str) and "strftime_now" in template:
        variables["chat_template"] = _DATE + template
    answer, reasons = sample.answer.strip(), []
    for form, question, wrap in _forms(sample, processor):
        try:
            head, tail = _around_answer(processor, question, wrap, sample, variables)
            text = _apply(processor, [*question, _assistant(answer, wrap)], variables)
        except _UnfitError as unfit:
            reasons.append(f"content as {form}: {unfit}")
            continue
        if text != head + answer + tail:
            raise CalibrationError(
                f"The chat template of {name_of(processor)} changes the answer of sample {sample.id}: expected {answer!r} "
                f"after {head[-40:]!r}, got {text[-len(answer) - len(tail) - 40 :]!r}. Leave the sample out."
            )
        return Turn(head, answer, tail)
    raise CalibrationError(
        f"The chat template of {name_of(processor)} cannot write sample {sample.id}: {'; '.join(reasons)}. "
        "Set processor.chat_template to one that takes an image and a text."
    )


def name_of(processor: Any) -> str:
    """Return a processor's class, and the folder or name it was loaded from, for messages."""
    path = getattr(tokenizer_of(processor), "name_or_path", "")
    return type(processor).__name__ + (f" ({path})" if path else "")


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def _template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None) or getattr(tokenizer_of(processor), "chat_template", None)


def _forms(sample: Sample, processor: Any) -> Iterator[tuple[str, list[Message], bool]]:
    """Yield forms of the question, and whether the answer is wrapped in a list of parts too."""
    parts: list[Message] = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.question}]
    as_list = [{"role": "user", "content": parts}]
    token = getattr(processor, "image_token", None) or getattr(tokenizer_of(processor), "image_token", None)
    forms = [("lists of parts", as_list, True), ("a list and a string", as_list, False)]
    if not sample.images or isinstance(token, str):
        content = "".join(f"{token}\n" for _ in sample.images) + sample.question
        forms.append(("strings", [{"role": "user", "content": content}], False))
    if tokenizer_of(processor) is processor:
        forms.reverse()  # a text model's template is written for strings
    yield from forms


def _assistant(text: str, wrap: bool) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}] if wrap else text}


def _around_answer(
    processor: Any, question: list[Message], wrap: bool, sample: Sample, variables: Mapping[str, Any]
) -> tuple[str, str]:
    marked = _apply(processor, [*question, _assistant(_MARKER, wrap)], variables)
    if marked.count(_MARKER) != 1:
        raise _UnfitError(f"writes the answer {marked.count(_MARKER)} times")
    head, tail = marked.split(_MARKER)
    if sample.question.strip() not in head:
        raise _UnfitError("leaves the question out")
    if any("'type': 'text'" in part and "'type': 'text'" not in sample.question for part in (head, tail)):
        raise _UnfitError("writes the list itself")
    parts = question[0]["content"]
    if sample.images and isinstance(parts, list):
        without = [{"role": "user", "content": [part for part in parts if part["type"] != "image"]}]
        if _apply(processor, [*without, _assistant(_MARKER, wrap)], variables) == marked:
            raise _UnfitError("leaves the images out")
    return head, tail


def _apply(processor: Any, messages: list[Message], variables: Mapping[str, Any]) -> str:
    try:
        return str(processor.apply_chat_template(messages, tokenize=False, **variables))
    except Exception as error:  # a template may raise whatever its expressions do
        raise _UnfitError(f"{type(error).__name__}: {error}") from error
