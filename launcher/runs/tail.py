"""Following a JSON lines file while others append to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tail:
    """Gives each record of a file once. It may start at the file's present end; the file need not exist yet."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def records(self) -> list[dict[str, Any]]:
        """What was appended since the last call; a line that is not whole yet comes with a later call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
