"""Streams of rows from any position in some files, epoch after epoch, without knowing the number of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from launcher.data.rows import Row
from launcher.data.shards import SHARDS, Offset, Shard
from launcher.errors import DataError

FILE_BITS = 40
"""The id of a row is its file's number times 2 to this power, plus the row's number in the file."""


def row_number(id: int) -> int:
    """Return the number of a row in its file, from 0."""
    return id & ((1 << FILE_BITS) - 1)


class Cursor(NamedTuple):
    """The position of a stream: the next row, and its epoch."""

    epoch: int = 0
    shard: int = 0
    """The file's place in the epoch's order of files, which differs from epoch to epoch."""
    offset: Offset = Offset()

    def to_dict(self) -> dict[str, int]:
        """Return the cursor as values for JSON."""
        return {"epoch": self.epoch, "shard": self.shard, **self.offset._asdict()}

    @classmethod
    def of(cls, given: dict[str, Any]) -> Cursor:
        """Return the cursor from the values of `to_dict`. Raises KeyError or ValueError for anything else."""
        numbers = {name: int(given[name]) for name in ("epoch", "shard", *Offset._fields)}
        if min(numbers.values()) < 0:
            raise ValueError(f"{given} is no place in files")
        return cls(numbers["epoch"], numbers["shard"], Offset(*(numbers[name] for name in Offset._fields)))


def can_stream(path: str) -> bool:
    """Return whether files with this name can be read from any offset."""
    return PurePath(path).suffix.lower() in SHARDS


@dataclass(frozen=True)
class Stamp:
    """The state of a file when a stream was opened."""

    path: str
    bytes: int
    modified: int
    """Time of the last modification, in nanoseconds since 1970."""

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Return the stamp of a file. Raises DataError if it does not exist."""
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def refuse_change(self, offset: Offset) -> None:
        """Raise DataError if the file has changed; `offset` is where reading started."""
        now = Stamp.of(self.path)
        if now == self:
            return
        if now.bytes < self.bytes:
            how = f"{self.bytes:,} bytes then, cut off at byte {now.bytes:,} now"
        else:
            how = f"{self.bytes:,} bytes then, {now.bytes:,} and written anew now"
        read = f"byte {offset.byte:,}, row {offset.row:,}" if offset.byte else f"row {offset.row:,}"
        raise DataError(
            f"{self.path} changed under the run: {how}; it was being read from {read} on; put it back "
            "as it was, or begin a new run"
        )


class Files:
    """Rows of some files, epoch after epoch; each epoch has its own order of files."""

    def __init__(
        self, paths: Sequence[Path], columns: Sequence[str], order: Callable[[int], Sequence[int]]
    ) -> None:
        """Raise DataError if a file is missing. `order` returns the numbers of an epoch's files in order."""
        self.stamps = tuple(Stamp.of(str(path)) for path in paths)
        self.order = order
        self._columns = tuple(columns)
        self._open: tuple[int, Shard] | None = None

    def number_of(self, cursor: Cursor) -> int:
        """Return the number of the file at a cursor."""
        return int(self.order(cursor.epoch)[min(cursor.shard, len(self.stamps) - 1)])

    def read(self, start: Cursor, count: int, ends: Callable[[Cursor], None]) -> Iterator[Row]:
        """Yield `count` rows, or up to the epoch's end; then call `ends` with the cursor after them.

        Raises DataError for a file that cannot be read or has changed.
        """
        left = count
        for number, shard, cursor in self._shards(start):
            offset = cursor.offset
            with self._unchanged(number, offset):
                for line, values, behind in shard.read(offset) if left else ():
                    row = Row((number << FILE_BITS) + offset.row, str(shard.path), line, values)
                    offset, left = behind, left - 1
                    yield row
                    if not left:
                        break
            if not left:
                ends(Cursor(cursor.epoch, cursor.shard, offset))
                return
        ends(Cursor(start.epoch + 1))

    def skip(self, start: Cursor, count: int) -> Cursor:
        """Return the cursor at which `read` would end. Raises as `read`."""
        left = count
        for number, shard, cursor in self._shards(start):
            with self._unchanged(number, cursor.offset):
                offset = shard.skip(cursor.offset, left)
            left -= offset.row - cursor.offset.row
            if not left:
                return Cursor(cursor.epoch, cursor.shard, offset)
        return Cursor(start.epoch + 1)

    def _shards(self, start: Cursor) -> Iterator[tuple[int, Shard, Cursor]]:
        """Yield each file from a cursor to its epoch's end: number, reader, and cursor of its start."""
        order, cursor = self.order(start.epoch), start
        while cursor.shard < len(order):
            number = int(order[cursor.shard])
            if self._open is None or self._open[0] != number:
                path = Path(self.stamps[number].path)
                self._open = (number, SHARDS[path.suffix.lower()](path, self._columns))
            yield number, self._open[1], cursor
            cursor = Cursor(cursor.epoch, cursor.shard + 1)

    @contextlib.contextmanager
    def _unchanged(self, number: int, offset: Offset) -> Iterator[None]:
        """Raise DataError if a file cannot be read from an offset on, or has changed since; the change is
        then named as the cause."""
        try:
            yield
        except (DataError, OSError) as error:
            self.stamps[number].refuse_change(offset)
            if isinstance(error, DataError):
                raise
            reason = f"{self.stamps[number].path} cannot be read: {error.strerror or error}"
            raise DataError(reason) from None
        self.stamps[number].refuse_change(offset)
