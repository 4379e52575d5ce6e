"""Incremental summaries of growing JSON lines files, which read each line once.

A fold's state can be saved in a small file next to the long one, with the offset up to which it holds. The next
reader, in another process, continues there. Rank 0 saves them as it trains. If such a file is missing, damaged,
or belongs to another file (an older run, half a copy), everything is read again, in blocks.
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
    """The fold of one file. The constructor reads only the saved state; `refresh` reads the new lines."""

    kept_as: ClassVar[str]
    form: ClassVar[int]
    """The version of the state's format; a saved state of another version is not used."""

    def __init__(self, path: Path) -> None:
        self._path, self._kept = path, path.with_name(self.kept_as)
        self.state: dict[str, Any] = self.empty()
        offset = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            offset, self.state = self._recall()
        self._tail = Tail(path, offset=offset)

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """Return the state before the first line, as plain JSON values."""

    @abstractmethod
    def take(self, line: bytes) -> None:
        """Update the state by one line."""

    def refresh(self) -> Self:
        """Update the state by the lines appended since the last time."""
        for block in self._tail.blocks():
            self.take_block(block)
        return self

    def take_block(self, block: bytes) -> None:
        """Update the state by many complete lines."""
        for line in block.split(b"\n"):
            try:
                self.take(line)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue  # a foreign line is skipped, and the others are read all the same

    def keep(self) -> None:
        """Save the state for the next reader. Raises OSError."""
        state = json.dumps(self.state)
        content = {
            "form": self.form,
            "offset": self._tail.offset,
            "before": checksum_before(self._path, self._tail.offset),
            "checksum": zlib.crc32(state.encode()),
            "state": self.state,
        }
        # Not synced, as that can take as long as many steps: the checksum detects a file that a crash left
        # incomplete.
        new = self._kept.with_name(f".{self._kept.name}.new")
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
        new.replace(self._kept)

    def _recall(self) -> tuple[int, dict[str, Any]]:
        """Return the saved offset and state. Raises ValueError if they do not belong to this file."""
        content = read_json(self._kept)
        offset, state = content["offset"], content["state"]
        if content["form"] != self.form or content["checksum"] != zlib.crc32(json.dumps(state).encode()):
            raise ValueError("damaged, or of another version")
        if content["before"] != checksum_before(self._path, offset):
            raise ValueError("of another file")
        return offset, state
