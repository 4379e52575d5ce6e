"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.job.schema import Training


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then the fall that `kind` names. Steps count from 0."""

    kind: str
    peak: float
    minimum: float
    num_warmup_steps: int
    num_steps: int

    @classmethod
    def of(cls, training: Training, num_steps: int) -> Schedule:
        """The schedule of a run of `num_steps`; a warm-up below 1 is a share of them, from 1 on a number of
        steps."""
        warmup = training.warmup
        num_warmup_steps = math.ceil(warmup * num_steps - 1e-9) if warmup < 1 else int(warmup)
        return cls(
            training.schedule,
            training.learning_rate,
            training.minimum_learning_rate,
            num_warmup_steps,
            num_steps,
        )

    def at(self, step: int) -> float:
        """The learning rate of step `step`. The first step of a warm-up is already above 0, so that no step
        is wasted."""
        if step < self.num_warmup_steps:
            return self.peak * ((step + 1) / self.num_warmup_steps)
        if self.kind == "constant":
            return self.peak
        if self.kind == "inverse-sqrt":
            return self.peak * math.sqrt(
                max(1, self.num_warmup_steps) / (step + 1 if self.num_warmup_steps == 0 else step)
            )
        done = min(1.0, (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps))
        share = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.minimum + (self.peak - self.minimum) * share
