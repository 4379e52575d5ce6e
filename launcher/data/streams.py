"""Read files row by row from any place in them, epoch after epoch, without knowing how many rows there are."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from launcher.data.arrow import PARQUET_BATCH, arrow_row, open_parquet, there
from launcher.data.readers import json_rows, only_column, text_rows
from launcher.data.rows import Row, Values
from launcher.errors import DataError
from launcher.plain_files import plain

SUFFIXES = (".jsonl", ".ndjson", ".txt", ".parquet")
"""Of files that can be read from any place in them."""
FILE_BITS = 40
"""The id of a row is the number of its file, times 2 to this power, and its number in the file."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def row_number(id: int) -> int:
    """Return the number of a row in its file, from 0."""
    return id & ((1 << FILE_BITS) - 1)


class Place(NamedTuple):
    """Say what of a file comes before a row."""

    row: int = 0
    line: int = 0
    """Lines; of Parquet rows."""
    offset: int = 0
    """Bytes; 0 of Parquet, where rows are no stretch of bytes."""


class Cursor(NamedTuple):
    """Say before which row of which epoch a stream stands."""

    epoch: int = 0
    shard: int = 0
    """The file's place among those of the epoch, which each epoch has in an order of its own."""
    place: Place = Place()

    def to_dict(self) -> dict[str, int]:
        """Return it as JSON has it."""
        return {"epoch": self.epoch, "shard": self.shard, **self.place._asdict()}

    @classmethod
    def of(cls, given: dict[str, Any]) -> Cursor:
        """Return what `to_dict` gave. Raises KeyError or ValueError for anything else."""
        numbers = {name: int(given[name]) for name in ("epoch", "shard", *Place._fields)}
        if min(numbers.values()) < 0:
            raise ValueError(f"{given} is no place in files")
        return cls(numbers["epoch"], numbers["shard"], Place(*(numbers[name] for name in Place._fields)))


class Shard(ABC):
    """A file of which rows are read from any place on."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    @abstractmethod
    def read(self, start: Place) -> Iterator[tuple[int, Values, Place]]:
        """Yield the rows behind a place: line, values, and the place behind it.

        Raises DataError or OSError where the file cannot be read.
        """

    @abstractmethod
    def skip(self, start: Place, count: int) -> Place:
        """Return the place behind so many rows, or that behind the last row. Raises as `read`."""


class Lines(Shard):
    """A file with a row on each line."""

    def read(self, start: Place) -> Iterator[tuple[int, Values, Place]]:
        row = start.row
        for line, offset, content in self._lines(start):
            for _, values in self._rows(content):
                row += 1
                yield line, values, Place(row, line, offset)

    def skip(self, start: Place, count: int) -> Place:
        place, row = start, start.row
        for line, offset, content in self._lines(start) if count else ():
            if self._is_row(content):
                row += 1
                place = Place(row, line, offset)
            if row == start.row + count:
                break
        return place

    def _lines(self, start: Place) -> Iterator[tuple[int, int, bytes]]:
        """Yield each line with its number, from 1, and the bytes up to its end."""
        number, offset = start.line, start.offset
        with open(self.path, "rb", opener=plain) as file:
            file.seek(offset)
            for content in file:
                number, offset = number + 1, offset + len(content)
                yield number, offset, content

    @abstractmethod
    def _rows(self, content: bytes) -> Iterator[tuple[int, Values]]:
        """Return the row of a line, if it is one."""

    @abstractmethod
    def _is_row(self, content: bytes) -> bool:
        """Return whether a line is a row, without parsing it."""


class JsonLines(Lines):
    """One JSON object a line; lines of white space are not rows."""

    def _rows(self, content: bytes) -> Iterator[tuple[int, Values]]:
        return json_rows([content])

    def _is_row(self, content: bytes) -> bool:
        return bool(content.removeprefix(_BYTE_ORDER_MARK).strip())


class Text(Lines):
    """One text a line."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        self._column = only_column(path, columns)

    def _rows(self, content: bytes) -> Iterator[tuple[int, Values]]:
        return text_rows([content], self._column)

    def _is_row(self, content: bytes) -> bool:
        return True


