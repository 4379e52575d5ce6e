"""Following a JSON lines file while others append to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.plain_files import plain
from launcher.runs.records import parse


class Tail:
    """Gives each record of a file once. It may start at the file's present end; the file need not exist yet."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def records(self) -> list[dict[str, Any]]:
        """What was appended since the last call; a line that is not whole yet comes with a later call."""
        try:
            with open(self.path, "rb", opener=plain) as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [record for line in lines if (record := parse(line)) is not None]
