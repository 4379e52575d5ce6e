"""When to save and when to evaluate. Rank 0 decides; callers pass the current time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.metrics import Better, cost
from launcher.values import Interval


@dataclass
class Cadence:
    """The schedule of a periodic action: whether it is due after a step."""

    interval: Interval | None
    steps_per_epoch: float
    last_time: float
    last_step: int

    def due(self, step: int, now: float) -> bool:
        """Return whether it is due after `step` steps at time `now`, in seconds."""
        if self.interval is None:
            return False
        if self.interval.unit == "seconds":
            return now - self.last_time >= self.interval.value
        if self.interval.unit == "steps":
            return step // self.interval.value > self.last_step // self.interval.value
        return self._periods(step) > self._periods(self.last_step)

    def done(self, step: int, now: float) -> None:
        """Note that it happened after `step` steps at time `now`, in seconds."""
        self.last_step, self.last_time = step, now

    def _periods(self, step: int) -> int:
        """Return the number of complete periods after `step` steps, for intervals in epochs. A quotient that
        rounding left just below a whole number counts as that number."""
        assert self.interval is not None
        return math.floor(step / (self.steps_per_epoch * self.interval.value) + 1e-9)


@dataclass
class Patience:
    """Early stopping: a count of consecutive evaluations without improvement."""

    metric: str
    patience: int
    minimum_delta: float
    better: Better = "lower"
    """Which value of the metric is the better one."""
    best: float | None = None
    num_worse: int = 0

    @property
    def exhausted(self) -> bool:
        """Return whether patience has run out."""
        return self.num_worse >= self.patience

    def exhausted_by(self, metrics: dict[str, float]) -> bool:
        """Record one evaluation; return whether patience has run out."""
        value = metrics[self.metric]
        if (
            self.best is None
            or math.isnan(self.best)
            or cost(self.best - value, self.better) > self.minimum_delta
        ):
            self.best, self.num_worse = value, 0
        else:
            self.num_worse += 1
        return self.exhausted
