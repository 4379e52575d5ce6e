"""Description of a data file's columns from some of its rows: the kind of values in each."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.data.chat_files import is_image
from launcher.data.files import find_files
from launcher.data.folder import IMAGES, SOUNDS, FileColumnIfThere, listing, metadata_of
from launcher.data.formats import format_of
from launcher.data.rows import RowProblem, is_missing
from launcher.data.sample import look
from launcher.data.saved import saved_splits
from launcher.data.section import Source
from launcher.data.written import list_in
from launcher.errors import DataError

_ROWS = 256
"""Rows that are examined; fewer would already show a column's kind."""
_LONGEST_CLASS = 40
"""Characters of the longest class name: if most rows are longer, the column is text."""
_FEWEST_ROWS = 4
"""The fewest rows whose repeated values make a column a class."""
_MAGIC = {
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*"),
    "sound": (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM"),
}
"""The first bytes of image and sound files."""


class Kind(enum.StrEnum):
    """The kinds of values of a column, in the words that users see."""

    TEXT = "text"
    CLASS = "a few values"
    NUMBER = "numbers"
    WORDS = "lists of words"
    TAGS = "lists of a few tags"
    MESSAGES = "messages of chats"
    IMAGE_MESSAGES = "messages with images"
    ANSWERS = "answers with their places"
    SPANS = "spans with labels"
    IMAGE = "images"
    SOUND = "sounds"
    OTHER = "objects"
    EMPTY = "nothing"


@dataclass(frozen=True)
class Column:
    """A column as some rows show it."""

    name: str
    kind: Kind
    example: Any
    """The value of the first row, or the first value present; None for an empty column."""
    values: frozenset[str] = frozenset()
    """The different values seen (for lists, their elements), as text."""
    num_empty: int = 0
    """Number of examined rows that have no value, or an empty one."""


@dataclass(frozen=True)
class Overview:
    """A data file as some rows show it."""

    num_rows: int
    """Counted; estimated for a large file."""
    num_seen: int
    """Rows that were examined."""
    columns: tuple[Column, ...]
    has_header: bool = True
    """Whether a table names its columns; otherwise their names are numbers."""

    @property
    def names(self) -> list[str]:
        """Return the names of the columns, in their order."""
        return [column.name for column in self.columns]

    def column(self, name: str) -> Column | None:
        """Return the column of this name; None if there is none."""
        return next((column for column in self.columns if column.name == name), None)


def overview(path: str) -> Overview:
    """Describe a file, the files of a pattern, or a folder of images or sounds, from some rows.

    Raises DataError if there is no such file, if none can be read, or if there is no row.
    """
    media = _media_in(path)
    files = find_files(path, columns=media)
    if reason := next(filter(None, (format_of(file).too_large(file) for file in files)), None):
        raise DataError(reason)
    first = files[0]
    names = [*media, "label"] if first.is_dir() else format_of(first).names(first)
    columns = [*media, *(name for name in names if name not in media)]
    begin = look(Source(path=path, limit=1), columns)
    seen = look(Source(path=path), columns, _ROWS)
    rows = [row for row in seen.rows if not isinstance(row, RowProblem)]
    if not rows:
        why = next((str(row) for row in seen.rows if isinstance(row, RowProblem)), "it is empty")
        raise DataError(f"{path} has no row that can be read: {why}")
    may_lack_header = not first.is_dir() and format_of(first).may_lack_header
    numbers = may_lack_header and names == [str(n) for n in range(len(names))]
    return Overview(
        seen.num_rows, len(seen.rows), _with_examples(describe(rows, names), begin.rows), not numbers
    )


def describe(rows: Sequence[dict[str, Any]], names: Iterable[str] = ()) -> tuple[Column, ...]:
    """Return the columns of some rows: those of `names`, then any others that a row has."""
    every = dict.fromkeys(names) | dict.fromkeys(name for row in rows for name in row)
    return tuple(_column(str(name), [row.get(name) for row in rows]) for name in every)


def _with_examples(columns: tuple[Column, ...], rows: Sequence[Any]) -> tuple[Column, ...]:
    """Return columns whose examples are the first row's values, as far as they can be read."""
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    return tuple(
        one if _is_empty(first.get(one.name)) else replace(one, example=first[one.name]) for one in columns
    )


def _media_in(path: str) -> list[str]:
    """Return the column for the files in a folder of images or sounds; empty for any other path."""
    folder = Path(path)
    if not folder.is_dir() or saved_splits(folder) is not None:
        return []
    if metadata_of(folder) is not None:
        return [FileColumnIfThere("file_name", IMAGES + SOUNDS)]
    endings = [Path(one.path).suffix.lower() for one in listing(folder)]
    if any(ending in IMAGES for ending in endings):
        return [FileColumnIfThere("image", IMAGES)]
    return [FileColumnIfThere("audio", SOUNDS)] if any(ending in SOUNDS for ending in endings) else []


def _column(name: str, cells: Sequence[Any]) -> Column:
    values = [cell for cell in cells if not _is_empty(cell)]
    if not values:
        return Column(name, Kind.EMPTY, None, num_empty=len(cells))
    lists = [_listed(value) for value in values]
    flat = [inside for one in lists if one is not None for inside in one] if None not in lists else values
    texts = frozenset(str(one) for one in flat if isinstance(one, (str, int, float)))
    kind = _kind_of_lists(flat, lists, texts) if None not in lists else _kind(values, texts)
    return Column(name, kind, values[0], texts, len(cells) - len(values))


def _is_empty(cell: Any) -> bool:
    if isinstance(cell, str):
        return not cell.strip()
    return is_missing(cell) or (isinstance(cell, (list, tuple, dict)) and not cell)


def _listed(value: Any) -> list[Any] | None:
    """Return a list unchanged, or parse the list that a text contains; None for any other value."""
    if isinstance(value, str):
        return list_in(value) if value.lstrip().startswith(("[", "(")) else None
    return list(value) if isinstance(value, (list, tuple)) else None


def _kind_of_lists(flat: Sequence[Any], lists: Sequence[Any], texts: frozenset[str]) -> Kind:
    """Return the kind of values that are lists; `flat` holds the elements of all lists."""
    objects = [one for one in flat if isinstance(one, dict)]
    if objects and len(objects) == len(flat):
        keys = set.intersection(*(set(one) for one in objects))
        contents = [one["content"] for one in objects if isinstance(one.get("content"), list)]
        if "role" in keys and any(is_image(part) for content in contents for part in content):
            return Kind.IMAGE_MESSAGES
        for needed, kind in (({"role"}, Kind.MESSAGES), ({"text", "answer_start"}, Kind.ANSWERS)):
            if needed <= keys:
                return kind
        return Kind.SPANS if {"start", "end", "label"} <= keys else Kind.OTHER
    if flat and all(isinstance(one, (list, tuple)) and len(one) == 3 for one in flat):
        return Kind.SPANS
    if not all(isinstance(one, (str, int)) for one in flat):
        return Kind.OTHER
    few = len(lists) >= _FEWEST_ROWS and 2 * len(texts) <= len(flat) and len(texts) <= 4 * _LONGEST_CLASS
    tags = bool(texts) and all(text == "O" or text[:2] in ("B-", "I-", "E-", "S-") for text in texts)
    return Kind.TAGS if tags or (few and max(map(len, texts)) <= _LONGEST_CLASS) else Kind.WORDS


def _kind(values: Sequence[Any], texts: frozenset[str]) -> Kind:
    """Return the kind of values that are not lists."""
    if medium := _medium(values):
        return medium
    if all(isinstance(value, dict) for value in values):
        return Kind.ANSWERS if {"text", "answer_start"} <= values[0].keys() else Kind.OTHER
    if not all(isinstance(value, (str, int, float)) for value in values):
        return Kind.OTHER
    numbers = [number_in(value) for value in values]
    if all(number is not None for number in numbers):
        whole = all(float(number or 0).is_integer() for number in numbers)
        return Kind.CLASS if whole and _comes_again(values, texts) else Kind.NUMBER
    is_short = statistics.median(len(str(value)) for value in values) <= _LONGEST_CLASS
    return Kind.CLASS if is_short and _comes_again(values, texts) else Kind.TEXT


def _comes_again(values: Sequence[Any], texts: frozenset[str]) -> bool:
    return len(values) >= _FEWEST_ROWS and 2 * len(texts) <= len(values)


def number_in(value: Any) -> float | None:
    """Return a finite number, or the finite number that a text contains; None for any other value, and for
    true and false."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _medium(values: Sequence[Any]) -> Kind | None:
    """Return whether values are images or sounds, by file endings or first bytes; None if neither."""
    names: list[Any] = []
    contents: list[bytes] = []
    for value in values:
        if isinstance(value, dict) and value and set(value) <= {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        (contents if isinstance(value, bytes) else names).append(value)
    for kind, suffixes in ((Kind.IMAGE, IMAGES), (Kind.SOUND, SOUNDS)):
        magic = _MAGIC["image" if kind is Kind.IMAGE else "sound"]
        if all(isinstance(name, str) and name.lower().endswith(suffixes) for name in names) and all(
            content.startswith(magic) for content in contents
        ):
            return kind
    return None
