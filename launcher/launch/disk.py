"""All disk access of a supervisor, in two threads, so that a stalled disk delays no signal.

One thread reads, ten times a second or as often as the disk lets it; what it found waits in memory. The other
one writes, in the order in which it was asked to. Whoever asks waits for neither, or for a bounded time.
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
"""A disk that has not answered for so long is said to hang."""
GONE_SECONDS = 10.0
"""A run directory that is not there for so long was removed or renamed; a mount may come back before."""
UNREACHABLE_SECONDS = 60.0
"""One that cannot be reached for so long, with an error that may pass."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_BEAT_SECONDS = 5.0


class Disk:
    """A run directory as the supervisor of one attempt sees it."""

    def __init__(self, run: RunDirectory, attempt: int, also_read: Callable[[], None], beats: bool) -> None:
        """`also_read` is called by the reading thread with every look. `beats`: show others that this
        launcher lives."""
        self._run, self._directory = run, run.attempt(attempt)
        self._also_read, self._beats = also_read, beats
        self._reader, self._writer = Aside("disk-reader"), Aside("disk-writer", most=100)
        self._tail = Tail(run.events_file, from_end=True)
        self._events: collections.deque[dict[str, Any]] = collections.deque()
        self.ranks: dict[int, dict[str, Any]] = {}
        """What each rank says of itself once it can take signals."""
        self.failed = False
        """Whether a rank has written down that it failed."""
        self._identity: tuple[int, int] | None = None
        self._place: int | None = None
        self._missing: tuple[float, str, bool] | None = None
        self._beat_at = 0.0
        with contextlib.suppress(OSError):
            self._identity = _identity(run.path)
            self._place = os.open(run.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def look(self) -> None:
        """Have everything read once more, unless the last look is still under way."""
        if self._reader.idle:
            self._reader.do(self._read)
        if self._beats and time.monotonic() - self._beat_at > _BEAT_SECONDS and self._writer.idle:
            self._beat_at = time.monotonic()
            self.write(self._beat)

    def write(self, work: Callable[[], object]) -> None:
        """Have something written; what the disk refuses is dropped."""
        self._writer.do(work)

    def written(self, seconds: float) -> bool:
        """Wait so long for what was to be written; whether it is."""
        return self._writer.wait(seconds)

    def last_look(self, seconds: float, enough: Callable[[], bool]) -> bool:
        """Read once more what is there now, within so many seconds; whether that could be done."""
        self._reader.do(self._read)
        return self._reader.wait(seconds, enough)

    def close(self) -> None:
        """Let both threads end."""
        self._reader.close()
        self._writer.close()
        if self._place is not None:
            os.close(self._place)

    def events(self) -> list[dict[str, Any]]:
        """Return the attempt's events that were read since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    @property
    def stuck_seconds(self) -> float:
        """Return for how long the disk has not answered to the reader or to the writer."""
        return max(self._reader.stuck_seconds, self._writer.stuck_seconds)

    @property
    def lost(self) -> str:
        """Return why the run directory counts as lost; empty while it is there."""
        if self._missing is None:
            return ""
        since, why, is_gone = self._missing
        return why if time.monotonic() - since > (GONE_SECONDS if is_gone else UNREACHABLE_SECONDS) else ""

    @property
    def missing(self) -> str:
        """Return what is wrong with the run directory at this moment, however short it is; empty where it is
        there."""
        return self._missing[1] if self._missing else ""

    @property
    def trouble(self) -> str:
        """Return what is wrong with the disk and may pass, for people; empty where nothing is."""
        if self.stuck_seconds > STALL_SECONDS:
            return f"has not answered for {STALL_SECONDS:.0f} s: its storage hangs"
        if self._missing is None or self._missing[2] or time.monotonic() - self._missing[0] < STALL_SECONDS:
            return ""
        return (
            f"{self._missing[1].removeprefix('it ')}; the run is ended if that lasts "
            f"{UNREACHABLE_SECONDS:.0f} s"
        )

    def place_now(self) -> Path | None:
        """Return where the run directory is now, where it was only renamed. The kernel knows: nothing is
        asked of the disk."""
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
        """By device and inode of the directory, and by the plan in it: another one of the same name is
        another run."""
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
            with contextlib.suppress(OSError):  # a full disk still takes the time below
                os.pwrite(descriptor, b"\n", 0)
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
