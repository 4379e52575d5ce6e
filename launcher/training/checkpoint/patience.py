"""Waiting for a save as long as it moves, on all ranks alike, and no longer than storage that hangs is worth."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed

from launcher.runs.places import SAVE_STATES, here

GIVING_UP_SECONDS, GIVING_UP_FACTOR = 600.0, 20.0
_SLICE_SECONDS = 0.5


def giving_up_seconds(hang_after: float | Literal["off"] | None, last_save_seconds: float) -> float:
    """After how long without a byte written a save is given up: of a plan's `hang_after`, and of what the last save took."""
    if hang_after == "off":
        return math.inf
    return 2 * hang_after if hang_after is not None else max(GIVING_UP_SECONDS, GIVING_UP_FACTOR * last_save_seconds)


def told(blocks: Iterator[memoryview], name: str) -> Iterator[memoryview]:
    """The blocks of a file, said as they are written."""
    here.saving("writing", detail=name)
    for block in blocks:
        yield block
        here.saved_bytes(len(block))
    here.saving("syncing", detail=name)


@dataclass(frozen=True)
class Ended:
    """How waiting for a save ended. The same on all ranks."""

    where: str = ""
    """Of a save that hangs: which ranks, and in what; empty where it is over."""
    world_size: int = 1

    def lost(self, here_too: bool) -> bool:
        """Whether any rank has lost the others in the save; for all ranks to call."""
        return bool(_sum([float(here_too)], self.world_size)[0])


def wait_for(thread: threading.Thread, bound: float, rank: int, world_size: int) -> Ended:
    """Wait until a save's thread is over on all ranks, or has not moved on any of them for `bound` seconds. Collective."""
    with here.during("waiting for the save"):
        moved, since = here.save_progress, time.monotonic()
        while True:
            thread.join(min(_SLICE_SECONDS, bound))
            if here.save_progress != moved:
                moved, since = here.save_progress, time.monotonic()
            alive, stalled = thread.is_alive(), time.monotonic() - since >= bound
            states = [0.0] * world_size
            states[rank] = float(SAVE_STATES.index(moved[0]) if alive else 0)
            num_alive, num_moving, *states = _sum([float(alive), float(alive and not stalled), *states], world_size)
            if not num_alive:
                return Ended(world_size=world_size)
            if not num_moving:
                return Ended(_where(states, rank, moved[2], bound), world_size)
            here.moved()


def _sum(values: list[float], world_size: int) -> list[float]:
    """Over all ranks, on the main thread's own group: the save's thread may be in the other."""
    summed = torch.tensor(values, dtype=torch.float64)
    if world_size > 1:
        distributed.all_reduce(summed)
    found: list[float] = summed.tolist()
    return found


def _where(states: list[float], rank: int, name: str, bound: float) -> str:
    """Which ranks hang, by what their saves do. A rank that waits for the others does not hang itself."""
    waiting = SAVE_STATES.index("waiting for the other ranks")
    parts = [
        f"rank {number} is {SAVE_STATES[int(state)]} {name if number == rank and name else 'its file'}"
        for number, state in enumerate(states)
        if state and int(state) != waiting
    ]
    return f"{', '.join(parts) or 'the ranks wait for each other'}, without a byte for {bound:.0f} s"
