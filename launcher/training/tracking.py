"""Trackers through accelerate's. A tracker that fails is dropped with a warning; training never notices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from launcher.planning.plan import Plan

logger = logging.getLogger(__name__)


class Trackers:
    """The plan's trackers, on rank 0."""

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
        except Exception as error:  # noqa: BLE001 - whatever a metrics backend raises must not stop training
            logger.warning("tracker %s failed and is left out from here on: %s", name, error)
            return False
        return True
