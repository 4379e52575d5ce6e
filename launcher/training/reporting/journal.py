"""Appending to a run's events and metrics; a full disk does not stop training."""

from __future__ import annotations

import collections
import logging
import threading
import time
from pathlib import Path
from typing import Any

from launcher.redaction import redact_all
from launcher.runs import events

logger = logging.getLogger(__name__)


class Journal:
    """A writer that appends to the run's files. Records that a full disk refuses are kept, in order, until
    one can be written again.

    It is safe for several threads of one process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[Path, dict[str, Any]]] = collections.deque(maxlen=100_000)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Append a record, after waiting ones."""
        with self._lock:
            was_empty = not self._waiting
            self._waiting.append((path, record))
            try:
                while self._waiting:
                    events.append(*self._waiting[0])
                    self._waiting.popleft()
            except OSError as error:
                if was_empty:
                    logger.warning("%s: %s; its lines wait for better times", path, error.strerror)

    def event(self, path: Path, name: str, **fields: Any) -> None:
        """Append an event with the time it happened."""
        self.append(path, {"time": round(time.time(), 3), "event": name, **redact_all(fields)})
