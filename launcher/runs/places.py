"""The place in the program where each rank is, with a counter, in a page of shared memory for its supervisor.

The page is memory without a file system (memfd_create(2)), reached as /proc/PID/fd/N: a rank can report its
place whatever happens to the disk, and no file remains. A report costs a few stores into memory, and no system
call. faulthandler writes a rank's stacks after the page, into the same memory.

A supervisor publishes its ranks' reports in the attempt's directory (`ranks-NODE.json`), for people and for the
first node.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.runs.shared_memory import shared_memory

PAGE_BYTES = 4096
PLACES = (
    "starting",
    "preparing",
    "waiting for the preparation",
    "building operators",
    "loading",
    "checking the loss",
    "compiling",
    "restoring",
    "data",
    "forward",
    "backward",
    "exchange",
    "optimizer",
    "recording",
    "evaluating",
    "measuring",
    "staging",
    "waiting for the save",
    "leaving",
)
_NUMBER_OF = {place: number for number, place in enumerate(PLACES)}
SAVE_STATES = ("", "writing", "syncing", "waiting for the other ranks", "committing")
_PLACE, _COUNT, _STEP, _DONE, _TOTAL, _WAITING, _MEMORY, _SAVE, _SAVED_BYTES, _SAVE_STEP, _HAS_DETAIL = range(
    11
)
_FIRST_STEP = 11
"""The slot of the first step plus one, so that 0 stands for none."""
_LOOKS, _STOPPED, _BLOCKED = range(16, 19)
"""The slots that the supervisor writes: a rank cannot see how often it is stopped."""
_STEP_SECONDS, _OWN_SECONDS, _SLOWNESS, _LAST_SAVE = range(32, 36)
_TEXTS = {"detail": 512, "save_detail": 1024}
_TEXT_BYTES = 480


@dataclass(frozen=True)
class Place:
    """The state of one rank as it reports it."""

    rank: int
    host: str
    pid: int
    place: str
    count: int = 0
    """A counter that grows with any work: each micro-batch, evaluation batch, chunk of rows or tensor."""
    step: int = 0
    """The last step done."""
    done: int = 0
    total: int = 0
    """The number of units to do at this place; 0 if that is not known."""
    collective: bool = False
    """Whether it waits for the other ranks, as far as Python sees."""
    detail: str = ""
    save: str = ""
    save_bytes: int = 0
    save_step: int = 0
    save_detail: str = ""
    save_seconds: float = 0.0
    """The duration of the last save."""
    step_seconds: float = 0.0
    busy_seconds: float = 0.0
    """The duration of its own work in a step, without waiting for other ranks."""
    slowness: float = 0.0
    """How many times slower it is than the others, if that has lasted; else 0."""
    memory_bytes: int = 0
    """Its peak memory so far."""
    first_step: int | None = None
    """The steps done before this attempt began; None until it starts its first one."""


class Page:
    """The page of one rank: this process's own, or another rank's to be read."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._numbers = memoryview(memory).cast("q")
        self._floats = memoryview(memory).cast("d")

    @classmethod
    def open(cls, path: str) -> Page:
        """Return the page at the path that a rank has published. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(mmap.mmap(descriptor, PAGE_BYTES))
        except ValueError as error:
            raise OSError(str(error)) from None
        finally:
            os.close(descriptor)

    def text(self, name: str) -> str:
        """Return the text `detail` or `save_detail`."""
        start = _TEXTS[name]
        return self._memory[start : start + _TEXT_BYTES].rstrip(b"\0").decode(errors="replace")

    def write_text(self, name: str, text: str) -> None:
        """Write a text, cut to the space it has."""
        start = _TEXTS[name]
        self._memory[start : start + _TEXT_BYTES] = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")

    def read(self, rank: int, host: str, pid: int) -> Place:
        """Return the rank's current report."""
        numbers, floats = self._numbers, self._floats
        return Place(
            rank=rank,
            host=host,
            pid=pid,
            place=PLACES[numbers[_PLACE]],
            count=numbers[_COUNT],
            step=numbers[_STEP],
            first_step=numbers[_FIRST_STEP] - 1 if numbers[_FIRST_STEP] else None,
            done=numbers[_DONE],
            total=numbers[_TOTAL],
            collective=numbers[_WAITING] > 0,
            detail=self.text("detail") if numbers[_HAS_DETAIL] else "",
            save=SAVE_STATES[numbers[_SAVE]],
            save_bytes=numbers[_SAVED_BYTES],
            save_step=numbers[_SAVE_STEP],
            save_detail=self.text("save_detail"),
            save_seconds=floats[_LAST_SAVE],
            step_seconds=floats[_STEP_SECONDS],
            busy_seconds=round(floats[_OWN_SECONDS], 4),
            slowness=round(floats[_SLOWNESS], 2),
            memory_bytes=numbers[_MEMORY],
        )

    def note_look(self, state: str) -> None:
        """Count a look of the supervisor, and the run state that it saw in /proc, for the rank."""
        self._numbers[_LOOKS] += 1
        self._numbers[_STOPPED] += state in "Tt"
        self._numbers[_BLOCKED] += state == "D"

    def looks(self) -> tuple[int, int, int]:
        """Return how often a supervisor has looked, and how often it saw the rank stopped and blocked in the
        kernel."""
        return self._numbers[_LOOKS], self._numbers[_STOPPED], self._numbers[_BLOCKED]