class Parquet(Shard):
    """A Parquet file. What was decoded last is kept: who reads on does not decode it again."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        self._file: Any = None
        self._batches: Iterator[Any] = iter(())
        self._next = 0
        """The row at which the next batch begins."""
        self._batch: Any = None
        """The last batch, which ends there."""

    def read(self, start: Place) -> Iterator[tuple[int, Values, Place]]:
        import pyarrow

        row = start.row
        try:
            self._seek(row)
            while self._batch is not None:
                first = self._next - self._batch.num_rows
                for index in range(row - first, self._batch.num_rows):
                    row += 1
                    yield row, arrow_row(self._batch, index), Place(row, row)
                self._advance()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path} cannot be read after row {row:,}: {error}") from None

    def skip(self, start: Place, count: int) -> Place:
        row = min(start.row + count, int(self._open().metadata.num_rows))
        return Place(row, row)

    def _open(self) -> Any:
        if self._file is None:
            self._file = open_parquet(self.path, self.columns)
        return self._file

    def _seek(self, row: int) -> None:
        """Have the batch with this row; none where the file has no such row."""
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


_SHARDS: dict[str, type[Shard]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".txt": Text,
    ".parquet": Parquet,
}


def can_stream(path: str) -> bool:
    """Return whether files of this name can be read from any place in them."""
    return PurePath(path).suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Stamp:
    """A file as it was when a stream was opened."""

    path: str
    bytes: int
    modified: int
    """When it was written last, in nanoseconds since 1970."""

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Return a file's. Raises DataError where there is none."""
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def refuse_change(self, place: Place) -> None:
        """Raise DataError where the file is not what it was; `place` is from where it was being read."""
        now = Stamp.of(self.path)
        if now == self:
            return
        if now.bytes < self.bytes:
            how = f"{self.bytes:,} bytes then, cut off at byte {now.bytes:,} now"
        else:
            how = f"{self.bytes:,} bytes then, {now.bytes:,} and written anew now"
        read = f"byte {place.offset:,}, row {place.row:,}" if place.offset else f"row {place.row:,}"
        raise DataError(
            f"{self.path} changed under the run: {how}; it was being read from {read} on; put it back "
            "as it was, or begin a new run"
        )


class Files:
    """The rows of some files, epoch after epoch, each epoch with the files in an order of its own."""

    def __init__(
        self, paths: Sequence[Path], columns: Sequence[str], order: Callable[[int], Sequence[int]]
    ) -> None:
        """`order` returns the numbers of the files in an epoch. Raises DataError for a file that is missing."""
        self.stamps = tuple(Stamp.of(str(path)) for path in paths)
        self.order = order
        self._columns = tuple(columns)
        self._open: tuple[int, Shard] | None = None

    def number_of(self, cursor: Cursor) -> int:
        """Return the number of the file in which a cursor stands."""
        return int(self.order(cursor.epoch)[min(cursor.shard, len(self.stamps) - 1)])

    def read(self, start: Cursor, count: int, ends: Callable[[Cursor], None]) -> Iterator[Row]:
        """Yield so many rows, or those up to the end of the epoch; tell `ends` where the next ones begin.

        Raises DataError for a file that cannot be read, or that is not what it was.
        """
        left = count
        for number, shard, cursor in self._shards(start):
            place = cursor.place
            with self._unchanged(number, place):
                for line, values, behind in shard.read(place) if left else ():
                    row = Row((number << FILE_BITS) + place.row, str(shard.path), line, values)
                    place, left = behind, left - 1
                    yield row
                    if not left:
                        break
            if not left:
                ends(Cursor(cursor.epoch, cursor.shard, place))
                return
        ends(Cursor(start.epoch + 1))

    def skip(self, start: Cursor, count: int) -> Cursor:
        """Return where `read` would end. Raises as it does."""
        left = count
        for number, shard, cursor in self._shards(start):
            with self._unchanged(number, cursor.place):
                place = shard.skip(cursor.place, left)
            left -= place.row - cursor.place.row
            if not left:
                return Cursor(cursor.epoch, cursor.shard, place)
        return Cursor(start.epoch + 1)

    def _shards(self, start: Cursor) -> Iterator[tuple[int, Shard, Cursor]]:
        """Yield each file from a cursor to the end of its epoch: its number, itself, and where it is begun."""
        order, cursor = self.order(start.epoch), start
        while cursor.shard < len(order):
            number = int(order[cursor.shard])
            if self._open is None or self._open[0] != number:
                path = Path(self.stamps[number].path)
                self._open = (number, _SHARDS[path.suffix.lower()](path, self._columns))
            yield number, self._open[1], cursor
            cursor = Cursor(cursor.epoch, cursor.shard + 1)

    @contextlib.contextmanager
    def _unchanged(self, number: int, place: Place) -> Iterator[None]:
        """Raise DataError where a file cannot be read from a place on, or is another one after it was read: what
        is wrong with a file that changed is that."""
        try:
            yield
        except (DataError, OSError) as error:
            self.stamps[number].refuse_change(place)
            if isinstance(error, DataError):
                raise
            reason = f"{self.stamps[number].path} cannot be read: {error.strerror or error}"
            raise DataError(reason) from None
        self.stamps[number].refuse_change(place)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return what is known of each file, as JSON has it."""
        return [asdict(stamp) for stamp in self.stamps]
