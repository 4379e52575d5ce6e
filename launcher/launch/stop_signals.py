"""The stop signals that reach a launcher."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from launcher.runs.processes import STOP_SIGNALS

_SAME_KEY_PRESS_SECONDS = 0.5


class Signals:
    """The stop signals that this process received, each with its time."""

    def __init__(self) -> None:
        self.received: list[tuple[signal.Signals, float]] = []

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append((signal.Signals(number), time.monotonic()))

    @contextlib.contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch them while the context lasts. Only the main thread can; in others nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # SIGHUP stays ignored if the parent set it so, as nohup does.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {
            number: signal.signal(number, self._handle) for number in STOP_SIGNALS if number not in ignored
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def first(self) -> tuple[signal.Signals, float] | None:
        return self.received[0] if self.received else None

    def insisted(self) -> bool:
        """Return whether Ctrl-C was pressed after the stop had begun. The same key press, forwarded by a
        wrapper, does not count."""
        interrupts = [at for number, at in self.received if number == signal.SIGINT]
        return any(at - self.received[0][1] > _SAME_KEY_PRESS_SECONDS for at in interrupts)
