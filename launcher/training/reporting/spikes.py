"""Detect losses that jump and stay up, and keep the ledger of skipped steps."""

from __future__ import annotations

import collections
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from launcher.job.training import OnSpike

_NORMAL = 1.4826
"""Times the median absolute deviation is the standard deviation, where a normal distribution is what
deviates."""
_LEAST_DEVIATION = 0.05
"""Of the median: what a loss may differ by in any case. Losses of a small window can lie closer together by
chance."""


@dataclass
class SpikeWatch:
    """The last losses of one run, and those in a row that stand out from them."""

    policy: OnSpike
    losses: collections.deque[float] = field(init=False)
    above: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = collections.deque(maxlen=self.policy.window)

    @property
    def limit(self) -> float:
        """Return the loss above which one stands out; infinite while too few are known."""
        if self.policy.action == "ignore" or 2 * len(self.losses) < self.policy.window:
            return math.inf
        median = self.median
        deviation = _NORMAL * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.policy.threshold * max(deviation, _LEAST_DEVIATION * abs(median))

    @property
    def median(self) -> float:
        """Return the median of the last losses that did not stand out."""
        return statistics.median(self.losses)

    def lasts(self, loss: float) -> bool:
        """Take in a step's finite loss; whether so many in a row stand out now that it is a lasting spike."""
        if loss > self.limit:
            self.above.append(loss)
            return len(self.above) >= self.policy.steps
        # It came back by itself: a few hard batches, which belong to what is normal here.
        self.losses.extend([*self.above, loss])
        self.above.clear()
        return False

    def begin_anew(self) -> None:
        """Take what comes now for normal."""
        self.losses.clear()
        self.above.clear()


@dataclass
class Ledger:
    """List which steps of a run left no trace in its weights, and why: ranges of steps, in the order in which
    it was decided.

    The samples of these steps are not trained on again: a step has the same samples whatever happened before
    it.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_rewinds(self) -> int:
        return sum("checkpoint" in entry for entry in self.entries)

    @property
    def last_rewind(self) -> dict[str, Any] | None:
        return next((entry for entry in reversed(self.entries) if "checkpoint" in entry), None)

    def skip(self, step: int, reason: str) -> None:
        """Note a step whose update was left out."""
        last = self.entries[-1] if self.entries else {}
        if last.get("last") == step - 1 and last.get("reason") == reason and "checkpoint" not in last:
            last["last"] = step
        else:
            self.entries.append({"first": step, "last": step, "reason": reason})

    def rewind(self, checkpoint: int, step: int, reason: str) -> None:
        """Note that the steps after `checkpoint`, up to `step`, were taken back."""
        self.entries.append(
            {"first": checkpoint + 1, "last": step, "checkpoint": checkpoint, "reason": reason}
        )
