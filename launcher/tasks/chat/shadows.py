"""Shadows: characters that replace those of a message, so that it can be found in a template's text."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.chat.rows import THOUGHTS

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

Message = dict[str, Any]

_SHADOWS = 0xF0000
"""The start of Unicode's private use planes: room for 1,022 messages of 128 characters, without the last of
each plane."""
_EACH = 128
MOST = 1022
"""The most messages of a chat that can have distinct shadows."""
KEPT = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]|(?<!\S)/\w+(?!\S)|[\s\"'\\\x00-\x1f]+")
"""Parts of a text without shadows, because templates look for them: tags, commands such as `/no_think`, white
space, and characters that JSON escapes."""
WORDS = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]|(?<!\S)/\w+(?!\S)|[\W_]+")
"""The same, and every character that is neither letter nor digit: for templates that look for more."""
_SPEAKS = ("content", *THOUGHTS, "thought", "tool_plan")


def with_shadows(message: Message, number: int, kept: re.Pattern[str]) -> Message:
    """Return the message with shadows for its text, its reasoning and the arguments of its calls.

    Names and roles stay, because templates write them elsewhere too.
    """
    shadowed = {
        key: _shadow(value, number, kept) if key in _SPEAKS else value for key, value in message.items()
    }
    if isinstance(calls := message.get("tool_calls"), list):
        shadowed["tool_calls"] = [_call_with_shadows(call, number, kept) for call in calls]
    return shadowed


def _call_with_shadows(call: Any, number: int, kept: re.Pattern[str]) -> Any:
    if not isinstance(call, dict):
        return call
    shadowed = {
        key: _shadow(value, number, kept, keys=True) if key == "arguments" else value
        for key, value in call.items()
    }
    if isinstance(call.get("function"), dict):
        shadowed["function"] = _call_with_shadows(call["function"], number, kept)
    return shadowed


def _shadow(value: Any, number: int, kept: re.Pattern[str], keys: bool = False) -> Any:
    """Return the value with shadows for its texts: in parts only for `text`, in arguments also for keys."""
    if isinstance(value, str):
        return _shadow_of_text(value, number, kept)
    if isinstance(value, list):
        return [_shadow(inner, number, kept, keys) for inner in value]
    if isinstance(value, dict):
        names = {key: _shadow_of_text(key, number, kept) if keys else key for key in value}
        return {
            names[key]: inner if key == "type" and not keys else _shadow(inner, number, kept, keys)
            for key, inner in value.items()
        }
    return value


class _Shadows(dict[int, int]):
    """The shadows of one message, for str.translate()."""

    def __init__(self, number: int) -> None:
        super().__init__()
        # The last code points of each plane are noncharacters.
        self._base = _SHADOWS + _EACH * (number if number < MOST // 2 else number + 1)

    def __missing__(self, code: int) -> int:
        self[code] = self._base + code % _EACH
        return self[code]


_shadows_of = functools.lru_cache(maxsize=MOST)(_Shadows)


def _shadow_of_text(text: str, number: int, kept: re.Pattern[str]) -> str:
    table, pieces, position = _shadows_of(number), [], 0
    for match in kept.finditer(text):
        pieces += [text[position : match.start()].translate(table), match[0]]
        position = match.end()
    return "".join([*pieces, text[position:].translate(table)])


def _numbers(text: str) -> np.ndarray:
    """Return the code points of a text, int32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)


def is_shadow_of(shadowed: str, text: str) -> bool:
    """Return whether `shadowed` is `text` with shadows in place of some characters."""
    if len(shadowed) != len(text):
        return False
    shadows, plain = _numbers(shadowed), _numbers(text)
    differ = shadows != plain
    return bool(np.all((shadows[differ] >= _SHADOWS) & (shadows[differ] % _EACH == plain[differ] % _EACH)))


def places_of(shadowed: str) -> dict[int, tuple[int, int]]:
    """Return the span of each message's words in the text, by the message's number."""
    numbers = _numbers(shadowed)
    positions = np.flatnonzero(numbers >= _SHADOWS)
    slots = (numbers[positions] - _SHADOWS) // _EACH
    messages = slots - (slots > MOST // 2)
    return {
        int(message): (int(positions[messages == message][0]), int(positions[messages == message][-1]) + 1)
        for message in np.unique(messages)
    }


def behind_words(shadowed: str) -> str:
    """Return the text after the last word of any message."""
    last = np.flatnonzero(_numbers(shadowed) >= _SHADOWS)
    return shadowed[last[-1] + 1 :] if len(last) else shadowed


def names_of_calls(message: Message) -> list[str]:
    """Return the names of the tools that a message calls."""
    calls = message.get("tool_calls")
    functions = (
        [call.get("function", call) for call in calls if isinstance(call, dict)]
        if isinstance(calls, list)
        else []
    )
    return [
        call["name"] for call in functions if isinstance(call, dict) and isinstance(call.get("name"), str)
    ]


def has_words(value: Any) -> bool:
    """Return whether a value's texts contain a shadow."""
    if isinstance(value, str):
        return any(chr(_SHADOWS) <= character for character in value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(has_words, inner))
