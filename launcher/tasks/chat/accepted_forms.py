"""The form of messages that a template accepts: contents as parts or text, arguments as JSON or objects."""

from __future__ import annotations

import functools

from launcher.tasks.chat.forms import (
    are_quoted,
    as_object,
    as_text,
    has_calls,
    in_parts,
    joined,
    with_arguments,
    with_contents,
    with_whole_parts,
)
from launcher.tasks.chat.rows import is_parts
from launcher.tasks.chat.shadows import Message
from launcher.tasks.chat.writer import Tools, Writer


class AcceptedForms:
    """The forms that the templates of one tokenizer accept."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._wants_parts = functools.cache(self._find_wants_parts)

    def wants_parts(self, template: str) -> bool:
        """Return whether a template renders parts and drops plain text, as for vision models."""
        return self._wants_parts(template)

    def of(self, messages: list[Message], tools: Tools) -> list[Message]:
        """Return the messages unchanged, or in another form if the template needs one."""
        messages = [with_whole_parts(message) for message in messages]
        has_parts = any(is_parts(message.get("content")) for message in messages)
        if self.wants_parts(self._writer.template(tools)):
            messages = [in_parts(message) for message in messages]
        elif has_parts and not self._takes_parts(messages, tools):
            messages = [joined(message) for message in messages]
        if not has_calls(messages):
            return messages
        text = self._try(messages, tools)
        # DeepSeek's template joins arguments to other text, so it needs them as text, and it reads a content
        # even if there is none. Most other templates write arguments as JSON, and would quote those that are
        # text already.
        as_texts = [with_arguments(message, as_text) for message in messages]
        others = [as_texts, with_contents(messages), with_contents(as_texts)]
        if text is not None:
            as_objects = [with_arguments(message, as_object) for message in messages]
            others = [as_objects] if are_quoted(messages, text) else []
        for other in others:
            text = self._try(other, tools)
            if text is not None and not are_quoted(other, text):
                return other
        return messages

    def _try(self, messages: list[Message], tools: Tools) -> str | None:
        """Return the template's text; None if it refuses the messages."""
        try:
            return self._writer.write(messages, tools)
        except Exception:  # raised again where the text itself is needed
            return None

    def _takes_parts(self, messages: list[Message], tools: Tools) -> bool:
        """Return whether the template renders a text part like plain text."""
        as_texts = [joined(message) for message in messages]
        as_parts = [
            in_parts(new) if is_parts(old.get("content")) else new
            for old, new in zip(messages, as_texts, strict=True)
        ]
        text = self._try(as_parts, tools)
        return text is not None and text == self._try(as_texts, tools)

    def _find_wants_parts(self, template: str) -> bool:
        chat = [{"role": "user", "content": "word"}]
        try:
            if "word" in self._writer.write_with(template, chat):
                return False
            written = self._writer.write_with(template, [in_parts(chat[0])])
        except Exception:  # it wants other messages than these: the rows will show it
            return False
        return "word" in written and "'type'" not in written and '"type"' not in written
