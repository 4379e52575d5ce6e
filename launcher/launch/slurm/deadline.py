"""How long the job still has, asked of the controller in a thread."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from typing import TYPE_CHECKING

from launcher.errors import LauncherError
from launcher.launch.slurm import queue
from launcher.launch.slurm.client import call
from launcher.runs.curve import is_step
from launcher.runs.layout import RunDirectory
from launcher.runs.tail import last_records
from launcher.runs.totals import Totals

if TYPE_CHECKING:
    from launcher.planner.plan import Plan

_KILL_WAIT_SECONDS = 30.0
"""Slurm's own default."""
_ASK_EVERY_SECONDS = 20.0
_FOREVER_SECONDS = 360 * 86_400.0
"""Of a job without a limit Slurm says that it ends in a year."""
_MARGIN_SECONDS = 10.0
"""For what comes after a save: the ranks' end, and the request to go on."""
_NUM_STEPS = 20
"""By which it is measured how long a step takes."""


class Clock:
    """The end of this job, and what Slurm gives between SIGTERM and SIGKILL. What is not known yet is None,
    or Slurm's default."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self.end: float | None = None
        """In seconds since 1970."""
        self.term_seconds = _KILL_WAIT_SECONDS
        self._over = threading.Event()

    def start(self) -> Clock:
        """Begin to ask."""
        threading.Thread(target=self._ask, daemon=True).start()
        return self

    def stop(self) -> None:
        self._over.set()

    def _ask(self) -> None:
        # Where Slurm's commands are not at hand, as in a container, the signal that Slurm sends before the
        # end has to do.
        with contextlib.suppress(LauncherError):
            self.term_seconds = _term_seconds(queue.record(self._job_id).get("Partition", ""))
        while not self._over.is_set():
            with contextlib.suppress(LauncherError):
                end = seconds_since_1970(queue.record(self._job_id).get("EndTime", ""))
                self.end = end if end is not None and end - time.time() < _FOREVER_SECONDS else None
            self._over.wait(_ASK_EVERY_SECONDS)


def _term_seconds(partition: str) -> float:
    """Between the SIGTERM of a preemption and the SIGKILL: the partition's grace, then KillWait."""
    wait = float(queue.setting("KillWait").split()[0])
    described = (
        queue.fields(call(["scontrol", "--oneliner", "show", "partition", partition]).strip())
        if partition
        else {}
    )
    grace = described.get("GraceTime", "0")
    return wait + (float(grace) if grace.isdigit() else 0.0)


def seconds_since_1970(text: str) -> float | None:
    """Return a time as Slurm writes it in seconds (2026-11-23T10:00:00, of this time zone); None for one
    that is not known."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def lead_seconds(run: RunDirectory, plan: Plan, totals: Totals) -> float:
    """Return how long before the end the ranks must be told: for two steps and two saves as they were
    measured, and a margin.

    Before the first save of the run, for the grace that the job allows. Asked every few seconds by who must
    not miss a signal meanwhile: `totals` are the run's, which take in what is new, and of the steps the last
    ones alone are read.
    """
    saves = totals.refresh().save_seconds
    times = [
        record["time"]
        for record in reversed(last_records(run.metrics_file, is_step, _NUM_STEPS))
        if "time" in record
    ]
    # The middle one: between two attempts lies a time that is no step.
    step = statistics.median([later - earlier for earlier, later in itertools.pairwise(times)] or [0.0])
    return 2 * (float(max(saves, default=plan.grace_seconds / 2)) + step) + _MARGIN_SECONDS
