"""Files whose rows can be read from any offset, one class for each format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.arrow import PARQUET_BATCH, arrow_row, features_of, names_of_classes, open_parquet, there
from launcher.data.readers import json_rows, only_column, text_rows
from launcher.data.rows import Values
from launcher.errors import DataError
from launcher.plain_files import plain

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Offset(NamedTuple):
    """The position before a row in a file."""

    row: int = 0
    line: int = 0
    """Number of lines; of rows for Parquet."""
    byte: int = 0
    """Number of bytes; 0 for Parquet, whose rows are not contiguous bytes."""


class Shard(ABC):
    """A reader of a file's rows from any offset."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    @abstractmethod
    def read(self, start: Offset) -> Iterator[tuple[int, Values, Offset]]:
        """Yield the rows from an offset on: line number, values, and the offset after the row.

        Raises DataError or OSError if the file cannot be read.
        """

    @abstractmethod
    def skip(self, start: Offset, count: int) -> Offset:
        """Return the offset after `count` rows, or after the last row. Raises as `read`."""


class Lines(Shard):
    """A file with one row per line."""

    def read(self, start: Offset) -> Iterator[tuple[int, Values, Offset]]:
        row = start.row
        for line, byte, content in self._lines(start):
            for _, values in self._rows(content):
                row += 1
                yield line, values, Offset(row, line, byte)

    def skip(self, start: Offset, count: int) -> Offset:
        offset, row = start, start.row
        for line, byte, content in self._lines(start) if count else ():
            if self._is_row(content):
                row += 1
                offset = Offset(row, line, byte)
            if row == start.row + count:
                break
        return offset

    def _lines(self, start: Offset) -> Iterator[tuple[int, int, bytes]]:
        """Yield each line with its number, from 1, and the offset of its end in bytes."""
        number, byte = start.line, start.byte
        with open(self.path, "rb", opener=plain) as file:
            file.seek(byte)
            for content in file:
                number, byte = number + 1, byte + len(content)
                yield number, byte, content

    @abstractmethod
    def _rows(self, content: bytes) -> Iterator[tuple[int, Values]]:
        """Yield the row of a line, if it is one."""

    @abstractmethod
    def _is_row(self, content: bytes) -> bool:
        """Return whether a line is a row, without parsing it."""


class JsonLines(Lines):
    """One JSON object per line; blank lines are not rows."""

    def _rows(self, content: bytes) -> Iterator[tuple[int, Values]]:
        return json_rows([content])

    def _is_row(self, content: bytes) -> bool:
        return bool(content.removeprefix(_BYTE_ORDER_MARK).strip())


class Text(Lines):
    """One text per line."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        self._column = only_column(path, columns)

    def _rows(self, content: bytes) -> Iterator[tuple[int, Values]]:
        return text_rows([content], self._column)

    def _is_row(self, content: bytes) -> bool:
        return True


class Parquet(Shard):
    """A Parquet file; the last decoded batch is kept, so that reading on does not decode it again."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        self._file: Any = None
        self._batches: Iterator[Any] = iter(())
        self._next = 0
        """The first row of the next batch."""
        self._batch: Any = None
        """The last decoded batch, which ends before row `_next`."""
        self._names: dict[str, list[str]] = {}
        """The names of classes that `datasets` stored in the file, by column."""

    def read(self, start: Offset) -> Iterator[tuple[int, Values, Offset]]:
        import pyarrow

        row = start.row
        try:
            self._seek(row)
            while self._batch is not None:
                first = self._next - self._batch.num_rows
                for index in range(row - first, self._batch.num_rows):
                    row += 1
                    yield row, arrow_row(self._batch, index, self._names), Offset(row, row)
                self._advance()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path} cannot be read after row {row:,}: {error}") from None

    def skip(self, start: Offset, count: int) -> Offset:
        row = min(start.row + count, int(self._open().metadata.num_rows))
        return Offset(row, row)

    def _open(self) -> Any:
        if self._file is None:
            self._file = open_parquet(self.path, self.columns)
            self._names = names_of_classes(features_of(self._file.schema_arrow))
        return self._file

    def _seek(self, row: int) -> None:
        """Decode the batch that has this row; none if the file has no such row."""
        file = self._open()
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        first = number = 0
        while number < len(groups) and first + groups[number] <= row:
            first, number = first + groups[number], number + 1
        held = self._batch is not None and self._next - self._batch.num_rows <= row
        if not held or (self._next <= row and self._next < first):
            names = there(self.columns, file.schema_arrow.names)
            later = list(range(number, len(groups)))
            self._batches = file.iter_batches(batch_size=PARQUET_BATCH, row_groups=later, columns=names)
            self._next = first
            self._advance()
        while self._batch is not None and self._next <= row:
            self._advance()

    def _advance(self) -> None:
        self._batch = next(self._batches, None)
        if self._batch is not None:
            self._next += self._batch.num_rows


SHARDS: dict[str, type[Shard]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".txt": Text,
    ".parquet": Parquet,
}
"""Readers by the ending of a file's name."""
