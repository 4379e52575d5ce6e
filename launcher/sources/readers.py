"""One reader per file format: path -> (line, values) of every row, a row that cannot be read as a RowProblem in its place."""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.sources.rows import BAD_VALUE, EMPTY, NOT_UTF8, UNREADABLE, RowProblem, required

Values = dict[str, Any] | RowProblem
Read = Iterator[tuple[int, Values]]
PARQUET_BATCH = 1024
"""Rows that are decoded at once."""


def read_json_lines(path: Path, columns: Sequence[str]) -> Read:
    """One JSON object a line; lines of white space are not rows."""
    with open(path, "rb") as file:
        yield from json_rows(file)


def json_rows(lines: Iterable[bytes]) -> Read:
    """The rows of some lines of JSON."""
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
    return value if isinstance(value, dict) else RowProblem(UNREADABLE, f"a {type(value).__name__}, not an object")


def read_json(path: Path, columns: Sequence[str]) -> Read:
    """A list of objects, an object that holds one such list, or one object a line. The line given is the row's number."""
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
    except (ValueError, RecursionError) as error:  # an integer of too many digits, lists too deep in each other
        raise DataError(f"{path} is no JSON that can be read: {error}") from None
    rows = whole
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if len(lists) == 1 and not set(required(columns)) & set(whole) else [whole]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, not a list of objects")
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else RowProblem(UNREADABLE, f"a {type(row).__name__}, not an object")


def read_csv(path: Path, columns: Sequence[str]) -> Read:
    """Comma-separated values with RFC 4180 quoting."""
    yield from _read_table(path, columns, csv.excel)


def read_tsv(path: Path, columns: Sequence[str]) -> Read:
    """Tab-separated values, as IANA registers them: no quoting, so that a stray quotation mark is only a character."""
    yield from _read_table(path, columns, PlainTabs)


class PlainTabs(csv.excel_tab):
    """Tabs between fields, and no quoting."""

    quoting = csv.QUOTE_NONE
    quotechar = None


def _read_table(path: Path, columns: Sequence[str], dialect: type[csv.Dialect]) -> Read:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from table_rows(file, path, columns, dialect)


def table_rows(
    lines: Iterable[str], path: Path, columns: Sequence[str], dialect: type[csv.Dialect], header: list[str] | None = None
) -> Read:
    """The rows of some lines of a table; the first has the names of the columns, or they are given as `header`."""
    reader = table_reader(lines, dialect, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(f"{path}: the quotation mark opened in the row of line {line} is never closed") from None
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
    """Python's own, for fields of any length."""
    csv.field_size_limit(sys.maxsize)
    return csv.reader(lines, dialect, strict=strict)


def names_of_columns(path: Path, first: list[str], columns: Sequence[str]) -> list[str]:
    """The names of the columns: the first line where it has all that are asked for; else numbers, where numbers are asked for."""
    asked = required(columns)
    missing = [column for column in asked if column not in first]
    if not missing:
        return first
    if all(column.isdecimal() for column in asked):
        return [str(number) for number in range(len(first))]
    raise no_column(path, missing[0], first, "; in a file without a header, name columns by number from 0, as label: '0'")


def _table_row(header: list[str], fields: list[str]) -> Values:
    if len(fields) > len(header):
        return RowProblem(UNREADABLE, f"{len(fields)} fields where there are {len(header)} columns")
    for name, value in zip(header, fields, strict=False):
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return RowProblem(NOT_UTF8, f"column {name!r}")
    return dict(zip(header, fields, strict=False))


def no_column(path: object, column: str, have: Sequence[str], hint: str = "") -> DataError:
    """The error for a column that a whole file lacks."""
    near = difflib.get_close_matches(column, have, n=1)
    shown = ", ".join(repr(name[:40]) for name in have[:12])
    return DataError(f"{path} has no column {column!r}; it has {shown}" + (f"; did you mean {near[0]!r}?" if near else hint))


def read_text(path: Path, columns: Sequence[str]) -> Read:
    """One sample a line, under the name of the one column asked for."""
    column = only_column(path, columns)
    with open(path, "rb") as file:
        yield from text_rows(file, column)


def only_column(path: Path, columns: Sequence[str]) -> str:
    """The one column asked of a text file. Raises DataError where there are more."""
    asked = required(columns)
    if len(asked) != 1:
        raise DataError(f"{path}: a text file has one column, and {', '.join(map(repr, asked))} are asked for; use .jsonl, .csv or .tsv")
    return asked[0]


def text_rows(lines: Iterable[bytes], column: str) -> Read:
    """The rows of some lines of text."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, RowProblem(NOT_UTF8, f"byte {error.start} of the line")
            continue
        yield number, {column: text} if text.strip() else RowProblem(EMPTY, "a line without text")


def read_parquet(path: Path, columns: Sequence[str]) -> Read:
    """Parquet, batch by batch, only the columns asked for."""
    import pyarrow

    file = open_parquet(path, columns)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=there(columns, file.schema_arrow.names)):
            for index in range(batch.num_rows):
                number += 1
                yield number, arrow_row(batch, index)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read after row {number:,}: {error}") from None


def arrow_row(batch: Any, index: int) -> Values:
    """One row of a batch, without the nulls of objects; a value that Python cannot hold makes it one that cannot be used."""
    try:
        return {name: without_nulls(batch.column(name)[index].as_py()) for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return RowProblem(NOT_UTF8, f"byte {error.start} of the value")
    except (ValueError, OverflowError) as error:
        return RowProblem(BAD_VALUE, str(error))


def without_nulls(value: Any) -> Any:
    """A value without the keys, at any depth, that hold null: a table gives each object the keys of all objects of its column."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def there(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns to be read of a table with these: all that it must have, and of the others those that it has."""
    have = set(names)
    return list(dict.fromkeys(column for column in columns if column in have))


def open_parquet(path: Path, columns: Sequence[str]) -> Any:
    """A Parquet file that has these columns, once each. Raises DataError for any other."""
    file = _parquet(path)
    with whole_parquet(path):
        names = file.schema_arrow.names
    for column in required(columns):
        if column not in names:
            raise no_column(path, column, names)
    for column in columns:
        if names.count(column) > 1:
            raise DataError(f"{path} has {names.count(column)} columns {column!r}, and it cannot be told which is meant")
    return file


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as parquet

    with whole_parquet(path):
        # A group of rows is then read as far as it is asked for, and not at once.
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def whole_parquet(path: Path) -> Iterator[None]:
    """What pyarrow raises at a file that it cannot read, as a DataError."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None


def num_parquet_rows(path: Path) -> int:
    """From the file's footer. Raises DataError where there is none."""
    return int(_parquet(path).metadata.num_rows)


READERS: dict[str, Callable[[Path, Sequence[str]], Read]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
