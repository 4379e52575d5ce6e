"""The ranks' agreement on how a run stops: with a save or without, and retries while the disk is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import distributed

from launcher.runs.layout import RunDirectory
from launcher.runs.notices import tell
from launcher.runs.places import here
from launcher.runs.tail import last_record
from launcher.training import exchange
from launcher.training.signals import StopRequest


@dataclass(frozen=True)
class Farewell:
    """The way in which all ranks leave, the same on each; times in seconds."""

    signal: str
    """The signal that requested the stop, or `stop-at`."""
    seconds_left: float
    """The grace left on the rank that has least."""
    seconds_needed: float
    """The duration of the run's last save; 0 before the first."""

    @property
    def has_time_to_save(self) -> bool:
        """Return whether the grace left is at least as long as the last save."""
        return self.seconds_left >= self.seconds_needed

    @property
    def why_unsaved(self) -> str:
        """Return the reason for leaving without a save, as one clause."""
        left = f"{self.seconds_left:.0f} s of grace were left"
        return f"no save was begun: {left}, and the last one took {self.seconds_needed:.0f} s"


def agree(run: RunDirectory, stop: StopRequest, leads: bool) -> Farewell:
    """Return how all ranks leave. Called by all ranks together; the rank that `leads` reads how long the last
    save took."""
    signals, seconds_left = zip(*exchange.all_gather((stop.asked_by, stop.seconds_left())), strict=True)
    record = last_record(run.events_file, lambda event: event.get("event") == "saved") if leads else None
    needed = exchange.from_first(float(record["seconds"]) if record else 0.0)
    return Farewell(next(filter(None, signals), "stop-at"), min(seconds_left), needed)


NUM_WAITS, SECONDS = 7, 0.5
"""Retries of the last writes of a run: the waits between them begin at SECONDS and double each time."""


def patiently(write: Callable[[bool], bool], stop: StopRequest, agree: Callable[[bool], bool]) -> None:
    """Call `write(must)` until it returns True, for about a minute: a full disk may get free space.

    `must` is True at the last try and once a stop is requested; `write` then raises on failure. Called by all
    ranks together; `write` must return the same on each.
    """
    for number in range(NUM_WAITS):
        if write(agree(stop.requested)):
            return
        if number == 2 and distributed.get_rank() == 0:
            tell(say="warning: the end of the run cannot be written; it is tried again for a minute")
        for _ in range(1 << number):
            here.at("waiting for the save")  # repeated: a place unchanged for half a minute looks like a hang
            if agree(stop.requested):
                break
            time.sleep(SECONDS)
    write(True)
