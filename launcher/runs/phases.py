"""The progress within a phase of an attempt: one small file, overwritten in place."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from launcher.plain_files import read_json
from launcher.runs import events
from launcher.runs.layout import RunDirectory

_BYTES = 256
_SECONDS_BETWEEN = 0.25
_FILE = "phase.json"


class PhaseReport:
    """The progress report of one phase. Its beginning is an event; later progress overwrites one file, at most
    four times a second.

    Errors of the disk are ignored: progress is not worth failing for.
    """

    def __init__(self, run: RunDirectory, phase: str, unit: str) -> None:
        self._run, self._phase, self._unit = run, phase, unit
        self._began = False
        self._written = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Report `done` of `total` units; 0 of 0 if another process does the work and reports its progress."""
        if not self._began:
            self._began = True
            with contextlib.suppress(OSError):
                events.event(self._run.events_file, "phase", **self._content(done, total))
        now = time.monotonic()
        if total and (done == total or now - self._written > _SECONDS_BETWEEN):
            self._written = now
            content = {"time": round(time.time(), 3), "event": "phase", **self._content(done, total)}
            with contextlib.suppress(OSError):
                self._write(json.dumps(content).ljust(_BYTES).encode())

    def _content(self, done: int, total: int) -> dict[str, Any]:
        return {"phase": self._phase, "done": done, "total": total, "unit": self._unit}

    def _write(self, content: bytes) -> None:
        descriptor = os.open(self._run.path / _FILE, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, content, 0)
        finally:
            os.close(descriptor)


def current_phase(run: RunDirectory) -> dict[str, Any] | None:
    """Return the latest progress in the form of an event `phase`; None before the first, or if it cannot be
    read."""
    with contextlib.suppress(OSError, ValueError):
        content = read_json(run.path / _FILE)
        return content if isinstance(content, dict) and "time" in content else None
    return None
