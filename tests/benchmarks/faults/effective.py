"""What a run that was hit again and again lost in time, from its own files, beside the formula."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory


@dataclass
class Times:
    """Seconds of one run. `add` makes one of several."""

    wall: float = 0.0
    """From the first attempt's first step to the last step, without what it was stopped for."""
    kept: float = 0.0
    """Of the steps that count, without what saves added to them."""
    lost: float = 0.0
    """Of steps that were done again."""
    restarts: float = 0.0
    """From each failure to the first step after it."""
    stalls: float = 0.0
    """What saves added to the steps after them."""
    failures: int = 0
    intervals: float = 0.0
    """Of all saves: the seconds of the steps from one to the next."""
    saves: int = 0

    def add(self, other: Times) -> Times:
        return Times(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def ratio(self) -> float:
        """The share of time that went into steps that count."""
        return self.kept / self.wall

    @property
    def formula(self) -> float:
        """1 - stall/interval - (restart + interval/2)/MTTF."""
        interval, mttf = self.intervals / self.saves, self.wall / max(1, self.failures)
        return 1 - self.stalls / self.saves / interval - (self.restarts / max(1, self.failures) + interval / 2) / mttf


def times(run: RunDirectory, failures: Sequence[float], stopped_seconds: float, every: int) -> Times:
    """`failures`: when an attempt was hit that did not survive it. `stopped_seconds`: how long it was held up without a failure."""
    records = [record for record in read(run.metrics_file) if record.get("kind") == "train"]
    starts = [record["time"] for record in read(run.events_file) if record["event"] == "started"]
    durations = _durations(records, starts)
    last = {record["step"]: index for index, record in enumerate(records)}
    typical = statistics.median(seconds for seconds in durations if seconds is not None)
    filled = [typical if seconds is None else seconds for seconds in durations]
    kept = sum(filled[index] for index in last.values())
    after_saves = [index for index in last.values() if records[index]["step"] % every == 1 and durations[index] is not None]
    stalls = sum(max(0.0, filled[index] - typical) for index in after_saves)
    restarts = _restarts(records, filled, failures)
    wall = records[-1]["time"] - records[0]["time"] + filled[0] - stopped_seconds
    return Times(
        wall=wall,
        kept=kept - stalls - stopped_seconds,
        lost=sum(filled) - kept,
        restarts=sum(restarts),
        stalls=stalls,
        failures=len(failures),
        intervals=typical * every * len(after_saves),
        saves=len(after_saves),
    )


def _durations(records: Sequence[dict[str, Any]], starts: Sequence[float]) -> list[float | None]:
    """Seconds of each step; None for the first of an attempt, before which something else was done."""
    found: list[float | None] = []
    for before, record in zip([None, *records], records, strict=False):
        of_one = before is not None and not any(before["time"] < start < record["time"] for start in starts)
        found.append(record["time"] - before["time"] if before is not None and of_one else None)
    return found


def _restarts(records: Sequence[dict[str, Any]], durations: Sequence[float], failures: Sequence[float]) -> list[float]:
    """Seconds between each failure and the beginning of the first step after it, or the next failure."""
    begins = [record["time"] - seconds for record, seconds in zip(records, durations, strict=True)]
    bounds = sorted([*failures, *begins])
    return [max(0.0, min((later for later in bounds if later > failure), default=failure) - failure) for failure in failures]


def failures_of(run: RunDirectory, injections: Sequence[dict[str, Any]]) -> list[float]:
    """When the attempts that did not survive were hit: the newest injection before each later `started`."""
    starts = [record["time"] for record in read(run.events_file) if record["event"] == "started"]
    found = []
    for before, after in itertools.pairwise(starts):
        inside = [entry["time"] for entry in injections if before < entry["time"] < after]
        found.append(max(inside, default=after))
    return found
