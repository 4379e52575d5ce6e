"""One row of a data source, and why a row cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class RowProblem(Exception):
    """Why a row cannot be used. `reason` is what rows are counted by, `detail` is about this one row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


MISSING = "missing key"
EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
UNREADABLE = "not readable"
TOO_LONG = "too long"
BAD_LABEL = "label that cannot be used"
BAD_VALUE = "value that cannot be used"
NOTHING_TO_LEARN = "nothing left to learn"


class IfThere(str):
    """The name of a column that is read where a source has it, and not missed where it has not."""


def required(columns: Iterable[str]) -> list[str]:
    """The columns that a source must have, once each."""
    return list(dict.fromkeys(column for column in columns if not isinstance(column, IfThere)))


class Row(NamedTuple):
    """A row as it was read, or why it could not be."""

    id: int
    """Its number in the source, from 0; rows that cannot be used count too, so that ids do not depend on policy."""
    file: str
    line: int
    """Line in the file, from 1; the row's number where the format has no lines."""
    values: dict[str, Any] | RowProblem


def text_of(values: dict[str, Any], column: str, may_be_empty: bool = False) -> str:
    """The text in `column`; a number is written out. Raises RowProblem where there is none."""
    value = values.get(column)
    if value is None:
        have = ", ".join(map(repr, values)) or "nothing"
        raise RowProblem(MISSING, f"no {column!r}; the row has {have}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowProblem(BAD_VALUE, f"{column!r} is a {type(value).__name__}, not text")
    if not may_be_empty and not value.strip():
        raise RowProblem(EMPTY, f"{column!r} has no text")
    check_encodable(value, column)
    return value


def check_encodable(text: str, column: str) -> None:
    """Raise RowProblem where `text` has code points that UTF-8 cannot write (lone surrogates)."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(NOT_UTF8, f"{column!r} has a lone surrogate at character {error.start}") from None
