"""What `launcher watch` shows, looked up without a terminal."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import Any

from launcher.runs.events import steps
from launcher.runs.layout import RunDirectory
from launcher.runs.places import ranks_of
from launcher.runs.status import read_status
from launcher.runs.tail import Tail
from launcher.scheduling.slurm.view import view

_DULL = ("phase", "prepared")
_EVENTS = 12
_LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


class Watched:
    """A run that is looked at again and again."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._events = Tail(run.events_file)
        self._last: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._slurm: dict[str, Any] = {}

    def look(self, ask: bool) -> dict[str, Any]:
        """Status, losses, ranks and events as they are now; Slurm is asked only where `ask` says so, else what it said last is shown."""
        if ask:
            status = view(self.run)
            self._slurm = status.get("slurm", {})
        else:
            status = read_status(self.run).to_dict() | ({"slurm": self._slurm} if self._slurm else {})
        self._last.extend(record for record in self._events.records() if record.get("event") not in _DULL)
        losses = [(step, record["loss"]) for step, record in sorted(steps(self.run.metrics_file).items())]
        return {
            "status": status,
            "losses": losses,
            "ranks": self._ranks(),
            "events": list(self._last),
            "goes_on": not self.run.finished and self._slurm.get("state") in _LIVE,
        }

    def _ranks(self) -> list[dict[str, Any]]:
        """Each rank as its supervisor saw it last, with how long it has shown no life."""
        found = ranks_of(self.run.attempt(self.run.last_attempt()))
        return [{**asdict(seen), "behind_seconds": seen.still_seconds} for seen in found]
