"""Conversions of messages: contents as text or parts, arguments of calls as objects or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from launcher.tasks.chat.rows import is_parts, text_of_content
from launcher.tasks.chat.shadows import Message


def with_whole_parts(message: Message) -> Message:
    """Return the message with each text among its parts as a text part; an empty list becomes an empty
    text."""
    content = message.get("content")
    if content == [] and message["role"] == "assistant":
        return {**message, "content": ""}
    if not is_parts(content) or all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return message
    return {**message, "content": [{"type": "text", "text": text_of_content([part])} for part in content]}


def joined(message: Message) -> Message:
    """Return the message with its parts joined to one text."""
    return (
        {**message, "content": text_of_content(message["content"])}
        if is_parts(message.get("content"))
        else message
    )


def in_parts(message: Message) -> Message:
    """Return the message with its text as its only part."""
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )


def has_calls(messages: Sequence[Message]) -> bool:
    """Return whether any message calls a tool."""
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
    """Return the messages with an empty text as content where they have none."""
    return [
        message if message.get("content") is not None else {**message, "content": ""} for message in messages
    ]


def are_quoted(messages: Sequence[Message], text: str) -> bool:
    """Return whether arguments given as JSON text were written as a quoted string."""
    return any(
        json.dumps(arguments, ensure_ascii=False) in text
        for arguments in _arguments(messages)
        if isinstance(arguments, str)
    )


def with_arguments(message: Message, changed: Callable[[Any], Any]) -> Message:
    """Return the message with `changed` applied to the arguments of its calls."""
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
    """Return arguments that are an object's JSON text as that object; others unchanged."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def as_text(arguments: Any) -> Any:
    """Return arguments that are an object as JSON text; others unchanged."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
