"""The save in progress: a thread on each rank, and the ranks' joint decision to give it up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from launcher.runs.notices import tell
from launcher.runs.places import here
from launcher.training.checkpoint.group import Ranks

HangAfter = float | Literal["off"] | None
_SLICE_SECONDS = 1.0
SAY_SECONDS, SAY_TIMES = 60.0, 5.0
"""A save is reported as slow after waiting for both SAY_SECONDS and SAY_TIMES the previous save's duration."""
GIVE_UP_SECONDS, GIVE_UP_TIMES = 600.0, 20.0
"""A save without progress for longer than both is given up: training continues, and saves again once the storage
is back."""
_WAITING = ("", "waiting for the other ranks")


def giving_up_seconds(hang_after: HangAfter, last_save_seconds: float) -> float:
    """Return the seconds without a written byte after which a save is given up, from the plan's `hang_after` or
    the duration of the last save."""
    if hang_after == "off":
        return math.inf
    return (
        2 * hang_after if hang_after is not None else max(GIVE_UP_SECONDS, GIVE_UP_TIMES * last_save_seconds)
    )


def told(blocks: Iterator[memoryview], name: str) -> Iterator[memoryview]:
    """Yield the blocks of a file, and report each one once it is written."""
    for block in blocks:
        yield block
        here.saved_bytes(len(block))
    here.saving("syncing", detail=name)


class Underway:
    """At most one save, on all ranks. `start` and `wait` are collective.

    A save that was given up is never committed, even if its thread continues later: by then the tensors may have
    changed.
    """

    def __init__(self, rank: int, world_size: int, hang_after: HangAfter = None) -> None:
        """Create a process group for the ranks' main threads; with more than one rank, the default process group
        must exist."""
        self._ranks = Ranks(rank, world_size)
        self._hang_after = hang_after
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self.ranks_lost = False
        """Whether the threads' own group is broken on any rank; known once `wait` has returned None."""

    @property
    def is_given_up(self) -> bool:
        """Return whether the save that was started last was given up."""
        return self._given_up.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in the thread. Call it only after `wait` has returned None for the previous save."""
        self._given_up.clear()
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait_here(self, seconds: float) -> None:
        """Wait up to `seconds` for this rank's own thread only; the other ranks need not call this."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> str | None:
        """Wait until the save has ended on every rank, then return None; or return why it was given up. A save
        already given up is only polled."""
        with here.during("waiting for the save"):
            return self._wait()

    def _wait(self) -> str | None:
        if self._thread is None:
            return None
        began = since = time.monotonic()
        seen, has_said = here.save_progress, False
        while True:
            self._thread.join(0.0 if self.is_given_up else _SLICE_SECONDS)
            now, progress = time.monotonic(), here.save_progress
            seen, since = (seen, since) if progress == seen else (progress, now)
            what, _, name = progress
            mine: dict[str, Any] = {
                "alive": self._thread.is_alive(),
                "still": now - since,
                "last": here.last_save_seconds,
                "lost": self.ranks_lost,
            }
            mine |= {"place": "" if what in _WAITING else f"{what} {name}".rstrip(), "waited": now - began}
            states: list[dict[str, Any]] = self._ranks.all_gather(mine)
            if not any(state["alive"] for state in states):
                self._thread, self.ranks_lost = None, any(state["lost"] for state in states)
                return None
            # All ranks decide by the same numbers; otherwise one would continue while another still waits.
            waited, last, where = (
                states[0]["waited"],
                states[0]["last"],
                _where([state["place"] for state in states]),
            )
            if self.is_given_up:
                return f"the storage still hangs ({where})"
            still = min(state["still"] for state in states)
            if still > giving_up_seconds(self._hang_after, last):
                self._given_up.set()
                return f"the storage hangs: it was given up after {still:.0f} s without a byte ({where})"
            here.moved()
            if not has_said and self._ranks.rank == 0 and waited > max(SAY_SECONDS, SAY_TIMES * last):
                has_said = True
                tell(say=f"warning: training has been waiting {waited:.0f} s for a save to end ({where})")


def _where(places: list[str]) -> str:
    busy = [f"rank {rank}: {place}" for rank, place in enumerate(places) if place]
    more = [f"and {len(busy) - 3} more ranks"] if len(busy) > 3 else []
    return ", ".join([*busy[:3], *more]) or "the ranks wait for each other"


class Failing:
    """A warning on the screen about repeated failures of saves. It does not use the disk, which may be the
    cause."""

    def __init__(self, step: int = 0) -> None:
        self._in_a_row = 0
        self._good = step

    def saved(self, step: int) -> None:
        """Note that the save of `step` succeeded, or that the run resumed from it."""
        self._in_a_row, self._good = 0, step

    def failed(self, step: int, reason: str, goes_on: bool = True) -> None:
        """Note that the save of `step` failed, and warn at the 2nd, 4th, 8th failure in a row. `goes_on`:
        training continues."""
        self._in_a_row += 1
        if (
            self._in_a_row > 1 and self._in_a_row & (self._in_a_row - 1) == 0
        ):  # not at each failure, as there may be thousands
            what = f"{self._in_a_row} saves in a row have failed, the last one at step {step} ({reason})"
            lost = f"nothing is saved {f'since step {self._good}' if self._good else 'yet'}"
            tell(say=f"warning: {what}; {lost}" + ("; training goes on" if goes_on else ""))
