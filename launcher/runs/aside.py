"""A separate thread for work that may hang (on a disk or a terminal).

Callers wait for it only as long as they want to.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

_SLICE_SECONDS = 0.005


class Aside:
    """A thread that does work in the order in which it was queued; errors are dropped.

    It is a daemon thread: a process can end while it hangs.
    """

    def __init__(self, name: str, most: int = 1000) -> None:
        """Start the thread, with a queue of at most `most` pieces of work."""
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue(most)
        self._since: float | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._since = time.monotonic()
            with contextlib.suppress(BaseException):
                work()
            self._since = None
            self._work.task_done()
        self._work.task_done()

    def do(self, work: Callable[[], object]) -> bool:
        """Queue `work`; False if the queue is full and the work is dropped."""
        with contextlib.suppress(queue.Full):
            self._work.put_nowait(work)
            return True
        return False

    def close(self) -> None:
        """End the thread once it has done the queued work."""
        with contextlib.suppress(queue.Full):
            self._work.put_nowait(None)

    @property
    def idle(self) -> bool:
        """Return whether everything is done."""
        return self._work.unfinished_tasks == 0

    @property
    def stuck_seconds(self) -> float:
        """Return for how long the current piece of work has been running; 0 if there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def wait(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything is done, for at most `seconds`, or until `enough` says so. Returns whether
        everything is done."""
        until = time.monotonic() + seconds
        while not self.idle and time.monotonic() < until and not enough():
            time.sleep(min(_SLICE_SECONDS, max(0.0, until - time.monotonic())))
        return self.idle


def within(seconds: float, work: Callable[[], object], enough: Callable[[], bool] = lambda: False) -> bool:
    """Do `work` in a separate thread; False if it is not done within `seconds`, while it continues. Its errors
    are dropped."""
    aside = Aside("within")
    aside.do(work)
    aside.close()
    return aside.wait(seconds, enough)
