"""A chat in a row: its messages, its tools, and which turns are supervised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType
from typing import Any, TypeGuard

from launcher.data.chat_files import is_image
from launcher.data.rows import (
    BAD_VALUE,
    EMPTY,
    MISSING,
    NOTHING_TO_LEARN,
    IfThere,
    RowProblem,
    is_missing,
    missing,
)
from launcher.data.written import list_in
from launcher.values import Tools

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message from which chat templates read its reasoning."""
TEXT_PARTS = ("text", "input_text", "output_text")


def chat_columns(messages: str, tools: Tools | None) -> tuple[str, ...]:
    """Return the columns of a chat's row: its messages, and its tools if the source has them."""
    return messages, tools if isinstance(tools, str) else IfThere("tools")


def messages_of(values: dict[str, Any], column: str, is_answered: bool = True) -> list[dict[str, Any]]:
    """Return the messages of the chat in `column`.

    Raises RowProblem if there are none, or if a chat with answers has no supervised turn.
    """
    messages = values.get(column)
    if is_missing(messages):
        raise missing(values, column)
    if isinstance(messages, str):
        messages = list_in(messages) if messages.strip() else []
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages
    ):
        raise RowProblem(BAD_VALUE, f"{column!r} is not a list of messages, each with a role and a content")
    if not messages:
        raise RowProblem(EMPTY, f"{column!r} has no messages")
    for number, message in enumerate(messages, start=1):
        if _holds_nan(message.get("content")) and not message.get("tool_calls"):
            raise RowProblem(
                MISSING, f"the content of message {number} of {column!r} is NaN, a missing value"
            )
    messages = [_without_nan(message) for message in messages]
    for number, message in enumerate(messages, start=1):
        _check_content(message, number)
    if not is_answered:
        return messages
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem(NOTHING_TO_LEARN, "no message has the role 'assistant'")
    if not any(is_learned(message, number) for number, message in enumerate(messages, start=1)):
        raise RowProblem(NOTHING_TO_LEARN, "every assistant message has weight 0 or train false")
    return messages


def _holds_nan(content: Any) -> bool:
    """Return whether a content, or a part of it, is NaN, which a template would write out as text."""
    if isinstance(content, list):
        return any(
            _holds_nan(value)
            for part in content
            for value in (part.values() if isinstance(part, dict) else [part])
        )
    return content is not None and is_missing(content)


def _without_nan(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with missing values as null, as JSON has them."""
    return {key: None if is_missing(value) else value for key, value in message.items()}


def _check_content(message: dict[str, Any], number: int) -> None:
    content = message.get("content")
    if is_parts(content):
        if (bad := next((part for part in content if _text_of_part(part) is None), None)) is not None:
            kind = bad.get("type") if isinstance(bad, dict) else type(bad).__name__
            cure = "; model.task: image-text-to-text reads images" if is_image(bad) else ""
            reason = f"message {number} has a part of type {kind!r}, and a causal LM reads text{cure}"
            raise RowProblem(BAD_VALUE, reason)
    elif (
        not isinstance(content, (str, NoneType))
        and content != []
        and not (isinstance(content, (dict, list)) and message["role"] != "assistant")
    ):
        raise RowProblem(
            BAD_VALUE, f"the content of message {number} is a {type(content).__name__}, not text"
        )


def is_parts(content: Any) -> TypeGuard[list[Any]]:
    """Return whether a content is a list of parts in OpenAI's format, not a list that a tool returned."""
    if not isinstance(content, list) or not content:
        return False
    return all(
        isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type", ""), str))
        for part in content
    ) and any(isinstance(part, str) or "type" in part or "text" in part for part in content)


def _text_of_part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    text = part.get("text") if part.get("type", "text") in TEXT_PARTS else None
    return text if isinstance(text, str) else None


def text_of_content(content: Any) -> str:
    """Return the text of a message, or of its parts. Any other tool result becomes JSON."""
    if is_parts(content):
        return "".join(_text_of_part(part) or "" for part in content)
    if isinstance(content, (dict, list)):
        return _as_json(content) if content else ""
    return content if isinstance(content, str) else ""


def is_learned(message: dict[str, Any], number: int) -> bool:
    """Return whether this is a supervised assistant's turn: without `weight: 0` and `train: false`.

    Raises RowProblem for other values of the two.
    """
    if message["role"] != "assistant":
        return False
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise RowProblem(
            BAD_VALUE, f"weight of message {number} is {weight!r}; a turn is learned or not, 1 or 0"
        )
    if not isinstance(train, (bool, NoneType)):
        raise RowProblem(
            BAD_VALUE, f"train of message {number} is {train!r}; a turn is learned or not, true or false"
        )
    return weight != 0 and train is not False


def tools_of(values: dict[str, Any], named: Tools | None) -> list[dict[str, Any]] | None:
    """Return the tools of a row, or else those of the job (`data.tools`); None if there are none.

    Raises RowProblem if they are not a list of objects.
    """
    column = named if isinstance(named, str) else "tools"
    if isinstance(named, str) and column not in values:
        raise RowProblem(
            MISSING, f"no {column!r}, which may be null; the row has {', '.join(map(repr, values))}"
        )
    tools = values.get(column)
    if isinstance(tools, str):
        if (parsed := list_in(tools)) is None and tools.strip() not in ("", "null"):
            raise RowProblem(
                BAD_VALUE, f"{column!r} is text, and no list of tools as JSON or Python writes one"
            )
        tools = parsed
    if is_missing(tools) or tools == []:
        return list(named) if isinstance(named, tuple) and named else None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem(BAD_VALUE, f"{column!r} is not a list of tools, each an object")
    return tools


def texts_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Iterator[str]:
    """Yield the texts of a chat: one for the tools, if any, and one for each message with its reasoning and
    calls."""
    if tools:
        yield _as_json(tools)
    for message in messages:
        thoughts = next((message[key] for key in THOUGHTS if isinstance(message.get(key), str)), "")
        calls = message.get("tool_calls")
        yield thoughts + text_of_content(message.get("content")) + (_as_json(calls) if calls else "")


def _as_json(value: Any) -> str:
    # A table may hold values that JSON lacks, such as dates; they become text.
    return json.dumps(value, ensure_ascii=False, default=str)
