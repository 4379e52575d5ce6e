"""Rows of tagged words: lists of words with tags, or a text with spans over it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from launcher.data.labels import class_name
from launcher.data.rows import (
    BAD_LABEL,
    BAD_VALUE,
    EMPTY,
    RowProblem,
    check_encodable,
    is_missing,
    missing,
    text_of,
)
from launcher.data.section import Data
from launcher.data.written import list_in
from launcher.tasks import schemes
from launcher.tasks.schemes import Entity, Scheme
from launcher.tasks.task import Finding, finding
from launcher.tasks.words import words_of


class TaggedColumns(Data):
    """Rows of words with tags, or of a text with spans."""

    words: str | None = None
    """The column with a list of words; of a .conll file, its number from 0."""
    tags: str | None = None
    """The column with a list of tags, one for each word; of a .conll file, its number from 0, or -1 for the
    last."""
    tag_names: tuple[str, ...] | None = None
    """The names of tags that are numbers, in their order: [O, B-person, I-person]."""
    text: str | None = None
    """The column of a text, where entities are given as spans."""
    spans: str | None = None
    """The column with a list of spans over the text: objects with `start`, `end` (in characters, the end not
    included) and `label`, or lists of these three."""
    scheme: Scheme = "BIO"
    """How the model writes entities in tags; none where tags are classes of words, as parts of speech."""
    rows_scheme: Scheme | None = None
    """How the rows write them, where that differs; they are converted."""
    label_pieces: Literal["first", "all"] = "first"
    """Whether the first piece of a word learns its tag, or all of its pieces; the first alone is read."""
    long_texts: Literal["windows", "first"] = "windows"
    """What becomes of a text of more than max_length tokens where `too_long` is `cut`: windows that overlap,
    or its first tokens alone."""
    window_overlap: int | None = None
    """Tokens that two windows of a text may share, at most half of max_length; left out, a quarter of it."""


def checks(data: TaggedColumns) -> Iterator[Finding]:
    """Yield contradictions between these keys."""
    kinds = ("data.words", "data.tags", "data.text", "data.spans")
    named = [key for key in ("words", "tags", "text", "spans") if getattr(data, key) is not None]
    if named not in (["words", "tags"], ["text", "spans"]):
        there = f"there is {' and '.join(named)}" if named else "there is none"
        yield finding(
            "data", None, f"token-classification reads words + tags, or text + spans; {there}", *kinds
        )
    if data.scheme == "none" and data.spans is not None:
        reason = "spans are entities, and entities are written in tags by a scheme: write BIO, BIOES or IO"
        yield finding("data.scheme", "none", reason, "data.spans")
    written = data.rows_scheme
    if written is not None and data.spans is not None:
        yield finding(
            "data.rows_scheme", written, "spans are written in no scheme: leave it out", "data.spans"
        )
    elif written is not None and (written == "none") != (data.scheme == "none"):
        yield finding("data.rows_scheme", written, f"cannot be converted to {data.scheme}", "data.scheme")
    overlap, most = data.window_overlap, data.max_length // 2
    if overlap is not None and not 0 <= overlap <= most:
        reason = f"write 0 to {most}, half of data.max_length"
        yield finding("data.window_overlap", overlap, reason, "data.max_length")


class Marked(NamedTuple):
    """A row's text, the spans of its words, and their tags in the model's scheme; None without tags."""

    text: str
    words: list[tuple[int, int]]
    tags: list[str] | None


def read(row: dict[str, Any], data: TaggedColumns, with_tags: bool) -> Marked:
    """Return a row's words and tags. Raises RowProblem, with the reason, if they cannot be used."""
    if data.text is not None:
        text = text_of(row, data.text)
        places = words_of(text)
        if not with_tags:
            return Marked(text, places, None)
        marked = _covered(_spans(row, str(data.spans), text), places, text)
        return Marked(text, places, schemes.write(marked, len(places), data.scheme))
    words = [
        _word(value, number, str(data.words))
        for number, value in enumerate(_list(row, str(data.words)), start=1)
    ]
    if not any(word.strip() for word in words):
        raise RowProblem(EMPTY, f"{data.words!r} has no words")
    ends = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    places = [(start, start + len(word)) for start, word in zip(ends, words, strict=False)]
    return Marked(" ".join(words), places, _tags(row, data, len(words)) if with_tags else None)


