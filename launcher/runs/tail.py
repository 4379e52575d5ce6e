"""Follow a JSON lines file while others append to it; read the end of one."""

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
"""Bytes before a place, by which a file is known again."""
_LAST_BLOCK = 1 << 14
"""What is read at a time from the end: some 60 steps."""


class Tail:
    """Gives each record of a file once. It may start at the file's present end, or at an offset; the file
    need not exist yet. `overwritten`: of a line that is not whole yet, what a \\r goes back over is not kept."""

    def __init__(
        self, path: Path, from_end: bool = False, offset: int = 0, overwritten: bool = False
    ) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else offset
        self._rest = b""
        self._overwritten = overwritten

    @property
    def offset(self) -> int:
        """Return how many bytes of the file are whole lines that were given."""
        return self._offset - len(self._rest)

    @property
    def unfinished(self) -> bytes:
        """Return what was read of a line that is not whole yet."""
        return self._rest

    def lines(self) -> Iterator[bytes]:
        """Yield what was appended since the last call, without ever holding more than a block of it; to be
        read to its end.

        A line that is not whole yet comes with a later call.
        """
        for block in self.blocks():
            yield from block.split(b"\n")

    def blocks(self) -> Iterator[bytes]:
        """Yield the same lines, many at a time: whole ones, without the end of the last."""
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
    """Return a checksum of what stands in a file before a place, by which the file is known again. Raises
    OSError."""
    if offset == 0:
        return 0
    with open(path, "rb", opener=plain) as file:
        file.seek(max(0, offset - _BEFORE))
        return zlib.crc32(file.read(min(offset, _BEFORE)))


def last_record(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """Return the last record of a JSON lines file that is wanted, read from its end."""
    return next(iter(last_records(path, wanted, 1)), None)


def last_records(path: Path, wanted: Callable[[dict[str, Any]], bool], count: int) -> list[dict[str, Any]]:
    """Return the last so many records that are wanted, the last one first."""
    newest: list[dict[str, Any]] = []
    for line in lines_backwards(path):
        record = parse(line)
        if record is not None and wanted(record):
            newest.append(record)
            if len(newest) == count:
                break
    return newest


def end_of(path: Path) -> tuple[int, Iterator[bytes]]:
    """Return the place behind a file's last whole line, and its whole lines up to there, the last one first.

    A `Tail` from that place misses nothing, and gives nothing twice.
    """
    if not path.exists():
        return 0, iter(())
    size = path.stat().st_size
    backwards = lines_backwards(path, size)
    return size - len(next(backwards, b"")), backwards


def lines_backwards(path: Path, end: int | None = None) -> Iterator[bytes]:
    """Yield a file's lines up to `end`, the last one first, without their ends; nothing of a file that is
    not there."""
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
                # A line longer than a block is put together once, however many blocks it has.
                yield b"".join([lines.pop(), *reversed(parts)])
                yield from reversed(lines)
                parts = []
            parts.append(first)
        yield b"".join(reversed(parts))
