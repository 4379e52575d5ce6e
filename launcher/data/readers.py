"""Readers of text files, line by line: each row with its line number, or a RowProblem if it is unreadable."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.data.arrow import no_column, refuse_doubled
from launcher.data.rows import (
    EMPTY,
    NOT_UTF8,
    UNREADABLE,
    WRITTEN_MISSING,
    Read,
    RowProblem,
    Values,
    required,
)
from launcher.errors import DataError
from launcher.plain_files import plain


def read_json_lines(path: Path, columns: Sequence[str]) -> Read:
    """Read one JSON object per line; blank lines are not rows."""
    with open(path, "rb", opener=plain) as file:
        yield from json_rows(file)


def json_rows(lines: Iterable[bytes]) -> Read:
    """Yield the rows of some lines of JSON."""
    for number, line in enumerate(lines, start=1):
        if line := line.removeprefix(b"\xef\xbb\xbf").strip():
            yield number, _json_object(line)


def _json_object(line: bytes) -> Values:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem(NOT_UTF8, f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return RowProblem(UNREADABLE, f"not JSON: {error}")
    return (
        value
        if isinstance(value, dict)
        else RowProblem(UNREADABLE, f"a {type(value).__name__}, not an object")
    )


def read_json(path: Path, columns: Sequence[str]) -> Read:
    """Read a list of objects, an object that holds one such list, or one object per line; rows may be
    nested in the objects. The line number is the row's number."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        whole = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        if not content.lstrip().startswith(b"["):
            yield from read_json_lines(path, columns)
            return
        raise DataError(f"{path} is not UTF-8 at byte {error.start:,}") from None
    except json.JSONDecodeError as error:
        if content.lstrip().startswith(b"{") and error.msg == "Extra data":
            yield from read_json_lines(path, columns)
            return
        raise DataError(f"{path} is not JSON: {error}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer with too many digits, or lists that are nested too deeply
        raise DataError(f"{path} is no JSON that can be read: {error}") from None
    rows = whole
    if isinstance(whole, dict):
        lists = [
            value
            for value in whole.values()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        rows = lists[0] if len(lists) == 1 and not set(required(columns)) & set(whole) else [whole]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, not a list of objects")
    request = set(required(columns))
    flat = (row for value in rows for row in _unnested(value, request))
    for number, row in enumerate(flat, start=1):
        yield (
            number,
            row
            if isinstance(row, dict)
            else RowProblem(UNREADABLE, f"a {type(row).__name__}, not an object"),
        )


def _unnested(value: Any, asked: set[str]) -> Iterator[Any]:
    """Yield the rows nested in an object, each with the fields that surround it; any other value unchanged.

    So rows of SQuAD are questions, nested in paragraphs with a text, nested in articles.
    """
    key = _key_of_rows(value, asked) if isinstance(value, dict) else None
    if key is None:
        yield value
        return
    around = {name: one for name, one in value.items() if name != key}
    for inside in value[key]:
        yield from _unnested(around | inside, asked) if isinstance(inside, dict) else [inside]


def _key_of_rows(value: dict[str, Any], asked: set[str]) -> str | None:
    """Return the key of the list that holds the columns missing in an object; None if there is no such list.

    The requested columns must be at two levels or more: objects that have all of them may be anything.
    """
    if asked <= value.keys():
        return None
    for key, inside in value.items():
        objects = [one for one in inside if isinstance(one, dict)] if isinstance(inside, list) else []
        held = bool(asked & value.keys()) and any((asked - value.keys()) & one.keys() for one in objects)
        if held or any(_key_of_rows(one, asked) for one in objects):
            return key
    return None


def read_csv(path: Path, columns: Sequence[str]) -> Read:
    """Read comma-separated values with RFC 4180 quoting."""
    yield from _read_table(path, columns, csv.excel)


def read_tsv(path: Path, columns: Sequence[str]) -> Read:
    """Read tab-separated values, as IANA registers them: without quoting, so a quotation mark is an
    ordinary character."""
    yield from _read_table(path, columns, PlainTabs)


class PlainTabs(csv.excel_tab):
    """The dialect with tabs between fields and no quoting."""

    quoting = csv.QUOTE_NONE
    quotechar = None


def _read_table(path: Path, columns: Sequence[str], dialect: type[csv.Dialect]) -> Read:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=plain) as file:
        yield from table_rows(file, path, columns, dialect)


def table_rows(
    lines: Iterable[str],
    path: Path,
    columns: Sequence[str],
    dialect: type[csv.Dialect],
    header: list[str] | None = None,
) -> Read:
    """Yield the rows of some lines of a table; the first line has the column names, unless `header` gives
    them."""
    reader = table_reader(lines, dialect, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(
                    f"{path}: the quotation mark opened in the row of line {line} is never closed"
                ) from None
            yield line, RowProblem(UNREADABLE, str(error))
            continue
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = names_of_columns(path, fields, columns)
            if header == fields:
                continue
        yield line, _table_row(header, fields)


def table_reader(lines: Iterable[str], dialect: type[csv.Dialect], strict: bool) -> Any:
    """Return Python's own reader, with no limit on the length of a field."""
    csv.field_size_limit(sys.maxsize)
    return csv.reader(lines, dialect, strict=strict)


def names_of_columns(path: Path, first: list[str], columns: Sequence[str]) -> list[str]:
    """Return the names of the columns: the first line if it has all requested ones; otherwise numbers, if
    numbers are requested. Raises DataError if one is missing, or is there twice."""
    wanted = required(columns)
    missing = [column for column in wanted if column not in first]
    by_number = all(column.isdecimal() for column in wanted)
    # A line with the same number twice is a row, not a header.
    if not missing and not (by_number and any(first.count(column) > 1 for column in wanted)):
        refuse_doubled(path, columns, first)
        return first
    if by_number:
        return [str(number) for number in range(len(first))]
    raise no_column(
        path, missing[0], first, "; in a file without a header, name columns by number from 0, as label: '0'"
    )


def _table_row(header: list[str], fields: list[str]) -> Values:
    if len(fields) > len(header):
        return RowProblem(UNREADABLE, f"{len(fields)} fields where there are {len(header)} columns")
    for name, value in zip(header, fields, strict=False):
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return RowProblem(NOT_UTF8, f"column {name!r}")
    return {
        name: math.nan if value in WRITTEN_MISSING else value
        for name, value in zip(header, fields, strict=False)
    }


def read_text(path: Path, columns: Sequence[str]) -> Read:
    """Read one sample per line, under the name of the single requested column."""
    column = only_column(path, columns)
    with open(path, "rb", opener=plain) as file:
        yield from text_rows(file, column)


def only_column(path: Path, columns: Sequence[str]) -> str:
    """Return the single column requested of a text file. Raises DataError if there are several."""
    wanted = required(columns)
    if len(wanted) != 1:
        raise DataError(
            f"{path}: a text file has one column, and {', '.join(map(repr, wanted))} are asked for; use "
            ".jsonl, .csv or .tsv"
        )
    return wanted[0]


def text_rows(lines: Iterable[bytes], column: str) -> Read:
    """Yield the rows of some lines of text."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, RowProblem(NOT_UTF8, f"byte {error.start} of the line")
            continue
        yield number, {column: text} if text.strip() else RowProblem(EMPTY, "a line without text")
