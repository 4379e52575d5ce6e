"""What each rank says of itself as it goes on, so that the slow one can be named: one small file a rank, overwritten in place."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.plain_files import read_json
from launcher.runs.records import made_of

_BYTES = 256
_SECONDS_BETWEEN = 0.5


@dataclass(frozen=True)
class Beat:
    """One rank, after its own work of a step and before it waits for the others."""

    rank: int
    host: str
    step: int
    busy_seconds: float
    """What its own work of the step took."""
    memory_bytes: int
    """Its peak so far."""
    time: float


class Beater:
    """Writes a rank's beats. Costs one small write at most twice a second; a disk that is full or gone stops nothing."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._rank, self._host, self._written = rank, os.uname().nodename, 0.0
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open(directory / f"beat-{rank}.json", os.O_WRONLY | os.O_CREAT, 0o666)

    def beat(self, step: int, busy_seconds: float, memory_bytes: int) -> None:
        """Say that the work of `step` is done here."""
        now = time.time()
        if self._descriptor is None or now - self._written < _SECONDS_BETWEEN:
            return
        self._written = now
        content = asdict(Beat(self._rank, self._host, step, round(busy_seconds, 4), memory_bytes, round(now, 3)))
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, json.dumps(content).ljust(_BYTES).encode(), 0)


def beats(directory: Path) -> list[Beat]:
    """The last beat of each rank of an attempt, in the order of the ranks; without ranks that have not beaten yet."""
    found = []
    for path in directory.glob("beat-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(made_of(Beat, read_json(path)))
    return sorted(found, key=lambda beat: beat.rank)
