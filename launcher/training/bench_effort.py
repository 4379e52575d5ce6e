"""The effort and progress of benchmarks, and the timing of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Report = Callable[[str, float], None]
"""A callback that receives the name of the next measurement and the estimated seconds left."""
MESSAGE_BYTES = tuple(1 << power for power in (12, 16, 20, 24, 26))


@dataclass(frozen=True)
class Effort:
    """The amount of work behind each figure, after one warm-up round that is not counted."""

    seconds: float = 0.5
    turns: int = 9
    """Number of turns in which figures that are compared with each other are measured alternately."""
    rounds: int = 10
    """Rounds of each collective."""
    message_bytes: tuple[int, ...] = MESSAGE_BYTES
    file_bytes: int = 1 << 28
    parts: tuple[float, ...] = (2.0, 1.0, 60.0, 30.0, 3.0)
    """Seconds on two idle cores: products in one precision, memory, collectives, operator calls, files."""
    quick: bool = False


FULL = Effort()
QUICK = Effort(0.2, 3, 3, (1 << 16, 1 << 24), 0, (0.5, 0.5, 6.0, 14.0, 0.0), quick=True)
"""No disk benchmark, and only two message sizes."""
QUICK_WITH_DISK = replace(QUICK, file_bytes=1 << 26, parts=(*QUICK.parts[:-1], 1.0))


class Progress:
    """Reports the estimated time left, scaled by how long the finished parts took."""

    def __init__(self, report: Report, parts: list[float]) -> None:
        self._report, self._parts = report, parts
        self._began, self._number = time.monotonic(), 0

    def next(self, what: str) -> None:
        """Report the measurement that starts now."""
        foreseen, left = sum(self._parts[: self._number]), sum(self._parts[self._number :])
        slowed = max(1.0, (time.monotonic() - self._began) / foreseen) if foreseen else 1.0
        self._report(what, left * slowed)
        self._number += 1


def seconds_of(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the minimum time of one call over as many calls as fit into the budget (seconds), after one
    warm-up call.

    Other load on the machine only adds time: while a test suite ran, the median gave two fifths of this
    processor's rate.
    """
    timed(work, device)
    least, until = timed(work, device), time.monotonic() + budget
    while time.monotonic() < until:
        least = min(least, timed(work, device))
    return least


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the GPU work that it queued."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