class Whereabouts(Page):
    """The page in which this process reports its place. Until `begin` nobody can read it."""

    _SECONDS_BETWEEN_MEMORY = 0.5

    def __init__(self) -> None:
        # Private: forked processes must not share this page before `begin`.
        super().__init__(mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._descriptor: int | None = None
        self._memory_at = 0.0
        self._detail = ""

    def begin(self) -> tuple[str, int]:
        """Move to shared memory that a supervisor can read; return its path, and the descriptor for stacks. The
        path is empty if there is no memory for it."""
        try:
            self._descriptor = shared_memory(PAGE_BYTES)
        except OSError:
            return "", 2
        self.__dict__.update(Page(mmap.mmap(self._descriptor, PAGE_BYTES)).__dict__)
        os.lseek(self._descriptor, PAGE_BYTES, os.SEEK_SET)
        return f"/proc/{os.getpid()}/fd/{self._descriptor}", self._descriptor

    def at(self, place: str, *, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Report a new place."""
        numbers = self._numbers
        numbers[_PLACE], numbers[_DONE], numbers[_TOTAL] = _NUMBER_OF[place], done, total
        numbers[_COUNT] += 1
        self._say_detail(detail)

    def _say_detail(self, detail: str) -> None:
        # Writing the text costs more than all the rest, and the same text is often repeated.
        if detail and detail != self._detail:
            self._detail = detail
            self.write_text("detail", detail)
        self._numbers[_HAS_DETAIL] = bool(detail)

    @contextlib.contextmanager
    def during(self, place: str, **more: Any) -> Iterator[None]:
        """Report a place while the context lasts, and the previous one afterwards."""
        numbers = self._numbers
        before = (
            numbers[_PLACE],
            numbers[_DONE],
            numbers[_TOTAL],
            self._detail if numbers[_HAS_DETAIL] else "",
        )
        self.at(place, **more)
        try:
            yield
        finally:
            self.at(PLACES[before[0]], done=before[1], total=before[2], detail=before[3])

    def moved(self, done: int | None = None, detail: str | None = None) -> None:
        """Report progress at this place; `done`: the total so far, if known; `detail`: the next item."""
        numbers = self._numbers
        numbers[_COUNT] += 1
        numbers[_DONE] = numbers[_DONE] + 1 if done is None else done
        if detail is not None:
            self._say_detail(detail)

    @property
    def done(self) -> int:
        """Return the units done at this place."""
        return int(self._numbers[_DONE])

    def waits(self, more: int) -> None:
        """Report the start (1) or the end (-1) of a wait for other ranks; waits may nest."""
        self._numbers[_WAITING] += more

    def steps_begin(self, step: int) -> None:
        """Report the steps done before this attempt began."""
        self._numbers[_STEP], self._numbers[_FIRST_STEP] = step, step + 1
        self._numbers[_COUNT] += 1

    def step_done(self, step: int, seconds: float) -> None:
        """Report that a step of all ranks is done, and its duration."""
        self._numbers[_STEP] = step
        self._numbers[_COUNT] += 1
        self._floats[_STEP_SECONDS] = seconds

    def turn(self, place: str) -> None:
        """Report another place for the same micro-batch or piece of work."""
        self._numbers[_PLACE] = _NUMBER_OF[place]
        self._numbers[_COUNT] += 1

    def own_work(self, seconds: float) -> None:
        """Report the seconds of this rank's own work in a step."""
        self._floats[_OWN_SECONDS] = seconds

    def peak_memory(self, memory_bytes: Callable[[], int]) -> None:
        """Report the peak memory so far; read at most twice a second, as that costs system calls."""
        now = time.monotonic()
        if now - self._memory_at > self._SECONDS_BETWEEN_MEMORY:
            self._memory_at = now
            self._numbers[_MEMORY] = memory_bytes()

    def slow(self, factor: float) -> None:
        """Report how many times slower than the others this rank is; 0 if it is not."""
        self._floats[_SLOWNESS] = factor

    def saving(self, state: str, step: int | None = None, detail: str = "") -> None:
        """Report the state of the save that runs alongside training: one of SAVE_STATES."""
        if step is not None:
            self._numbers[_SAVE_STEP], self._numbers[_SAVED_BYTES] = step, 0
        self.write_text("save_detail", detail)
        self._numbers[_SAVE] = SAVE_STATES.index(state)

    def saved_bytes(self, count: int) -> None:
        """Report that `count` more bytes are written."""
        self._numbers[_SAVED_BYTES] += count

    @property
    def save_progress(self) -> tuple[str, int, str]:
        """Return the state of the save, its bytes written, and its current file."""
        return SAVE_STATES[self._numbers[_SAVE]], self._numbers[_SAVED_BYTES], self.text("save_detail")

    @property
    def last_save_seconds(self) -> float:
        """Return the duration of the last save; 0 before the first."""
        return self._floats[_LAST_SAVE]

    def save_took(self, seconds: float) -> None:
        """Report the duration of the last save."""
        self._floats[_LAST_SAVE] = seconds


here = Whereabouts()
"""The page of this process."""
