"""Write messages in other forms: contents as text or parts, arguments of calls as objects or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from launcher.tasks.chat.rows import is_parts, text_of_content
from launcher.tasks.chat.shadows import Message


def with_whole_parts(message: Message) -> Message:
    """A message in whose parts texts alone are parts as well, and no parts at all are no text."""
    content = message.get("content")
    if content == [] and message["role"] == "assistant":
        return {**message, "content": ""}
    if not is_parts(content) or all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return message
    return {**message, "content": [{"type": "text", "text": text_of_content([part])} for part in content]}


def joined(message: Message) -> Message:
    """A message whose parts are one text."""
    return (
        {**message, "content": text_of_content(message["content"])}
        if is_parts(message.get("content"))
        else message
    )


def in_parts(message: Message) -> Message:
    """A message whose text is one part."""
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether any message calls a tool."""
    return any(_calls(message) for message in messages)


def _calls(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _arguments(messages: Sequence[Message]) -> list[Any]:
    return [_function(call).get("arguments") for message in messages for call in _calls(message)]


def with_contents(messages: Sequence[Message]) -> list[Message]:
    """Messages all of which have a content, if without text."""
    return [
        message if message.get("content") is not None else {**message, "content": ""} for message in messages
    ]


def are_quoted(messages: Sequence[Message], text: str) -> bool:
    """Whether arguments that are JSON text stand in a text in quotation marks."""
    return any(
        json.dumps(arguments, ensure_ascii=False) in text
        for arguments in _arguments(messages)
        if isinstance(arguments, str)
    )


def with_arguments(message: Message, changed: Callable[[Any], Any]) -> Message:
    """A message whose calls have other arguments."""
    if not _calls(message):
        return message
    calls = []
    for call in _calls(message):
        function = {
            key: changed(value) if key == "arguments" else value for key, value in _function(call).items()
        }
        calls.append({**call, "function": function} if isinstance(call.get("function"), dict) else function)
    return {**message, "tool_calls": calls}


def as_object(arguments: Any) -> Any:
    """Arguments that are JSON text of an object, as the object."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def as_text(arguments: Any) -> Any:
    """Arguments that are an object, as JSON text."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
