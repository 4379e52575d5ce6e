"""Output in a separate thread, so that a stalled terminal blocks nothing."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable

from launcher.errors import one_line
from launcher.runs.aside import Aside
from launcher.runs.layout import RunDirectory

_BEGIN_SECONDS = 2.0


class Watcher:
    """The base class of displays; it prints only the lines that must be shown."""

    def begin(self, run: RunDirectory, attempt: int) -> None:
        """Take note that the attempt's processes are about to start."""

    def read(self) -> None:
        """Read new content of the run's files, for the next `tick`. Called as often as `tick`, in a thread that
        may hang with the disk."""

    def tick(self) -> None:
        """Show what was read. Called about ten times a second, in the thread that does all output."""

    def say(self, line: str) -> None:
        """Show one line to people."""
        print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take note that the attempt is over."""


class _Silent(Watcher):
    def say(self, line: str) -> None:
        """Nobody is there to see it."""


class Screen:
    """A supervisor's wrapper of a watcher, whose methods never block for long and never raise."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._thread = Aside("screen")

    def begin(self, run: RunDirectory, attempt: int) -> None:
        """Have the watcher begin. Returns once it has, so that it misses nothing, or after a short wait if it
        cannot."""
        self._do(lambda watcher: watcher.begin(run, attempt))
        self._thread.wait(_BEGIN_SECONDS)

    def read(self) -> None:
        """Have the watcher read, in the caller's own thread."""
        with contextlib.suppress(Exception):
            self._watcher.read()

    def tick(self) -> None:
        """Have the watcher show what it read; skipped while it is still showing."""
        if self._thread.idle:
            self._do(lambda watcher: watcher.tick())

    def say(self, line: str) -> None:
        """Have the watcher print a line."""
        self._do(lambda watcher: watcher.say(line))

    def end(self) -> None:
        """Have the watcher end. Lines may still follow."""
        self._do(lambda watcher: watcher.end())

    def close(self, code: int, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Wait for the last line to be printed, for `seconds` or until `enough`. The process is about to end
        with this exit code."""
        if self._thread.wait(seconds, enough):
            self._thread.close()
            mute()
        else:
            # Python would wait for the stream on which the thread is blocked, and then abort.
            atexit.register(os._exit, code)

    def _do(self, what: Callable[[Watcher], None]) -> None:
        self._thread.do(functools.partial(self._try, what))

    def _try(self, what: Callable[[Watcher], None]) -> None:
        try:
            what(self._watcher)
        except OSError:  # the terminal or the pipe's reader is gone, or the disk of the output file is full
            self._watcher = _Silent()
        except BaseException as error:
            self._watcher = Watcher()
            with contextlib.suppress(Exception):
                self._watcher.say(f"the display stopped ({one_line(error)}); the run goes on")


def mute() -> None:
    """Discard the remaining output of standard streams that nobody reads any more, so that the exit code is
    kept."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
