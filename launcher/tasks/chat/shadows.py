"""Replace a message's characters by others (their shadows), and find those in a template's text."""

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
"""Unicode's planes for private use begin here: 1,022 messages have 128 characters each, without the last of
each plane."""
_EACH = 128
MOST = 1022
"""Messages of a chat that can be told from each other."""
KEPT = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]|(?<!\S)/\w+(?!\S)|[\s\"'\\\x00-\x1f]+")
"""What of a text has no shadow, as templates look for it: tags, commands as `/no_think`, white space, and
what JSON escapes."""
WORDS = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]|(?<!\S)/\w+(?!\S)|[\W_]+")
"""The same, and whatever is neither letter nor digit: for templates that look at more."""
_SPEAKS = ("content", *THOUGHTS, "thought", "tool_plan")


def with_shadows(message: Message, number: int, kept: re.Pattern[str]) -> Message:
    """A message whose text, thoughts and arguments of calls are shadows; names and roles stay, as templates
    write them elsewhere too."""
    found = {key: _shadow(value, number, kept) if key in _SPEAKS else value for key, value in message.items()}
    if isinstance(calls := message.get("tool_calls"), list):
        found["tool_calls"] = [_call_with_shadows(call, number, kept) for call in calls]
    return found


def _call_with_shadows(call: Any, number: int, kept: re.Pattern[str]) -> Any:
    if not isinstance(call, dict):
        return call
    found = {
        key: _shadow(value, number, kept, keys=True) if key == "arguments" else value
        for key, value in call.items()
    }
    if isinstance(call.get("function"), dict):
        found["function"] = _call_with_shadows(call["function"], number, kept)
    return found


def _shadow(value: Any, number: int, kept: re.Pattern[str], keys: bool = False) -> Any:
    """A value whose texts are shadows: of a list of parts their `text` alone, of arguments the keys too."""
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
        # The last characters of each plane are none.
        self._base = _SHADOWS + _EACH * (number if number < MOST // 2 else number + 1)

    def __missing__(self, code: int) -> int:
        self[code] = self._base + code % _EACH
        return self[code]


_shadows_of = functools.lru_cache(maxsize=MOST)(_Shadows)


def _shadow_of_text(text: str, number: int, kept: re.Pattern[str]) -> str:
    table, found, position = _shadows_of(number), [], 0
    for match in kept.finditer(text):
        found += [text[position : match.start()].translate(table), match[0]]
        position = match.end()
    return "".join([*found, text[position:].translate(table)])


def _numbers(text: str) -> np.ndarray:
    """The code points of a text, int32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)


def is_shadow_of(shadowed: str, text: str) -> bool:
    """Whether a text is another with shadows in place of some characters."""
    if len(shadowed) != len(text):
        return False
    shadows, plain = _numbers(shadowed), _numbers(text)
    differ = shadows != plain
    return bool(np.all((shadows[differ] >= _SHADOWS) & (shadows[differ] % _EACH == plain[differ] % _EACH)))


def places_of(shadowed: str) -> dict[int, tuple[int, int]]:
    """From where to where each message speaks, by its number."""
    numbers = _numbers(shadowed)
    positions = np.flatnonzero(numbers >= _SHADOWS)
    slots = (numbers[positions] - _SHADOWS) // _EACH
    messages = slots - (slots > MOST // 2)
    return {
        int(message): (int(positions[messages == message][0]), int(positions[messages == message][-1]) + 1)
        for message in np.unique(messages)
    }


def behind_words(shadowed: str) -> str:
    """What stands behind the last word that a message says."""
    last = np.flatnonzero(_numbers(shadowed) >= _SHADOWS)
    return shadowed[last[-1] + 1 :] if len(last) else shadowed


def names_of_calls(message: Message) -> list[str]:
    """Of the tools that a message calls."""
    calls = message.get("tool_calls")
    found = (
        [call.get("function", call) for call in calls if isinstance(call, dict)]
        if isinstance(calls, list)
        else []
    )
    return [call["name"] for call in found if isinstance(call, dict) and isinstance(call.get("name"), str)]


def has_words(value: Any) -> bool:
    """Whether a shadow stands anywhere in a value's texts."""
    if isinstance(value, str):
        return any(chr(_SHADOWS) <= character for character in value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(has_words, inner))
