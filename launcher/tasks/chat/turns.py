"""The search for a chat's turns in the text that a template writes, whatever it puts around them.

The chat is rendered twice: unchanged, and with each character of a message replaced by its shadow, which
encodes the character and the message. The texts differ where a message speaks; the rest is the template's
own. So the place of each message is known, even if the template strips, moves or drops something, or puts one
message into another's turn.

A turn begins where the template's generation prompt ends. The model's input is not supervised; all that it
would have to generate is, including `<think>` and the marks of a call. A turn ends with its end token.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from launcher.data.rows import BAD_VALUE, RowProblem
from launcher.tasks.chat.shadows import (
    KEPT,
    MOST,
    WORDS,
    Message,
    behind_words,
    has_words,
    is_shadow_of,
    names_of_calls,
    places_of,
    with_shadows,
)

Write = Callable[[Sequence[Message], bool], str]
"""The text of some messages, with a generation prompt or without."""

_PIECES = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|[\W_]")
"""The units of comparison between two texts of a template."""
_NEAR = 400
"""The number of pieces before a turn in which its header is searched."""


class Turn(NamedTuple):
    """An assistant's turn in the text: from the first character that it must generate to the last of its end
    token."""

    message: int
    """Its number among the messages, from 0."""
    start: int
    end: int


class Marks(NamedTuple):
    """The text that a template puts around turns, as seen in a made-up chat."""

    header: str
    """The text between a user's last word and an answer."""
    prompt: str
    """The part of it that a generation prompt adds."""
    ends: tuple[str, ...]
    """The texts that end a turn, each by itself."""


def marks_of(write: Write, content: Any, added: re.Pattern[str], known: Sequence[str]) -> Marks:
    """Return what a template puts around turns, from a rendered chat of three messages that all say
    `content`; `known` are tokens that end a turn in any case."""
    chat = [
        with_shadows({"role": role, "content": content}, n, KEPT)
        for n, role in enumerate(("user", "assistant", "user"))
    ]
    header, prompt, ends = "", "", list(known)
    try:
        header = behind_words(write(chat[:1], True))
        prompt = header.removeprefix(behind_words(write(chat[:1], False)))
        last = behind_words(write(chat[:2], False))
        whole = write(chat, False)
    except Exception:  # A template may refuse these messages; then it must be found in each row's own text.
        return Marks(header, prompt, tuple(ends))
    places = places_of(whole)
    if places.keys() != {0, 1, 2}:
        return Marks(header, prompt, tuple(ends))
    ahead, between = whole[places[0][1] : places[1][0]], whole[places[1][1] : places[2][0]]
    if not prompt and ahead.startswith(header) and (named := ahead[len(header) :].rstrip(" ")).strip():
        # A template without a generation prompt: the text that always precedes an answer is its header.
        header, prompt = header + named, named
    shared = _shared(between, last)
    if end := _last_end(shared, added):
        ends.append(end)
    else:
        ends += _ends_apart(between, last, header, added)
    return Marks(header, prompt, tuple(dict.fromkeys(ends)))


def _last_end(text: str, added: re.Pattern[str]) -> str:
    tokens = added.findall(text)
    return str(tokens[-1]) if tokens else text.strip()


def _ends_apart(between: str, last: str, header: str, added: re.Pattern[str]) -> list[str]:
    """Return the two ends of a template that ends its last turn differently, as gpt-oss does.

    A token that begins another speaker's turn is not an end.
    """
    inner, outer = added.match(between.lstrip()), added.match(last.lstrip())
    if outer is None:
        return []
    same_for_users = inner is not None and header.lstrip().startswith(inner[0])
    return [outer[0], inner[0]] if inner is not None and same_for_users else [outer[0]]


