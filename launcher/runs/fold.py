"""Summarise a growing JSON lines file without reading it again.

A fold takes each line in once. What it then knows can be kept in a small file beside the long one, with the
place up to which it holds: the next reader, of another process, goes on there. Rank 0 keeps them as it
trains. Where such a file is missing, damaged, or of another file than the one beside it (a run that was made
before there were any, half a copy), all is read once more, in blocks.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from launcher.plain_files import read_json
from launcher.runs.tail import Tail, checksum_before


class Fold(ABC):
    """One file's fold. Making one reads only what was kept; `refresh` takes in what is new."""

    kept_as: ClassVar[str]
    form: ClassVar[int]
    """Of the state; one that was kept in another form is not used."""

    def __init__(self, path: Path) -> None:
        self._path, self._kept = path, path.with_name(self.kept_as)
        self.state: dict[str, Any] = self.empty()
        offset = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            offset, self.state = self._recall()
        self._tail = Tail(path, offset=offset)

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """Return the state before the first line, of plain JSON values."""

    @abstractmethod
    def take(self, line: bytes) -> None:
        """Take one line into the state."""

    def refresh(self) -> Self:
        """Take in what was appended since the last time."""
        for block in self._tail.blocks():
            self.take_block(block)
        return self

    def take_block(self, block: bytes) -> None:
        """Take many whole lines into the state."""
        for line in block.split(b"\n"):
            try:
                self.take(line)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue  # a line that is none of ours says nothing, and keeps nobody from the others

    def keep(self) -> None:
        """Write down what is known, for the next reader. Raises OSError."""
        state = json.dumps(self.state)
        content = {
            "form": self.form,
            "offset": self._tail.offset,
            "before": checksum_before(self._path, self._tail.offset),
            "checksum": zlib.crc32(state.encode()),
            "state": self.state,
        }
        # Not synced, as that can take as long as many steps: what a crash leaves of it is found out by the
        # checksum.
        new = self._kept.with_name(f".{self._kept.name}.new")
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
        new.replace(self._kept)

    def _recall(self) -> tuple[int, dict[str, Any]]:
        """The place and the state that were kept. Raises ValueError where they are not of this file."""
        content = read_json(self._kept)
        offset, state = content["offset"], content["state"]
        if content["form"] != self.form or content["checksum"] != zlib.crc32(json.dumps(state).encode()):
            raise ValueError("damaged, or of another version")
        if content["before"] != checksum_before(self._path, offset):
            raise ValueError("of another file")
        return offset, state
