"""Run work that may hang (a disk, a terminal) in a thread of its own.

Whoever hands it work waits only as long as it wants to.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

_SLICE_SECONDS = 0.005


class Aside:
    """One such thread. What it does is done in the order in which it was handed over; what that raises is
    dropped.

    It is a daemon: a process ends though it hangs.
    """

    def __init__(self, name: str, most: int = 1000) -> None:
        """At most `most` pieces of work may wait."""
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
        """Have `work` done after all that waits; False where too much waits already, and this is left out."""
        with contextlib.suppress(queue.Full):
            self._work.put_nowait(work)
            return True
        return False

    def close(self) -> None:
        """Let the thread end, once it has done what waits."""
        with contextlib.suppress(queue.Full):
            self._work.put_nowait(None)

    @property
    def idle(self) -> bool:
        """Return whether everything is done."""
        return self._work.unfinished_tasks == 0

    @property
    def stuck_seconds(self) -> float:
        """Return for how long the present piece of work has been under way; 0 where there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def wait(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything is done, for so many seconds, or until there has been `enough` of it. Whether
        everything is done."""
        until = time.monotonic() + seconds
        while not self.idle and time.monotonic() < until and not enough():
            time.sleep(min(_SLICE_SECONDS, max(0.0, until - time.monotonic())))
        return self.idle


def within(seconds: float, work: Callable[[], object], enough: Callable[[], bool] = lambda: False) -> bool:
    """Do `work` in a thread of its own; False where it is not done in so many seconds, and goes on. What it
    raises is dropped."""
    aside = Aside("within")
    aside.do(work)
    aside.close()
    return aside.wait(seconds, enough)
