"""A row of a data source, and the reasons why a row cannot be used."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

WRITTEN_MISSING = {"nan", "NaN", "<NA>", "NaT", "#N/A"}
"""Words that pandas, numpy and spreadsheets write for a missing value: they count as missing in a table's
cell, and as a label anywhere. In JSON and Parquet, which have null, they are text. Words that people also
write (None, null, NA) are text everywhere."""
_EXACT = 2.0**53
"""The limit up to which a float represents every integer exactly."""


class RowProblem(Exception):
    """The reason why a row cannot be used. Rows are counted by `reason`; `detail` is about this row."""

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
    """The name of an optional column: it is read if a source has it."""


def required(columns: Iterable[str]) -> list[str]:
    """Return the columns that a source must have, without duplicates."""
    return list(dict.fromkeys(column for column in columns if not isinstance(column, IfThere)))


class Row(NamedTuple):
    """A row as it was read, or the reason why it is unreadable."""

    id: int
    """The row's number in the source, from 0; unusable rows count too, so ids do not depend on the policy."""
    file: str
    line: int
    """The line in the file, from 1; the row's number if the format has no lines."""
    values: dict[str, Any] | RowProblem


Values = dict[str, Any] | RowProblem
"""A row's values by column, or the reason why it is unreadable."""
Read = Iterator[tuple[int, Values]]
"""The rows of a file, each with its line number."""


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: null, or NaN, which pandas writes for an empty cell."""
    return value is None or (isinstance(value, (float, Decimal)) and math.isnan(value))


def text_of(values: dict[str, Any], column: str) -> str:
    """Return the text in `column`; a number becomes text, 42.0 as 42. Raises RowProblem if there is no
    text."""
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
    """Return the problem of a row that has no value in a column."""
    if column in values:
        return RowProblem(
            MISSING, f"{column!r} is {'null' if values[column] is None else 'NaN, a missing value'}"
        )
    there = ", ".join(map(repr, values)) or "nothing"
    return RowProblem(MISSING, f"no {column!r}; the row has {there}{_nearest(column, tuple(values))}")


@lru_cache(maxsize=256)
def _nearest(column: str, names: tuple[str, ...]) -> str:
    """Return a hint at the column name that was probably meant, or nothing; cached, as rows repeat it."""
    near = difflib.get_close_matches(column, [str(name) for name in names], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _written(number: int | float | Decimal, column: str) -> str:
    """Return a number as text: a whole float as an integer, because a missing value in another row turns a
    column of integers into floats."""
    if isinstance(number, float) and not math.isfinite(number):
        raise RowProblem(BAD_VALUE, f"{column!r} is {number}, not text")
    return str(
        int(number) if isinstance(number, float) and number.is_integer() and abs(number) < _EXACT else number
    )


def check_encodable(text: str, column: str) -> None:
    """Raise RowProblem if `text` has code points that UTF-8 cannot encode (lone surrogates)."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(NOT_UTF8, f"{column!r} has a lone surrogate at character {error.start}") from None
