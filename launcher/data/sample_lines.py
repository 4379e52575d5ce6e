"""Sampling of rows from all over a file of lines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from launcher.data.parts import LINE_BYTES, Part, Seen, places_for
from launcher.data.readers import names_of_columns, table_reader, table_rows
from launcher.data.rows import Read, Values
from launcher.errors import DataError
from launcher.plain_files import plain

_BYTES_OF_ROW = 1 << 15
"""The most bytes that are read for each wanted row: with longer rows the sample is smaller."""
_QUOTE_BYTES = 1 << 18
"""The distance within which quotation marks are searched, to tell which line ends end rows."""
_LONGEST_LINE = 1 << 28
"""Longer lines are returned in pieces, none of which is a usable row."""
_BETWEEN = b",\r\n"
"""Bytes that separate fields."""
_MARKS = re.compile(rb'"+')


@dataclass(frozen=True)
class Layout:
    """The layout of rows in a file."""

    parse: Callable[[Iterable[bytes]], Read]
    quoted: bool = False
    begin: int = 0
    """The header's length in bytes."""
    num_lines: int = 0
    """The header's number of lines."""


class _Lines:
    """The lines of a file from its current position, with a count of those read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_lines = self.num_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        while line := self.file.readline(_LONGEST_LINE):
            self.num_lines += 1
            self.num_bytes += len(line)
            yield line


@dataclass
class _Found:
    """The rows that begin in some stretches of a file, and the lines and bytes that they take."""

    rows: list[Values] = field(default_factory=list)
    num_lines: int = 0
    num_bytes: int = 0

    def add(self, file: BinaryIO, layout: Layout, start: int, end: int) -> None:
        """Add the rows that begin between two positions of a file, in bytes."""
        if not _to_a_row(file, layout, start, end):
            return
        rows, lines, begin = [], _Lines(file), file.tell()
        try:
            for _, values in layout.parse(lines):
                rows.append(values)
                if begin + lines.num_bytes >= end:
                    break
        except DataError:  # an ambiguous quotation mark was taken for an opening one
            return
        self.rows += rows
        self.num_lines += lines.num_lines
        self.num_bytes += lines.num_bytes


def look_in_places(part: Part, layout: Layout, wanted: int, phase: float) -> Seen | None:
    """Return the number of rows, and about `wanted` of them; None if the file should be read in full.

    The number is exact if lines were counted and each sampled row is one line. Otherwise it is estimated from
    the lines, or the bytes, per sampled row.
    """
    size = int(part.share * (part.size - layout.begin))
    num_lines = part.share * max(1, part.counted - layout.num_lines) if part.counted is not None else None
    of_row = size / num_lines if num_lines else LINE_BYTES
    for _ in range(2):
        span = wanted * min(of_row, _BYTES_OF_ROW)
        if span >= size:
            return None
        rows = _look(part.path, layout, size, span, places_for(wanted), phase)
        if not rows.rows:
            return None
        of_row = rows.num_bytes / len(rows.rows)
        if 2 * len(rows.rows) >= wanted:
            break
    number = num_lines * len(rows.rows) / rows.num_lines if num_lines else size / of_row
    return Seen(max(number, len(rows.rows)), rows.rows)


def _look(path: Path, layout: Layout, size: int, span: float, places: int, phase: float) -> _Found:
    """Return the rows that begin in `span` bytes, divided evenly over some places, so that long rows are
    no more likely than short ones; the first row of the file if none begins there."""
    collected, stride, each = _Found(), size / places, max(1, int(span / places))
    with open(path, "rb", opener=plain) as file:
        for place in range(places):
            start = layout.begin + int(place * stride + phase * (stride - each))
            collected.add(file, layout, start, start + each)
        if not collected.rows:
            collected.add(file, layout, layout.begin, layout.begin + 1)
    return collected


def table_layout(path: Path, columns: Sequence[str], dialect: type[csv.Dialect], quoted: bool) -> Layout:
    """Return a table's layout after reading its header. Raises DataError if a column is missing."""
    with open(path, "rb", opener=plain) as file:
        lines = _Lines(file)
        first: list[str] = next(filter(None, table_reader(_decoded(lines), dialect, strict=False)), [])
    names = names_of_columns(path, first, columns)
    taken = (lines.num_bytes, lines.num_lines) if names == first else (0, 0)
    return Layout(lambda lines: table_rows(_decoded(lines), path, columns, dialect, names), quoted, *taken)


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines as text, as a file opened in text mode does: a lone carriage return ends a line too."""
    for line in lines:
        yield from io.StringIO(
            line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"), newline=""
        )


def _to_a_row(file: BinaryIO, layout: Layout, start: int, end: int) -> bool:
    """Move to the first row that begins at or after `start`; return whether it begins before `end`."""
    if start <= layout.begin:
        file.seek(layout.begin)
        return True
    file.seek(start - 1)
    if not layout.quoted:
        return file.readline(end - start + 1).endswith(b"\n") and file.tell() < end
    outside = _outside(file.read(max(_QUOTE_BYTES, end - start)))
    file.seek(start - 1 + outside)
    with suppress(csv.Error):
        next(table_reader(_decoded(_Lines(file)), csv.excel, strict=False), None)  # began earlier
    return file.tell() < end


def _outside(text: bytes) -> int:
    """Return the index of the first byte outside quotation marks, as far as the marks show it.

    A mark before a field's end closes a field, a mark after a field's end opens one, and a doubled mark is a
    quotation mark in the text. The first unambiguous mark determines the state before it; earlier marks that
    may be both toggle it. If no mark is unambiguous, the first byte is assumed to be outside.
    """
    begin = len(text) - len(text.lstrip(b'"'))
    unsure: list[int] = []
    for marks in _MARKS.finditer(text, begin):
        opens, closes = (
            text[marks.start() - 1 : marks.start()] in _BETWEEN,
            text[marks.end() : marks.end() + 1] in _BETWEEN,
        )
        if len(marks[0]) % 2 == 0 or not (opens or closes):
            continue
        if opens and closes:
            unsure.append(marks.end())
            continue
        inside = closes != (len(unsure) % 2 == 1)
        return [*unsure, marks.end()][0] if inside else begin
    return begin
