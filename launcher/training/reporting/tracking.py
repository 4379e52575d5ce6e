"""Write a run's numbers to its files and to trackers, neither of which can stop training."""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from launcher.planner.plan import Plan
from launcher.redaction import redact_all
from launcher.runs import events

logger = logging.getLogger(__name__)


class Journal:
    """Appends to the run's files. What a full disk refuses waits, in its order, for the next record that it
    takes.

    For several threads of one process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[Path, dict[str, Any]]] = collections.deque(maxlen=100_000)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Append a record, after those that wait."""
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


class Trackers:
    """The plan's trackers, on rank 0. One that fails is left out with a warning."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in plan.trackers:
            self._safely(name, functools.partial(self._start, name, plan, directory))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Hand numbers to every tracker."""
        for tracker in list(self._trackers):
            if not self._safely(tracker.name, functools.partial(tracker.log, values, step=step)):
                self._trackers.remove(tracker)

    def finish(self) -> None:
        """Let every tracker write what it holds."""
        for tracker in self._trackers:
            self._safely(tracker.name, tracker.finish)

    def _start(self, name: str, plan: Plan, directory: Path) -> None:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        options = {"logging_dir": str(directory)} if tracker_class.requires_logging_directory else {}
        tracker = tracker_class(plan.name, **options)
        tracker.start()
        self._trackers.append(tracker)

    @staticmethod
    def _safely(name: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a metrics backend raises must not stop training
            logger.warning("tracker %s failed and is left out from here on: %s", name, error)
            return False
        return True
