"""Where each rank is, with a counter: a page of shared memory that its supervisor reads.

The page is memory without a file system (memfd_create(2)), reached as /proc/PID/fd/N: no stalled, full or
missing disk keeps a rank from saying where it is, and nothing is left behind. To say it costs a few stores
into memory, and no system call. What faulthandler writes of a rank's stacks comes behind the page, in the
same memory.

A supervisor publishes what its ranks say in the attempt's directory (`ranks-NODE.json`): for people, and for
the first node.
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
"""One more than it is, so that 0 stands for none."""
_LOOKS, _STOPPED, _BLOCKED = range(16, 19)
"""Written by the supervisor: a rank cannot see how often it is stopped."""
_STEP_SECONDS, _OWN_SECONDS, _SLOWNESS, _LAST_SAVE = range(32, 36)
_TEXTS = {"detail": 512, "save_detail": 1024}
_TEXT_BYTES = 480


@dataclass(frozen=True)
class Place:
    """One rank as it says itself."""

    rank: int
    host: str
    pid: int
    place: str
    count: int = 0
    """Grows with each micro-batch, evaluation batch, chunk of rows, tensor: whatever is done."""
    step: int = 0
    """The last step that was done."""
    done: int = 0
    total: int = 0
    """Of what is done at the place; 0 where that is not known."""
    collective: bool = False
    """Whether it waits for the others, as far as Python sees it."""
    detail: str = ""
    save: str = ""
    save_bytes: int = 0
    save_step: int = 0
    save_detail: str = ""
    save_seconds: float = 0.0
    """What the last save took."""
    step_seconds: float = 0.0
    busy_seconds: float = 0.0
    """What its own work of a step took, without waiting for others."""
    slowness: float = 0.0
    """How many times slower it is than the others, where that has lasted; else 0."""
    memory_bytes: int = 0
    """Its peak so far."""
    first_step: int | None = None
    """The steps that were done before this attempt began; None until its first one."""


class Page:
    """The page of one rank: its own, or another's that is read."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._numbers = memoryview(memory).cast("q")
        self._floats = memoryview(memory).cast("d")

    @classmethod
    def open(cls, path: str) -> Page:
        """Return the page at a path as a rank gives it. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(mmap.mmap(descriptor, PAGE_BYTES))
        except ValueError as error:
            raise OSError(str(error)) from None
        finally:
            os.close(descriptor)

    def text(self, name: str) -> str:
        """Return `detail`, or `save_detail`."""
        start = _TEXTS[name]
        return self._memory[start : start + _TEXT_BYTES].rstrip(b"\0").decode(errors="replace")

    def write_text(self, name: str, text: str) -> None:
        """Put a text in its place, cut to what fits."""
        start = _TEXTS[name]
        self._memory[start : start + _TEXT_BYTES] = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")

    def read(self, rank: int, host: str, pid: int) -> Place:
        """Return what the rank says now."""
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
        """Tell the rank in which state of /proc it was seen."""
        self._numbers[_LOOKS] += 1
        self._numbers[_STOPPED] += state in "Tt"
        self._numbers[_BLOCKED] += state == "D"

    def looks(self) -> tuple[int, int, int]:
        """Return how often a supervisor has looked, and how often it saw the rank stopped, and blocked in the
        kernel."""
        return self._numbers[_LOOKS], self._numbers[_STOPPED], self._numbers[_BLOCKED]


class Whereabouts(Page):
    """Tell others where this process is. Until `begin` nobody can read it."""

    _SECONDS_BETWEEN_MEMORY = 0.5

    def __init__(self) -> None:
        # Private: processes that were forked before they say where they are must not say it to each other.
        super().__init__(mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._descriptor: int | None = None
        self._memory_at = 0.0
        self._detail = ""

    def begin(self) -> tuple[str, int]:
        """Say it where a supervisor can read it: the path, and the descriptor for stacks; an empty path where
        there is no memory for it."""
        try:
            self._descriptor = shared_memory(PAGE_BYTES)
        except OSError:
            return "", 2
        self.__dict__.update(Page(mmap.mmap(self._descriptor, PAGE_BYTES)).__dict__)
        os.lseek(self._descriptor, PAGE_BYTES, os.SEEK_SET)
        return f"/proc/{os.getpid()}/fd/{self._descriptor}", self._descriptor

    def at(self, place: str, *, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Be at a place from now on."""
        numbers = self._numbers
        numbers[_PLACE], numbers[_DONE], numbers[_TOTAL] = _NUMBER_OF[place], done, total
        numbers[_COUNT] += 1
        self._say_detail(detail)

    def _say_detail(self, detail: str) -> None:
        # The same one comes again and again, and to write it costs more than all the rest.
        if detail and detail != self._detail:
            self._detail = detail
            self.write_text("detail", detail)
        self._numbers[_HAS_DETAIL] = bool(detail)

    @contextlib.contextmanager
    def during(self, place: str, **more: Any) -> Iterator[None]:
        """Be at a place, and back where this process was afterwards."""
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
        """Say that something more is done at this place; `done` in all, where it is known, and what comes
        next."""
        numbers = self._numbers
        numbers[_COUNT] += 1
        numbers[_DONE] = numbers[_DONE] + 1 if done is None else done
        if detail is not None:
            self._say_detail(detail)

    @property
    def done(self) -> int:
        """Return how much is done at this place."""
        return int(self._numbers[_DONE])

    def waits(self, more: int) -> None:
        """Wait for the other ranks from now on (1), or no longer (-1)."""
        self._numbers[_WAITING] += more

    def steps_begin(self, step: int) -> None:
        """Note the steps that were done before this attempt began."""
        self._numbers[_STEP], self._numbers[_FIRST_STEP] = step, step + 1
        self._numbers[_COUNT] += 1

    def step_done(self, step: int, seconds: float) -> None:
        """Say that a step of all ranks is over, which took so long."""
        self._numbers[_STEP] = step
        self._numbers[_COUNT] += 1
        self._floats[_STEP_SECONDS] = seconds

    def turn(self, place: str) -> None:
        """Go over to another place with the same piece of work."""
        self._numbers[_PLACE] = _NUMBER_OF[place]
        self._numbers[_COUNT] += 1

    def own_work(self, seconds: float) -> None:
        """Note the seconds of this rank's own work in a step."""
        self._floats[_OWN_SECONDS] = seconds

    def peak_memory(self, memory_bytes: Callable[[], int]) -> None:
        """Say the most memory so far; asked for at most twice a second, as it costs system calls."""
        now = time.monotonic()
        if now - self._memory_at > self._SECONDS_BETWEEN_MEMORY:
            self._memory_at = now
            self._numbers[_MEMORY] = memory_bytes()

    def slow(self, factor: float) -> None:
        """Note how many times slower than the others this rank is; 0 where it is not."""
        self._floats[_SLOWNESS] = factor

    def saving(self, state: str, step: int | None = None, detail: str = "") -> None:
        """Note what the save does that goes on beside training: one of SAVE_STATES."""
        if step is not None:
            self._numbers[_SAVE_STEP], self._numbers[_SAVED_BYTES] = step, 0
        self.write_text("save_detail", detail)
        self._numbers[_SAVE] = SAVE_STATES.index(state)

    def saved_bytes(self, count: int) -> None:
        """Note that so many more bytes are written."""
        self._numbers[_SAVED_BYTES] += count

    @property
    def save_progress(self) -> tuple[str, int, str]:
        """Return what the save does, how many bytes it has written, and to which file."""
        return SAVE_STATES[self._numbers[_SAVE]], self._numbers[_SAVED_BYTES], self.text("save_detail")

    @property
    def last_save_seconds(self) -> float:
        """Return what the last save took; 0 before the first."""
        return self._floats[_LAST_SAVE]

    def save_took(self, seconds: float) -> None:
        """Say how long the last save took."""
        self._floats[_LAST_SAVE] = seconds


here = Whereabouts()
"""This process."""
