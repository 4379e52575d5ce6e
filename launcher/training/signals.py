"""The first stop signal to a rank, which the trainer checks at step boundaries."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from launcher.runs.grace import Grace
from launcher.runs.processes import STOP_SIGNALS, heed


class StoppedEarly(BaseException):
    """A rank's end after a stop request, before there is anything to save. No `Exception`: nothing on the way
    may take it for an error."""


class StopRequest:
    """The stop request to this rank, if any: the signal and its time.

    Every signal of STOP_SIGNALS requests the same: save at the next step boundary, and leave. Further signals
    change nothing, so a scheduler may signal every process while the launcher forwards its own signal.
    """

    def __init__(self, grace_seconds: float = float("inf"), grace_file: Path | None = None) -> None:
        self.grace_seconds = grace_seconds
        self.grace_file = grace_file
        """The file in which the launcher writes the deadline, once it knows it."""
        self.requested = False
        self.signal_name = ""
        self.time = 0.0
        self._clock = 0.0

    def install(self) -> StopRequest:
        """Handle the stop signals in this process, and unblock those blocked since it started."""
        heed(self._handle)
        os.register_at_fork(after_in_child=_default_handlers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def request(self, signal_name: str) -> None:
        """Record a stop request; only the first one counts."""
        if not self.requested:
            self.time, self._clock = time.time(), time.monotonic()
            self.signal_name = signal_name
            self.requested = True

    def leave_early(self) -> None:
        """Raise StoppedEarly if the launcher has requested a stop, which it does of every rank.

        A signal to this rank alone does not count: its peers would go on, and wait for it. Nor may it be called
        in work that ends on some ranks and not on others.
        """
        if self.requested and self._given() is not None:
            raise StoppedEarly

    def seconds_left(self) -> float:
        """Return the seconds of grace left; infinity without a stop request."""
        if not self.requested:
            return float("inf")
        given = self._given()
        return given.seconds_left if given else max(0.0, self._clock + self.grace_seconds - time.monotonic())

    @property
    def asked_by(self) -> str:
        """Return the signal that the launcher received and forwarded, if it is known; else the one received
        here."""
        given = self._given()
        return given.signal_name if given and self.requested else self.signal_name

    def _given(self) -> Grace | None:
        return None if self.grace_file is None else Grace.read(self.grace_file)


def _default_handlers() -> None:
    # A forked worker (of a tokeniser pool, say) must die when its pool sends SIGTERM.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
