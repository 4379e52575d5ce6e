"""What a run that was hit again and again lost in time, from its own files, beside the formula."""

from __future__ import annotations

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
    """From the beginning of the first step to the end of the last one, without what it was held up for in
    place."""
    kept: float = 0.0
    """Of the steps that count, each as long as one that follows no save."""
    lost: float = 0.0
    """Of steps that were done again."""
    restarts: float = 0.0
    """From the last step before each failure to the first one after it."""
    held: float = 0.0
    """What was added to steps by what was done to the run and did not end it."""
    stalls: float = 0.0
    """What saves added to the steps after them."""
    failures: int = 0
    """Attempts that ended before the run did."""
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
        """(1 - stall/(interval + stall)) (1 - (restart + interval/2)/MTTF): what saves hold up is a share of the
        time in which steps are done. Where failures are seldom, 1 - stall/interval - (restart + interval/2)/MTTF.
        """
        interval, stall = self.intervals / self.saves, self.stalls / self.saves
        failures = max(1, self.failures)
        stopped = (self.restarts / failures + (interval + stall) / 2) / (self.wall / failures)
        return interval / (interval + stall) * (1 - stopped)


@dataclass(frozen=True)
class Timeline:
    """When the steps of a run were done, in the order in which they were, those that were done again among
    them."""

    steps: tuple[tuple[int, float], ...]
    starts: tuple[float, ...]
    """When each attempt began."""
    injections: tuple[float, ...]

    @classmethod
    def of(cls, run: RunDirectory, injections: Sequence[dict[str, Any]]) -> Timeline:
        """From a run's files."""
        steps = [
            (record["step"], record["time"])
            for record in read(run.metrics_file)
            if record.get("kind") == "train"
        ]
        starts = [record["time"] for record in read(run.events_file) if record["event"] == "started"]
        return cls(tuple(steps), tuple(starts), tuple(entry["time"] for entry in injections))

    def times(self, every: int) -> Times:
        """`every`: the steps between saves. Seconds of an attempt's first step are not known, and taken as
        those of others."""
        seconds = self._seconds()
        held = [
            index
            for index, value in enumerate(seconds)
            if value is not None and self._was_hit(self.steps[index][1], value)
        ]
        undisturbed = {
            index: value for index, value in enumerate(seconds) if value is not None and index not in held
        }
        after_saves = [value for index, value in undisturbed.items() if self.steps[index][0] % every == 1]
        others = [value for index, value in undisturbed.items() if self.steps[index][0] % every != 1]
        usual = statistics.fmean(others)
        last = {step: index for index, (step, _) in enumerate(self.steps)}
        again = [index for index in range(len(self.steps)) if index not in last.values()]
        gaps = [
            self.steps[index][1] - self.steps[index - 1][1] - usual
            for index, value in enumerate(seconds)
            if value is None and index
        ]
        held_seconds = sum((seconds[index] or usual) - usual for index in held)
        return Times(
            wall=self.steps[-1][1] - self.steps[0][1] + usual - held_seconds,
            kept=usual * len(last),
            lost=sum(undisturbed.get(index, usual) for index in again),
            restarts=sum(gaps),
            held=held_seconds,
            stalls=sum(after_saves) - usual * len(after_saves),
            failures=len(self.starts) - 1,
            intervals=usual * every * len(after_saves),
            saves=len(after_saves),
        )

    def _seconds(self) -> list[float | None]:
        """Of each step; None for the first of an attempt, before which something else was done."""
        found: list[float | None] = [None]
        for (_, before), (_, now) in zip(self.steps, self.steps[1:], strict=False):
            found.append(None if any(before < start < now for start in self.starts) else now - before)
        return found

    def _was_hit(self, end: float, seconds: float) -> bool:
        """Whether something was done to the run in this step, or in the half second before it."""
        return any(end - seconds - 0.5 <= at <= end for at in self.injections)
