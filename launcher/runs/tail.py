"""Following a JSON lines file while others append to it, and reading the end of one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.plain_files import plain
from launcher.runs.records import parse

_BLOCK = 1 << 18
_BEFORE = 4096
"""The number of bytes before an offset by which a file is recognised again."""
_LAST_BLOCK = 1 << 14
"""The bytes read at a time from the end: about 60 steps."""


class Tail:
    """A reader that returns each record of a file once, from its current end or an offset on. The file need not
    exist yet. `overwritten`: drop the part of an incomplete line that a \\r overwrites."""

    def __init__(
        self, path: Path, from_end: bool = False, offset: int = 0, overwritten: bool = False
    ) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else offset
        self._rest = b""
        self._overwritten = overwritten

    @property
    def offset(self) -> int:
        """Return the number of bytes of the file that were returned as complete lines."""
        return self._offset - len(self._rest)

    @property
    def unfinished(self) -> bytes:
        """Return the part of an incomplete line that was read."""
        return self._rest

    def lines(self) -> Iterator[bytes]:
        """Yield the lines appended since the last call, with never more than a block in memory. The iterator
        must be consumed to its end.

        A line that is not complete yet is returned by a later call.
        """
        for block in self.blocks():
            yield from block.split(b"\n")

    def blocks(self) -> Iterator[bytes]:
        """Yield the same lines in blocks of complete lines, without the last newline."""
        try:
            file = open(self.path, "rb", opener=plain)  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            while block := file.read(_BLOCK):
                self._offset += len(block)
                whole, end, rest = block.rpartition(b"\n")
                lines, self._rest = self._rest + whole, rest if end else self._rest + rest
                if self._overwritten:  # the last byte may be the first half of \r\n
                    self._rest = self._rest[:-1].rpartition(b"\r")[2] + self._rest[-1:]
                if end:
                    yield lines

    def records(self) -> list[dict[str, Any]]:
        """Return the records among those lines."""
        return [record for line in self.lines() if (record := parse(line)) is not None]


def checksum_before(path: Path, offset: int) -> int:
    """Return a checksum of the bytes before an offset of a file, by which the file is recognised again. Raises
    OSError."""
    if offset == 0:
        return 0
    with open(path, "rb", opener=plain) as file:
        file.seek(max(0, offset - _BEFORE))
        return zlib.crc32(file.read(min(offset, _BEFORE)))


def last_record(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """Return the last wanted record of a JSON lines file, read from its end; None if there is none."""
    return next(iter(last_records(path, wanted, 1)), None)


def last_records(path: Path, wanted: Callable[[dict[str, Any]], bool], count: int) -> list[dict[str, Any]]:
    """Return the last `count` wanted records, the last one first."""
    newest: list[dict[str, Any]] = []
    for line in lines_backwards(path):
        record = parse(line)
        if record is not None and wanted(record):
            newest.append(record)
            if len(newest) == count:
                break
    return newest


def end_of(path: Path) -> tuple[int, Iterator[bytes]]:
    """Return the offset after a file's last complete line, and its complete lines, the last one first.

    A `Tail` from that offset misses no line, and returns none twice.
    """
    if not path.exists():
        return 0, iter(())
    size = path.stat().st_size
    backwards = lines_backwards(path, size)
    return size - len(next(backwards, b"")), backwards


def lines_backwards(path: Path, end: int | None = None) -> Iterator[bytes]:
    """Yield a file's lines up to `end`, the last one first, without newlines; none if there is no file."""
    try:
        file = open(path, "rb", opener=plain)  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END) if end is None else end
        parts: list[bytes] = []
        while position > 0:
            length = min(_LAST_BLOCK, position)
            position -= length
            file.seek(position)
            first, *lines = file.read(length).split(b"\n")
            if lines:
                # A line longer than a block is joined once, however many blocks it spans.
                yield b"".join([lines.pop(), *reversed(parts)])
                yield from reversed(lines)
                parts = []
            parts.append(first)
        yield b"".join(reversed(parts))