def turns(
    messages: Sequence[Message], text: str, write: Write, marks: Marks, added: re.Pattern[str]
) -> list[Turn]:
    """Return every assistant's turn in `text`, which `write` wrote from the messages; in order.

    Raises RowProblem if text cannot be assigned to messages, or if a message with text is left out.
    """
    if len(messages) > MOST:
        raise RowProblem(BAD_VALUE, f"{len(messages):,} messages; a chat may have {MOST:,}")
    return _Search(messages, text, write, marks, added).turns()


def check_said(messages: Sequence[Message], text: str, write: Write) -> None:
    """Raise RowProblem if a template that marks turns itself leaves out the assistant's text in one."""
    try:
        search = _Search(messages, text, write, Marks("", "", ()), re.compile("(?!)"))
    except RowProblem:  # It cannot be checked, and need not be.
        return
    search.check_said()


class _Search:
    def __init__(
        self, messages: Sequence[Message], text: str, write: Write, marks: Marks, added: re.Pattern[str]
    ) -> None:
        self._text = text
        self._write = write
        self._marks = marks
        self._added = added
        self._shadows, self._shadowed = self._find_shadows(messages)
        self._places = places_of(self._shadowed)

    def _find_shadows(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Return the messages with shadows, and their text. As many characters as possible get one without
        changing how the template treats the messages."""
        everyone = {message["role"] for message in messages}
        # A message may contain the text that ends a turn: there it gets a shadow, and ends nothing.
        ends = "|".join(map(re.escape, self._marks.ends)) or "(?!)"
        first = re.compile(f"(?!{ends})(?:{KEPT.pattern})")
        for kept, roles in (
            (first, everyone),
            (KEPT, everyone),
            (KEPT, everyone - {"system", "developer"}),
            (WORDS, {"assistant"}),
        ):
            shadows = [with_shadows(m, n, kept) if m["role"] in roles else m for n, m in enumerate(messages)]
            try:
                shadowed = self._write(shadows, False)
            except Exception:  # The template looks for something that has a shadow now.
                continue
            if is_shadow_of(shadowed, self._text):
                return shadows, shadowed
        raise RowProblem(
            BAD_VALUE,
            "what the chat template writes depends on what messages say, so that turns cannot be told",
        )

    def turns(self) -> list[Turn]:
        turns: list[Turn] = []
        for number, message in enumerate(self._shadows):
            if message["role"] == "assistant":
                turn = self._turn(number, turns[-1].end if turns else 0)
                turns.append(turn)
        return turns

    def _turn(self, number: int, after: int) -> Turn:
        visible = number in self._places
        before, following = self._around(number)
        gap = self._shadowed[before:following]
        header = self._prompt(number)
        length = _header_length(gap, self._marks.header if header is None else header)
        if gap.startswith(self._marks.prompt, length):
            # As in Gemma 4, which has no generation prompt after a tool's answer, but writes one there later.
            length += len(self._marks.prompt)
        start = max(before + length, after)
        speaks = self._places[number] if visible else (start, start)
        if visible and (start > speaks[0] or self._interrupted(number)):
            raise RowProblem(
                BAD_VALUE,
                f"the chat template writes message {number + 1} among others, so that its turn cannot be told",
            )
        end = max(speaks[1] + self._closing(number, speaks[1], visible, length), start)
        self._check_said(number, self._text[start:end])
        return Turn(number, start, end)

    def check_said(self) -> None:
        for number, message in enumerate(self._shadows):
            if message["role"] == "assistant":
                self._check_said(number, self._text)

    def _check_said(self, number: int, text: str) -> None:
        """Raise RowProblem if a text lacks a tool that the message calls, or all of its words.

        A message with calls may lose its reasoning.
        """
        shadows, names = self._shadows[number], names_of_calls(self._shadows[number])
        words = [value for key, value in shadows.items() if not names or key in ("content", "tool_calls")]
        missed = next((name for name in names if name not in text), None)
        if missed is not None:
            what = f"the chat template leaves out what message {number + 1} says: a call of {missed!r}"
            raise RowProblem(BAD_VALUE, f"{what}. A model whose template writes calls is needed")
        if number not in self._places and has_words(words):
            raise RowProblem(BAD_VALUE, f"the chat template leaves out what message {number + 1} says")

    def _around(self, number: int) -> tuple[int, int]:
        """Return where the last word before a turn ends, and where its own first word begins.

        For a turn without words, where the next message's first word begins.
        """
        spoken = sorted(self._places.items(), key=lambda item: item[1])
        if number in self._places:
            begins = self._places[number][0]
        else:
            begins = min((start for other, (start, _) in spoken if other > number), default=len(self._text))
        return max((end for _, (_, end) in spoken if end <= begins), default=0), begins

    def _interrupted(self, number: int) -> bool:
        start, end = self._places[number]
        return any(
            start < other < end for name, place in self._places.items() if name != number for other in place
        )

    def _prompt(self, number: int) -> str | None:
        """Return the part of a turn that is the model's input: the end of the chat so far, with a generation
        prompt. None if the template refuses that chat."""
        try:
            return behind_words(self._write(self._shadows[:number], True)) if number else None
        except Exception:  # For example if a chat begins with the assistant, or two messages share a turn.
            return None

    def _closing(self, number: int, position: int, visible: bool, header: int) -> int:
        """Return how many characters after a turn's last word belong to it."""
        following = min(
            (start for start, _ in self._places.values() if start >= position), default=len(self._text)
        )
        behind = self._shadowed[position:following]
        first, names = self._added.search(behind), names_of_calls(self._shadows[number])
        if first is not None and first[0] in self._marks.ends and not any(name in behind for name in names):
            return first.end()
        shared = rest = behind
        if number + 1 < len(self._shadows):
            try:
                alone = behind_words(self._write(self._shadows[: number + 1], False))
            except Exception:  # The template refuses a chat that ends here.
                alone = behind
            alone = alone if visible else alone[header:]
            shared = _shared(behind, alone)
            rest = alone[len(shared) :]
        # A template may write the last turn differently. For a turn without words, the first end is its own.
        within = shared if visible or shared.strip() else behind
        last_name = max((within.rfind(name) + len(name) for name in names if name in shared), default=0)
        ends = [
            within.find(end, last_name) + len(end) for end in self._marks.ends if end in within[last_name:]
        ]
        if ends:
            return min(ends)
        # In the middle of a chat a turn may have another end than at the end.
        other = next((end for end in self._marks.ends if behind.startswith(end, len(shared))), "")
        return (
            len(shared) + len(other) if other and rest.startswith(self._marks.ends) else len(shared.rstrip())
        )


def _shared(one: str, other: str) -> str:
    """Return the common beginning of two texts, in whole pieces."""
    length = 0
    for piece, same in zip(_PIECES.findall(one), _PIECES.findall(other), strict=False):
        if piece != same:
            break
        length += len(piece)
    return one[:length]


def _header_length(gap: str, prompt: str) -> int:
    """Return how many characters of `gap`, the text before an answer's first word, are the model's input.

    If the gap begins with `prompt`, that is all of `prompt`. But a prompt may have more text than is written
    later (`<think>`), or another speaker's turn may end differently in the middle of a chat. Then it is all
    up to the end of the longest run that both share, ignoring white space.
    """
    if gap.startswith(prompt):
        return len(prompt)
    shared = _shared(gap, prompt)
    if shared == gap:
        return len(gap)
    pieces, given = _PIECES.findall(gap)[-_NEAR:], _PIECES.findall(prompt)[-_NEAR:]
    runs = difflib.SequenceMatcher(None, pieces, given, autojunk=False).get_matching_blocks()
    best = max(runs, key=lambda run: len("".join(pieces[run.a : run.a + run.size]).strip()))
    return len(gap) - len("".join(pieces[best.a + best.size :])) if best.size else len(gap)
