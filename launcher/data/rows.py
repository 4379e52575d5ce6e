"""One row of a data source, and why a row cannot be used."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

WRITTEN_MISSING = {"nan", "NaN", "<NA>", "NaT", "#N/A"}
"""What pandas, numpy and spreadsheets write where there is no value: in a cell of a table, and as a label
anywhere. As text in JSON and Parquet, which have a null of their own, it is text. Words that people write too
(None, null, NA) are text everywhere."""
_EXACT = 2.0**53
"""Up to here every integer is a float."""


class RowProblem(Exception):
    """Say why a row cannot be used. `reason` is what rows are counted by, `detail` is about this one row."""

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
    """Return the columns that a source must have, once each."""
    return list(dict.fromkeys(column for column in columns if not isinstance(column, IfThere)))


class Row(NamedTuple):
    """A row as it was read, or why it could not be."""

    id: int
    """Its number in the source, from 0; rows that cannot be used count too, so that ids do not depend on
    policy."""
    file: str
    line: int
    """Line in the file, from 1; the row's number where the format has no lines."""
    values: dict[str, Any] | RowProblem


Values = dict[str, Any] | RowProblem
"""A row by column, or why it could not be read."""
Read = Iterator[tuple[int, Values]]
"""The rows of a file, each with its line."""


def is_missing(value: Any) -> bool:
    """Return whether a value stands for none: null, or NaN, as pandas has it where a cell is empty."""
    return value is None or (isinstance(value, (float, Decimal)) and math.isnan(value))


def text_of(values: dict[str, Any], column: str) -> str:
    """Return the text in `column`; a number is written out, 42.0 as 42. Raises RowProblem where there is
    none."""
    value = values.get(column)
    if is_missing(value):
        raise missing(values, column)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        value = _written(value, column)
    if not isinstance(value, str):
        raise RowProblem(BAD_VALUE, f"{column!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise RowProblem(EMPTY, f"{column!r} has no text")
    check_encodable(value, column)
    return value


def missing(values: dict[str, Any], column: str) -> RowProblem:
    """Return why there is nothing in a column of a row."""
    if column in values:
        return RowProblem(
            MISSING, f"{column!r} is {'null' if values[column] is None else 'NaN, a missing value'}"
        )
    there = ", ".join(map(repr, values)) or "nothing"
    return RowProblem(MISSING, f"no {column!r}; the row has {there}{_nearest(column, tuple(values))}")


@lru_cache(maxsize=256)
def _nearest(column: str, names: tuple[str, ...]) -> str:
    """Return a hint at the name that a missing column may have, or nothing; every row of a file asks alike."""
    near = difflib.get_close_matches(column, [str(name) for name in names], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _written(number: int | float | Decimal, column: str) -> str:
    """A number as text: a whole float as an integer, which it was before another row's missing value made the
    column one of floats."""
    if isinstance(number, float) and not math.isfinite(number):
        raise RowProblem(BAD_VALUE, f"{column!r} is {number}, not text")
    return str(
        int(number) if isinstance(number, float) and number.is_integer() and abs(number) < _EXACT else number
    )


def check_encodable(text: str, column: str) -> None:
    """Raise RowProblem where `text` has code points that UTF-8 cannot write (lone surrogates)."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(NOT_UTF8, f"{column!r} has a lone surrogate at character {error.start}") from None
