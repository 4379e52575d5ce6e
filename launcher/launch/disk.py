"""A supervisor's disk access, in two threads, so that a stalled disk delays no signal.

One thread reads, ten times a second or as often as the disk allows, and keeps the results in memory. The other
writes, in the order of the requests. Callers wait for neither, or for a bounded time.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.plain_files import read_json
from launcher.runs.aside import Aside
from launcher.runs.failure import SIGNS_OF_FAILURE
from launcher.runs.layout import RunDirectory
from launcher.runs.status import HEARTBEAT
from launcher.runs.tail import Tail

STALL_SECONDS = 10.0
"""The time after which a disk that does not answer is reported as hanging."""
GONE_SECONDS = 10.0
"""The time after which a missing run directory counts as removed or renamed; a mount may come back before."""
UNREACHABLE_SECONDS = 60.0
"""The same for a directory that cannot be reached, with an error that may be temporary."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_BEAT_SECONDS = 5.0


class Disk:
    """A run directory as the supervisor of one attempt sees it."""

    def __init__(self, run: RunDirectory, attempt: int, also_read: Callable[[], None], beats: bool) -> None:
        """Take `also_read`, which the reading thread calls every time it reads, and `beats`: whether to write a
        heartbeat that shows others that this launcher is alive."""
        self._run, self._directory = run, run.attempt(attempt)
        self._also_read, self._beats = also_read, beats
        self._reader, self._writer = Aside("disk-reader"), Aside("disk-writer", most=100)
        self._tail = Tail(run.events_file, from_end=True)
        self._events: collections.deque[dict[str, Any]] = collections.deque()
        self.ranks: dict[int, dict[str, Any]] = {}
        """Each rank's own record (rank-R.json), which it writes once it can handle signals."""
        self.failed = False
        """Whether a rank has recorded a failure."""
        self._identity: tuple[int, int] | None = None
        self._place: int | None = None
        self._missing: tuple[float, str, bool] | None = None
        self._beat_at = 0.0
        with contextlib.suppress(OSError):
            self._identity = _identity(run.path)
            self._place = os.open(run.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def look(self) -> None:
        """Start another read of everything, unless the previous one is still running."""
        if self._reader.idle:
            self._reader.do(self._read)
        if self._beats and time.monotonic() - self._beat_at > _BEAT_SECONDS and self._writer.idle:
            self._beat_at = time.monotonic()
            self.write(self._beat)

    def write(self, work: Callable[[], object]) -> None:
        """Queue a write; one that the disk refuses is dropped."""
        self._writer.do(work)

    def written(self, seconds: float) -> bool:
        """Wait up to `seconds` for the queued writes, and return whether they are done."""
        return self._writer.wait(seconds)

    def last_look(self, seconds: float, enough: Callable[[], bool]) -> bool:
        """Read everything once more within `seconds`, or until `enough`; return whether that succeeded."""
        self._reader.do(self._read)
        return self._reader.wait(seconds, enough)

    def close(self) -> None:
        """End both threads."""
        self._reader.close()
        self._writer.close()
        if self._place is not None:
            os.close(self._place)

    def events(self) -> list[dict[str, Any]]:
        """Return the attempt's events read since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    @property
    def stuck_seconds(self) -> float:
        """Return for how long the disk has not answered the reader or the writer."""
        return max(self._reader.stuck_seconds, self._writer.stuck_seconds)

    @property
    def lost(self) -> str:
        """Return why the run directory counts as lost; empty while it does not."""
        if self._missing is None:
            return ""
        since, why, is_gone = self._missing
        return why if time.monotonic() - since > (GONE_SECONDS if is_gone else UNREACHABLE_SECONDS) else ""

    @property
    def missing(self) -> str:
        """Return why the run directory is missing right now, even if only for a moment; empty if it is there."""
        return self._missing[1] if self._missing else ""

    @property
    def trouble(self) -> str:
        """Return a warning for people about a disk problem that may be temporary; empty if there is none."""
        if self.stuck_seconds > STALL_SECONDS:
            return f"has not answered for {STALL_SECONDS:.0f} s: its storage hangs"
        if self._missing is None or self._missing[2] or time.monotonic() - self._missing[0] < STALL_SECONDS:
            return ""
        return (
            f"{self._missing[1].removeprefix('it ')}; the run is ended if that lasts "
            f"{UNREACHABLE_SECONDS:.0f} s"
        )

    def place_now(self) -> Path | None:
        """Return the run directory's new path if it was only renamed, else None. The kernel knows it, so the
        disk is not read."""
        if self._place is None:
            return None
        with contextlib.suppress(OSError):
            place = str(Path(f"/proc/self/fd/{self._place}").readlink())
            if not place.endswith(" (deleted)") and place != str(self._run.path):
                return Path(place)
        return None

    def _read(self) -> None:
        self._check_that_it_is_there()
        with contextlib.suppress(OSError):
            self._events.extend(self._tail.records())
        for path in self._directory.glob("rank-*.json"):
            with contextlib.suppress(ValueError, OSError, KeyError):
                who = read_json(path)
                self.ranks.setdefault(who["rank"], who)
        self.failed = self.failed or any(
            itertools.chain.from_iterable(map(self._directory.glob, SIGNS_OF_FAILURE))
        )
        self._also_read()

    def _check_that_it_is_there(self) -> None:
        """Note whether the run directory is there, by its device and inode and by the plan in it: another
        directory of the same name is another run."""
        why, is_gone = "", True
        try:
            is_another = self._identity not in (None, _identity(self._run.path))
            (self._run.path / "plan.json").stat()
            why = "there is another directory in its place" if is_another else ""
        except OSError as error:
            is_gone = error.errno in _GONE
            why = "it was removed or renamed" if is_gone else f"it cannot be reached: {error.strerror}"
        if not why:
            self._missing = None
        elif self._missing is None or self._missing[2] != is_gone:
            self._missing = time.monotonic(), why, is_gone

    def _beat(self) -> None:
        descriptor = os.open(self._directory / HEARTBEAT, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # even a full disk can set the time below
                os.pwrite(descriptor, b"\n", 0)
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
