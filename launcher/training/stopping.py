"""Agree over all ranks how a run that was told to stop leaves: with a save, or without time for one."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.runs.layout import RunDirectory
from launcher.runs.tail import last_record
from launcher.training import exchange
from launcher.training.signals import StopRequest


@dataclass(frozen=True)
class Farewell:
    """Say how the ranks leave, the same on all of them; times in seconds."""

    signal: str
    """What asked for the stop, or `stop-at`."""
    seconds_left: float
    """Of the grace, on the rank that has least."""
    seconds_needed: float
    """By the run's last save; 0 before the first."""

    @property
    def has_time_to_save(self) -> bool:
        """Return whether the grace is as long as the last save was."""
        return self.seconds_left >= self.seconds_needed

    @property
    def why_unsaved(self) -> str:
        """Return why no save is begun, in one clause."""
        left = f"{self.seconds_left:.0f} s of grace were left"
        return f"no save was begun: {left}, and the last one took {self.seconds_needed:.0f} s"


def agree(run: RunDirectory, stop: StopRequest, leads: bool) -> Farewell:
    """Return how all ranks leave. Called by all of them together; the one that `leads` reads how long the
    last save took."""
    signals, seconds_left = zip(*exchange.all_gather((stop.asked_by, stop.seconds_left())), strict=True)
    record = last_record(run.events_file, lambda event: event.get("event") == "saved") if leads else None
    needed = exchange.from_first(float(record["seconds"]) if record else 0.0)
    return Farewell(next(filter(None, signals), "stop-at"), min(seconds_left), needed)
