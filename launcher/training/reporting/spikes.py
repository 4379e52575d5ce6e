"""Detection of losses that jump and stay up, and the ledger of skipped steps."""

from __future__ import annotations

import collections
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from launcher.job.training import OnSpike

_NORMAL = 1.4826
"""The ratio of the standard deviation to the median absolute deviation, for a normal distribution."""
_LEAST_DEVIATION = 0.05
"""The smallest deviation, as a share of the median: losses of a small window can be closer together by
chance."""


@dataclass
class SpikeWatch:
    """The last losses of a run, and the consecutive ones that stand out from them."""

    policy: OnSpike
    losses: collections.deque[float] = field(init=False)
    above: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = collections.deque(maxlen=self.policy.window)

    @property
    def limit(self) -> float:
        """Return the loss above which a step stands out; infinite while too few losses are known."""
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
        """Add a step's finite loss; return whether enough consecutive ones now stand out for a lasting
        spike."""
        if loss > self.limit:
            self.above.append(loss)
            return len(self.above) >= self.policy.steps
        # It recovered by itself: a few hard batches, which are normal here.
        self.losses.extend([*self.above, loss])
        self.above.clear()
        return False

    def begin_anew(self) -> None:
        """Treat the next losses as normal."""
        self.losses.clear()
        self.above.clear()


@dataclass
class Ledger:
    """The steps of a run that left no trace in its weights, and why: ranges of steps, in the order of the
    decisions.

    Their samples are not trained on again: a step has the same samples whatever happened before.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_rewinds(self) -> int:
        return sum("checkpoint" in entry for entry in self.entries)

    @property
    def last_rewind(self) -> dict[str, Any] | None:
        return next((entry for entry in reversed(self.entries) if "checkpoint" in entry), None)

    def skip(self, step: int, reason: str) -> None:
        """Record a step whose update was skipped."""
        last = self.entries[-1] if self.entries else {}
        if last.get("last") == step - 1 and last.get("reason") == reason and "checkpoint" not in last:
            last["last"] = step
        else:
            self.entries.append({"first": step, "last": step, "reason": reason})

    def rewind(self, checkpoint: int, step: int, reason: str) -> None:
        """Record that the steps after `checkpoint`, up to `step`, were undone."""
        self.entries.append(
            {"first": checkpoint + 1, "last": step, "checkpoint": checkpoint, "reason": reason}
        )
