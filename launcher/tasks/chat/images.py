"""Chats with images: their rows, and a template that renders them.

Until the template gets the messages, an image is a text part with a mark of launcher's own. So the code for
text chats applies: the checks, and the search for turns in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from launcher.data.chat_files import image_of, is_image, listed
from launcher.data.rows import BAD_VALUE, RowProblem, is_missing
from launcher.tasks.chat.forms import in_parts, with_whole_parts
from launcher.tasks.chat.rows import TEXT_PARTS, is_parts
from launcher.tasks.chat.shadows import Message
from launcher.tasks.chat.template import ChatTemplate
from launcher.tasks.chat.writer import Tools, Writer

PLACE = "<\ufdd0>"
"""The mark for an image: a tag, which shadows leave unchanged, around a Unicode noncharacter."""
MARK = "<image>"
"""The placeholder for an image in a text, in rows with a list of images."""
_IMAGE = {"type": "image"}


def with_places(
    row: dict[str, Any], column: str, images: str, is_question: bool = False
) -> tuple[dict[str, Any], list[Any]]:
    """Return the row with a mark for each image of its messages, and the images: paths or bytes, in order.

    `is_question`: images in the assistant's last turn are left out, as its words are. Raises RowProblem if
    the numbers of images and marks differ, and for parts that are neither text nor image.
    """
    messages, beside = listed(row.get(column)), listed(row.get(images))
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        return row, []  # reported where the messages are read
    has_list = not is_missing(beside)
    beside = beside if isinstance(beside, list) else [beside] * has_list
    rest, placed, files = iter(beside), list[Message](), list[list[Any]]()
    num_places = 0
    for number, message in enumerate(messages, start=1):
        parts = list(_split(message.get("content"), has_list))
        _check(parts, number)
        given = [image_of(part) for part in parts if is_image(part)]
        num_places += sum(value is None for value in given)
        files.append([next(rest, None) if value is None else value for value in given])
        texts = [{"type": "text", "text": PLACE} if is_image(part) else part for part in parts]
        placed.append({**message, "content": texts} if given else message)
    if num_places != len(beside):
        places = (
            f"the messages have {num_places} places for them ({MARK}, or parts of type image without a file)"
        )
        raise RowProblem(BAD_VALUE, f"{len(beside)} images in {images!r}, and {places}")
    last = len(placed)
    while is_question and last and placed[last - 1].get("role") == "assistant":
        last -= 1
    return {**row, column: placed}, [value for own in files[:last] for value in own]


def _split(content: Any, has_marks: bool) -> Iterator[Any]:
    """Yield the parts of a content, with text split at its placeholders."""
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if not has_marks or not isinstance(text, str) or MARK not in text:
            yield part
            continue
        for number, piece in enumerate(text.split(MARK)):
            yield from (_IMAGE,) if number else ()
            yield from ({"type": "text", "text": piece},) if piece else ()


def _check(parts: Sequence[Any], number: int) -> None:
    """Raise RowProblem for a part that is neither text nor image, and for a text that contains PLACE."""
    for part in parts if is_parts(parts) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not is_image(part) and kind not in TEXT_PARTS:
            reason = f"message {number} has a part of type {kind!r}, and such chats have text and images"
            raise RowProblem(BAD_VALUE, reason)
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if any(isinstance(text, str) and PLACE in text for text in texts):
        raise RowProblem(BAD_VALUE, f"message {number} holds U+FDD0, which is no character")


class ImageWriter(Writer):
    """A chat template that gets images in place of the marks."""

    def write(self, messages: Sequence[Message], tools: Tools, prompt: bool = False) -> str:
        return super().write(_with_images(messages), tools, prompt)

    def write_with(self, template: str, messages: Sequence[Message], prompt: bool = False) -> str:
        return super().write_with(template, _with_images(messages), prompt)

    def generated(self, messages: Sequence[Message], tools: Tools, text: str) -> list[tuple[int, int]]:
        return super().generated(_with_images(messages), tools, text)


def _with_images(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with an image in place of each mark."""
    return [
        {**message, "content": [_IMAGE if part.get("text") == PLACE else part for part in message["content"]]}
        if is_parts(message.get("content"))
        else message
        for message in messages
    ]


class PartsAlone:
    """The form for templates of vision models: every content as parts."""

    def __init__(self, writer: Writer) -> None: ...

    def wants_parts(self, template: str) -> bool:
        """Return whether a template gets parts instead of text."""
        return True

    def of(self, messages: list[Message], tools: Tools) -> list[Message]:
        """Return the messages in that form."""
        return [in_parts(with_whole_parts(message)) for message in messages]


class ImageChatTemplate(ChatTemplate):
    """The chat template of a vision model, for rows of `with_places`."""

    writer_class = ImageWriter
    forms_class = PartsAlone
