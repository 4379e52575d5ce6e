"""The save under way: a thread on each rank, and how long the ranks wait for it together before it is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from launcher.runs.notices import tell
from launcher.training.checkpoint.group import Ranks

_SLICE_SECONDS = 1.0
SAY_SECONDS, SAY_TIMES = 60.0, 5.0
"""A save that takes longer, and longer than so many times the one before, is said to be slow."""
GIVE_UP_SECONDS, GIVE_UP_TIMES = 600.0, 20.0
"""One that takes longer than both is given up: training goes on, and saves again once the storage is back."""


class Underway:
    """At most one save, on all ranks. `start` and `wait` are collective.

    A save that was given up is never committed, though its thread may come back: by then the tensors may have changed.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        """Needs the default process group where world_size is above 1: the ranks' main threads agree over a group of their own."""
        self._ranks = Ranks(rank, world_size)
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._last_seconds = 0.0
        self.place = ""
        """What this rank's thread does, where it may hang; empty while it waits for the other ranks."""

    @property
    def is_given_up(self) -> bool:
        """Whether the save whose thread was started last is."""
        return self._given_up.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """Do `work` in the thread. Only after `wait` has said that the one before is over."""

        def run() -> None:
            began = time.monotonic()
            work()
            self._last_seconds = time.monotonic() - began

        self._given_up.clear()
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """Wait until the save is over on every rank; None then, else why it was given up. One that was is asked for and not waited for."""
        if self._thread is None:
            return None
        began, has_said = time.monotonic(), False
        while True:
            self._thread.join(0.0 if self.is_given_up else _SLICE_SECONDS)
            mine = {"alive": self._thread.is_alive(), "place": self.place, "last": self._last_seconds, "waited": time.monotonic() - began}
            states: list[dict[str, Any]] = self._ranks.all_gather(mine)
            if not any(state["alive"] for state in states):
                self._thread = None
                return None
            # One clock decides for all, or a rank would go on while another one still waits.
            waited, last, where = states[0]["waited"], states[0]["last"], _where([state["place"] for state in states])
            if self.is_given_up:
                return f"the storage still hangs ({where})"
            if waited > max(GIVE_UP_SECONDS, GIVE_UP_TIMES * last):
                self._given_up.set()
                return f"the storage hangs: it was given up after {waited:.0f} s ({where})"
            if not has_said and self._ranks.rank == 0 and waited > max(SAY_SECONDS, SAY_TIMES * last):
                has_said = True
                tell(say=f"warning: training has been waiting {waited:.0f} s for a save to end ({where})")


def _where(places: list[str]) -> str:
    found = [f"rank {rank}: {place}" for rank, place in enumerate(places) if place]
    more = [f"and {len(found) - 3} more ranks"] if len(found) > 3 else []
    return ", ".join([*found[:3], *more]) or "the ranks wait for each other"


class Failing:
    """Says on the screen that saves fail, from the second in a row on, by another way than the disk that may be why."""

    def __init__(self, step: int = 0) -> None:
        self._in_a_row = 0
        self._good = step

    def saved(self, step: int) -> None:
        """That of `step` succeeded, or the run went on from it."""
        self._in_a_row, self._good = 0, step

    def failed(self, step: int, reason: str) -> None:
        """That of `step` failed."""
        self._in_a_row += 1
        if self._in_a_row > 1 and self._in_a_row & (self._in_a_row - 1) == 0:  # the 2nd, the 4th, the 8th: there may be thousands
            what = f"{self._in_a_row} saves in a row have failed, the last one at step {step} ({reason})"
            lost = f"nothing is saved {f'since step {self._good}' if self._good else 'yet'}"
            tell(say=f"warning: {what}; {lost}; training goes on")
