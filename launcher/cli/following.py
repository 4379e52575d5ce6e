"""Detection of the end of a followed run, after which no further attempt is expected."""

from __future__ import annotations

import time

from launcher.launch.slurm.view import has_live_job
from launcher.runs import attempts, events
from launcher.runs.layout import RunDirectory

WAIT_SECONDS = 60.0
"""The wait for another attempt if Slurm has no job: with smaller micro-batches, or resumed by someone."""
_ASK_SECONDS = 10.0
"""Interval between requests to Slurm's controller, which serves many."""
_ENDED = ("failed", "stopped", "interrupted")


class Following:
    """A run that is followed from attempt to attempt."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._waiting_since: float | None = None
        self._asked_at: float | None = None
        self._live = False

    @property
    def is_waiting(self) -> bool:
        """Return whether an attempt ended and another may start."""
        return self._waiting_since is not None

    @property
    def waits(self) -> str:
        """Return what is waited for, and for how long."""
        return "waiting for Slurm" if self._live else f"waiting {WAIT_SECONDS:g} s for another attempt"

    def is_over(self, state: str) -> bool:
        """Return whether a run in this state is over: it finished; or it ended otherwise, Slurm no longer
        has its job, and no attempt started for WAIT_SECONDS."""
        if state not in _ENDED:
            self._waiting_since = None
            return state == "finished"
        now = time.monotonic()
        if self._has_job(now) or self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since >= WAIT_SECONDS

    def _has_job(self, now: float) -> bool:
        if self._asked_at is None or now - self._asked_at >= _ASK_SECONDS:
            self._asked_at, self._live = now, has_live_job(self.run)
        return self._live

    def why(self, number: int) -> str:
        """Return in a clause how an attempt ended, and what was decided then; empty if that is not known."""
        told = [one for one in attempts.attempts(events.read(self.run.events_file)) if one.number == number]
        if not told:
            return ""
        last = told[-1]
        cuts = [mark["text"] for mark in last.marks if mark.get("event") == "cut"]
        cause = cuts[-1] if cuts else last.cause
        return f"attempt {number}: {last.outcome}" + (f", {cause}" if cause else "")
