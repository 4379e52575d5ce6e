"""Reading of files in CoNLL's columns: one word per line, an empty line after each sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.data.rows import NOT_UTF8, UNREADABLE, Read, RowProblem, Values, required
from launcher.errors import DataError
from launcher.plain_files import plain

_DOCUMENT = "-DOCSTART-"
"""The word in CoNLL-2003 that marks the beginning of a document."""


def read_conll(path: Path, columns: Sequence[str]) -> Read:
    """Yield a row for each sentence, with the number of its first line. A column is a list of fields,
    selected by its number: from 0, or from -1 backward.

    Fields are separated by tabs if the first word's line has a tab, otherwise by spaces. Lines that begin
    documents are left out. In files with tabs, so are comments: lines that begin with # and have no tab.
    Raises DataError for columns that the file does not have.
    """
    tabs, width, first = _has_tabs(path), 0, 0
    lines: list[list[str]] = []
    problem: RowProblem | None = None
    with open(path, "rb", opener=plain) as file:
        for number, raw in enumerate(file, start=1):
            fields = _fields(raw, tabs)
            if isinstance(fields, RowProblem):
                problem = problem or RowProblem(fields.reason, f"line {number}: {fields.detail}")
                fields = ["?"] * (width or 1)
            elif not width and fields:
                width = len(fields)
                _check_columns(path, columns, width)
            elif fields and len(fields) != width:
                problem = problem or RowProblem(
                    UNREADABLE, f"line {number} has {len(fields)} columns, and the file begins with {width}"
                )
            if fields:
                first = first if lines else number
                lines.append(fields)
            elif lines and fields is not None:
                yield first, problem or _row(lines, columns)
                lines, problem = [], None
    if lines:
        yield first, problem or _row(lines, columns)


def _has_tabs(path: Path) -> bool:
    with open(path, "rb", opener=plain) as file:
        for line in file:
            if line.strip() and not line.startswith((b"#", _DOCUMENT.encode())):
                return b"\t" in line
    return True


def _fields(raw: bytes, tabs: bool) -> list[str] | RowProblem | None:
    """Return the fields of a line: empty for an empty line, None for a line that holds no word."""
    try:
        line = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return RowProblem(NOT_UTF8, f"byte {error.start} of the line")
    if not line.strip():
        return []
    fields = line.split("\t") if tabs else line.split()
    is_comment = tabs and len(fields) == 1 and line.startswith("#")
    return None if is_comment or fields[0].split(maxsplit=1)[:1] == [_DOCUMENT] else fields


def _check_columns(path: Path, columns: Sequence[str], width: int) -> None:
    numbers = {str(number) for number in range(-width, width)}
    for column in required(columns):
        if column not in numbers:
            reason = (
                f"a .conll file names its columns by number, here '0' to '{width - 1}', or '-1' for the last"
            )
            raise DataError(f"{path} has no column {column!r}: {reason}")


def _row(lines: Sequence[Sequence[str]], columns: Sequence[str]) -> Values:
    width = len(lines[0])
    request = [number for number in range(-width, 0) if str(number) in columns]
    return {str(number): [fields[number] for fields in lines] for number in (*range(width), *request)}
