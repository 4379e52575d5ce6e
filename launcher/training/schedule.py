"""The learning rate as a pure function of the step, and the stage of gradual unfreezing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.job.schema import Training
from launcher.job.tuning import Thaw

_ONE_CYCLE_END = 1e4
"""torch.optim.lr_scheduler.OneCycleLR: final_div_factor."""
_INVERSE_SQRT_TIMESCALE = 10_000
"""transformers, get_inverse_sqrt_schedule: timescale without a warm-up."""
_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1 - math.sqrt(done),
}


def steps_of(value: float, num_steps: int) -> int:
    """Return a number of steps. A value below 1 is a share of `num_steps`, rounded up."""
    return math.ceil(value * num_steps - 1e-9) if value < 1 else int(value)


def stage_at(unfreeze: Sequence[Thaw], step: int, num_steps: int) -> int:
    """Return how many entries of `model.unfreeze` apply when step `step`, counted from 0, is taken."""
    return sum(steps_of(one.at, num_steps) <= step for one in unfreeze)


@dataclass(frozen=True)
class Schedule:
    """The warm-up, then the schedule that `training.schedule` names. Steps count from 0.

    After a linear warm-up the rates are those of transformers' schedules (optimization.py). `one-cycle` is
    torch's OneCycleLR, with a cosine warm-up but without its cycle of the momentum. `range-test` grows from the
    lowest rate at the first step to the highest at the last (Smith 2017, arXiv 1506.01186). Smith's grows
    linearly; this one grows exponentially, as in fastai, Lightning and torch-lr-finder.
    """

    training: Training
    num_warmup_steps: int
    num_steps: int

    @classmethod
    def of(cls, training: Training, num_steps: int) -> Schedule:
        """Return the schedule of a run of `num_steps`. A warm-up below 1 is a share of them, otherwise a number
        of steps."""
        return cls(training, steps_of(training.warmup, num_steps), num_steps)

    def at(self, step: int) -> float:
        """Return the learning rate of step `step`. A warm-up starts above 0, so that its first step is not
        wasted."""
        peak, minimum = self.training.learning_rate, self.training.minimum_learning_rate
        kind = self.training.schedule
        if kind == "one-cycle":
            return self._one_cycle(step)
        if kind == "range-test":
            done = min(1.0, step / max(1, self.num_steps - 1))
            return minimum ** (1 - done) * peak**done  # a geometric series with exact ends
        if step < self.num_warmup_steps:
            return peak * ((step + 1) / self.num_warmup_steps)
        if kind == "constant":
            return peak
        if kind == "inverse-sqrt":
            timescale = self.num_warmup_steps or _INVERSE_SQRT_TIMESCALE
            return peak * math.sqrt(timescale / (step + timescale - self.num_warmup_steps))
        return minimum + (peak - minimum) * self._share(kind, step)

    def _share(self, kind: str, step: int) -> float:
        """Return the remaining share, from 1 to 0, of the way from the highest rate to the lowest."""
        num_falling = self.num_steps - self.num_warmup_steps
        if kind == "warmup-stable-decay":
            num_falling = min(num_falling, steps_of(self.training.decay, self.num_steps))
            kind = self.training.decay_shape
        done = min(1.0, max(0.0, (step - self.num_steps + num_falling) / max(1, num_falling)))
        if kind == "polynomial":
            return (1 - done) ** self.training.power
        if kind == "cosine-restarts":
            return 0.0 if done >= 1 else _FALLS["cosine"](self.training.restarts * done % 1.0)
        return _FALLS[kind](done)

    def _one_cycle(self, step: int) -> float:
        """Return the rate of OneCycleLR, with the warm-up's share as `pct_start`."""
        training, warmup = self.training, self.training.warmup
        first = training.learning_rate / training.start_division
        last = training.minimum_learning_rate or first / _ONE_CYCLE_END
        risen = (warmup if warmup < 1 else warmup / self.num_steps) * self.num_steps - 1
        if step <= risen and risen > 0:
            begin, end, done = first, training.learning_rate, step / risen
        else:
            left = self.num_steps - 1 - max(0.0, risen)
            begin, end = training.learning_rate, last
            done = min(1.0, (step - max(0.0, risen)) / left) if left > 0 else 0.0
        return end + (begin - end) * _FALLS["cosine"](done)
