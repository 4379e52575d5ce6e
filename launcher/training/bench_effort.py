"""Say how much is measured, tell how long it still takes, and time one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Report = Callable[[str, float], None]
"""Told what is measured next, and the seconds to the end."""
MESSAGE_BYTES = tuple(1 << power for power in (12, 16, 20, 24, 26))


@dataclass(frozen=True)
class Effort:
    """Say how much is measured for each figure, after one round that is not counted."""

    seconds: float = 0.5
    turns: int = 9
    """In so many those are measured that are compared with each other."""
    rounds: int = 10
    """Of each message."""
    message_bytes: tuple[int, ...] = MESSAGE_BYTES
    file_bytes: int = 1 << 28
    parts: tuple[float, ...] = (2.0, 1.0, 60.0, 30.0, 3.0)
    """Seconds on two idle cores: products in one precision, memory, messages, calling, files."""
    quick: bool = False


FULL = Effort()
QUICK = Effort(0.2, 3, 3, (1 << 16, 1 << 24), 0, (0.5, 0.5, 6.0, 14.0, 0.0), quick=True)
"""Without the disk; of messages a small and a large one."""
QUICK_WITH_DISK = replace(QUICK, file_bytes=1 << 26, parts=(*QUICK.parts[:-1], 1.0))


class Progress:
    """Tells how long it still takes, by how long the parts that are over took."""

    def __init__(self, report: Report, parts: list[float]) -> None:
        self._report, self._parts = report, parts
        self._began, self._number = time.monotonic(), 0

    def next(self, what: str) -> None:
        """Say what is measured now."""
        foreseen, left = sum(self._parts[: self._number]), sum(self._parts[self._number :])
        slowed = max(1.0, (time.monotonic() - self._began) / foreseen) if foreseen else 1.0
        self._report(what, left * slowed)
        self._number += 1


def seconds_of(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the least of the times of one call, over as many calls as the budget has room for, after a
    first one that is not counted.

    What else a machine does only ever adds to it: beside a test suite the middle made two fifths of this
    processor's rate of it.
    """
    timed(work, device)
    least, until = timed(work, device), time.monotonic() + budget
    while time.monotonic() < until:
        least = min(least, timed(work, device))
    return least


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, with what it left to a GPU."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
