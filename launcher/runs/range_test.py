"""A learning-rate range test: its curve from the run's files, and the rate that the curve suggests.

After Smith (Cyclical Learning Rates for Training Neural Networks, 2017, arXiv 1506.01186), as in fastai's
`lr_find` and Lightning's `LearningRateFinder`: the rate grows exponentially, the loss is smoothed by a moving
average with bias correction, and the test ends once the average exceeds a multiple of its lowest value. A
step's loss is that of the weights before the update with its rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.runs.layout import RunDirectory
from launcher.runs.series import Series

BETA = 0.95
"""The decay of the moving average: the mean is over about 20 steps."""
_FEWEST = 10
"""The number of points after the first tenth that a suggestion needs."""
_STANDARD_ERRORS = 3.0
"""The number of standard errors of a difference of two smoothed losses that a fall has to exceed."""
_SMALLEST_FALL = 0.001
"""The smallest fall, as a share of the loss at the start, that counts even without visible noise."""
_NORMAL = 1.4826
"""The ratio of standard deviation to median absolute deviation in a normal distribution."""


class SmoothedLoss:
    """The moving average of a run's losses, bias-corrected like Adam's moments."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0
        self.value, self.lowest = math.nan, math.inf

    def add(self, loss: float) -> float:
        """Add the next loss and return the average, which stays non-finite after a loss that is not finite."""
        self._sum = BETA * self._sum + (1 - BETA) * loss
        self._weight = BETA * self._weight + (1 - BETA)
        self.value = self._sum / self._weight
        self.lowest = min(self.lowest, self.value) if math.isfinite(self.value) else self.lowest
        return self.value

    def diverged(self, factor: float | None) -> bool:
        """Return whether the average is not finite, or above `factor` times its lowest."""
        return not math.isfinite(self.value) or (factor is not None and self.value > factor * self.lowest)


@dataclass(frozen=True)
class Suggestion:
    """The learning rate that a range test suggests, or None, with the reason in one line."""

    rate: float | None
    reason: str
    lowest: float | None = None
    """The rate at which the smoothed loss was lowest."""
    steepest: float | None = None
    """The rate at which it fell fastest."""


@dataclass(frozen=True)
class RangeCurve:
    """The learning rate, the loss and the smoothed loss of each step of a range test."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def read(cls, run: RunDirectory) -> RangeCurve:
        """Return the recorded steps of a run. Raises OSError."""
        columns = Series.read(run).columns
        return cls(tuple(columns["learning_rate"]), tuple(columns["loss"]))

    @property
    def smoothed(self) -> tuple[float, ...]:
        """Return the moving average after each step."""
        average = SmoothedLoss()
        return tuple(average.add(loss) for loss in self.losses)

    def suggest(self, num_steps: int) -> Suggestion:
        """Return a tenth of the rate at which the smoothed loss is lowest (fastai's `minimum`), if the loss fell
        by more than its noise.

        num_steps: of the whole test. Its first tenth is left out, as in fastai, because the average there is of
        too few losses.
        """
        smoothed = self.smoothed
        last = next((at for at, one in enumerate(smoothed) if not math.isfinite(one)), len(smoothed))
        first = num_steps // 10
        if last - first < _FEWEST:
            why = (
                f" before the loss was not finite, at {self.rates[last]:.2g}" if last < len(smoothed) else ""
            )
            reason = f"{last} points{why}, of which the first {first} do not count, are too few"
            return Suggestion(None, f"{reason}: begin lower (--from), or take more steps (--steps)")
        lowest = min(range(first, last), key=smoothed.__getitem__)
        fall, noise = smoothed[first] - smoothed[lowest], self._noise(first, lowest)
        if fall <= max(noise, _SMALLEST_FALL * abs(smoothed[first])):
            reason = (
                f"the loss never fell: the smoothed loss was {smoothed[first]:.4g} at {self.rates[first]:.2g}"
            )
            reason += f" and {smoothed[lowest]:.4g} at its lowest, no more than chance may do"
            return Suggestion(None, f"{reason}; begin lower (--from), or take more steps (--steps)")
        steepest = self.rates[_steepest(smoothed, first, lowest)]
        at, rate = self.rates[lowest], self.rates[lowest] / 10
        reason = (
            f"a tenth of {at:.2g}, where the smoothed loss is lowest ({smoothed[lowest]:.4g}, after "
            f"{smoothed[first]:.4g}); it falls fastest at {steepest:.2g}"
        )
        if lowest == len(smoothed) - 1:
            reason += f"; it still fell at the end, {at:.2g}: test higher rates (--to)"
        if rate < self.rates[0]:
            reason += f"; the test began above it, at {self.rates[0]:.2g}: begin lower (--from)"
        return Suggestion(rate, reason, at, steepest)

    def _noise(self, first: int, lowest: int) -> float:
        """Return the largest difference of two smoothed losses that noise alone explains. The deviation of
        single losses is that of the differences of successive losses, divided by the root of 2."""
        differences = [
            abs(self.losses[at + 1] - self.losses[at]) for at in range(max(lowest, first + _FEWEST) - 1)
        ]
        deviation = _NORMAL * statistics.median(differences) / math.sqrt(2)
        return _STANDARD_ERRORS * deviation * math.sqrt(_variance(first + 1) + _variance(lowest + 1))


def _variance(number: int) -> float:
    """Return the variance of the moving average of `number` values of variance 1."""
    weights = (1 - BETA) / (1 - BETA**number)
    return weights**2 * (1 - BETA ** (2 * number)) / (1 - BETA**2)


def _steepest(smoothed: Sequence[float], first: int, lowest: int) -> int:
    """Return the index at which the smoothed loss falls fastest over the logarithm of the rate (in equal steps),
    before its lowest point; by central differences, as in NumPy's `gradient`."""
    inner = range(max(first, 1), lowest)
    return min(inner, key=lambda at: smoothed[at + 1] - smoothed[at - 1], default=lowest)