def _tags(row: dict[str, Any], data: TaggedColumns, num_words: int) -> list[str]:
    values = _list(row, str(data.tags))
    if len(values) != num_words:
        raise RowProblem(
            BAD_LABEL, f"{num_words} words in {data.words!r} and {len(values)} tags in {data.tags!r}"
        )
    tags = [_name(value, data.tag_names) for value in values]
    written = data.rows_scheme or data.scheme
    if written == "none" or data.scheme == "none":
        return tags
    # Parsed even if nothing is converted, to find tags that break the scheme before they are learned.
    return schemes.write(schemes.entities(tags, written), num_words, data.scheme)


def _name(value: Any, names: Sequence[str] | None) -> str:
    name = class_name(value)
    if names is None or name in names:
        return name
    if name.isdecimal() and int(name) < len(names):
        return names[int(name)]
    raise RowProblem(BAD_LABEL, f"{value!r} is not among the {len(names)} of data.tag_names")


def _list(row: dict[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if is_missing(value):
        raise missing(row, column)
    entries = list_in(value) if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)):
        raise RowProblem(BAD_VALUE, f"{column!r} is a {type(value).__name__}, not a list")
    return list(entries)


def _word(value: Any, number: int, column: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
        value = str(value)
    if not isinstance(value, str):
        raise RowProblem(BAD_VALUE, f"word {number} of {column!r} is {value!r}, not text")
    check_encodable(value, column)
    return value


def _spans(row: dict[str, Any], column: str, text: str) -> list[Entity]:
    """Return the spans of a row in their order, in characters."""
    spans = sorted(_span(value, number, text) for number, value in enumerate(_list(row, column), start=1))
    for (_, before, first), (_, after, second) in itertools.pairwise(spans):
        if after.start < before.end:
            within = f"span {first} ({before.start} to {before.end})"
            reason = (
                f"span {second} ({after.start} to {after.end}) begins within {within}: a word has one tag"
            )
            raise RowProblem(BAD_LABEL, reason)
    return [span for _, span, _ in spans]


def _span(value: Any, number: int, text: str) -> tuple[int, Entity, int]:
    """Return a span's start, the span and its number: spans are sorted in this order."""
    keys = ("start", "end", "label")
    if isinstance(value, dict):
        value = [value.get(key) for key in keys]
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or any(isinstance(part, bool) for part in value)
    ):
        raise RowProblem(
            BAD_LABEL,
            f"span {number} is {value!r}, not an object with start, end and label, nor a list of the three",
        )
    start, end, kind = value
    if not isinstance(start, int) or not isinstance(end, int):
        raise RowProblem(
            BAD_LABEL,
            f"span {number}: start and end are whole numbers of characters, and here {start!r} and {end!r}",
        )
    if not 0 <= start < end <= len(text):
        raise RowProblem(
            BAD_LABEL,
            f"span {number} ({start} to {end}) is not within its text, which has {len(text)} characters",
        )
    return start, Entity(class_name(kind), start, end), number


def _covered(spans: Sequence[Entity], words: Sequence[tuple[int, int]], text: str) -> list[Entity]:
    """Return the spans in words. Raises RowProblem if one begins or ends within a word, or has no word."""
    covered = []
    for kind, start, end in spans:
        inside = [number for number, (first, last) in enumerate(words) if first < end and last > start]
        shown = f"the span {start} to {end}, {text[start:end]!r},"
        if not inside:
            raise RowProblem(BAD_LABEL, f"{shown} holds no word")
        for first, last in (words[inside[0]], words[inside[-1]]):
            if first < start or last > end:
                raise RowProblem(BAD_LABEL, f"{shown} cuts the word {text[first:last]!r} ({first} to {last})")
        covered.append(Entity(kind, inside[0], inside[-1] + 1))
    return covered
