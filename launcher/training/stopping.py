"""Agree over all ranks how a run leaves: with a save or without time for one, and once the disk has room."""

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


NUM_WAITS, SECONDS = 7, 0.5
"""Between the tries to write what a run ends with: so long, then twice, four times, eight times as long."""


def patiently(write: Callable[[bool], bool], stop: StopRequest, agree: Callable[[bool], bool]) -> None:
    """Call `write` until it returns that it has written, for a minute: a disk without room may get some.

    It is told whether it must, and then raises where it cannot: the last time, and once a stop is asked for.
    Called by all ranks together, which it must tell the same.
    """
    for number in range(NUM_WAITS):
        if write(agree(stop.requested)):
            return
        if number == 2 and distributed.get_rank() == 0:
            tell(say="warning: the end of the run cannot be written; it is tried again for a minute")
        for _ in range(1 << number):
            here.at("waiting for the save")  # said anew: one that stays for half a minute looks like a hang
            if agree(stop.requested):
                break
            time.sleep(SECONDS)
    write(True)
