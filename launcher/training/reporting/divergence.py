"""Judgement of a step's loss and gradient norm: apply, skip, rewind or stop.

Every rank comes to the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

from launcher.errors import DivergedError
from launcher.job.schema import Training
from launcher.training.precision import LossScale
from launcher.training.reporting.spikes import Ledger, SpikeWatch

Verdict = Literal["apply", "skip", "rewind"]


class Divergence:
    """The watch over a run's loss and gradient norm. `event` writes an event once for all ranks."""

    def __init__(self, training: Training, event: Callable[..., None]) -> None:
        self._training, self._event = training, event
        self._watch = SpikeWatch(training.on_spike)
        self._num_skipped_in_a_row = 0
        self.ledger = Ledger()
        self._reason = ""
        self._first_bad_step = 0

    @property
    def rewinds(self) -> bool:
        """Return whether the job rewinds, so that it must keep checkpoints to rewind to."""
        return self._training.on_spike.action == "rewind"

    @property
    def suspicious(self) -> bool:
        """Return whether the last losses stand out and may become a spike: then the state is not kept for a
        rewind."""
        return self.rewinds and bool(self._watch.above or self._num_skipped_in_a_row)

    @property
    def skipping(self) -> bool:
        """Return whether the last step was skipped for a non-finite number that was no fp16 overflow."""
        return self._num_skipped_in_a_row > 0

    def judge(self, step: int, loss: float, gradient_norm: float, scale: LossScale) -> Verdict:
        """Return the verdict on the numbers of `step`, counted from 1. Raises DivergedError if the run cannot
        continue."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._num_skipped_in_a_row = 0
            scale.good()
            return self._spiked(step, loss)
        if math.isfinite(loss) and scale.overflow():
            return "skip"
        return self._not_finite(step, "loss" if not math.isfinite(loss) else "gradient norm")

    def _spiked(self, step: int, loss: float) -> Verdict:
        limit = self._watch.limit
        if not self._watch.lasts(loss):
            return "apply"
        above, median = self._watch.above, self._watch.median
        reason = (
            f"the loss stayed above {limit:.4g} for {len(above)} steps in a row, up to {max(above):.4g}; "
            f"its median was {median:.4g}"
        )
        return self._bad(step, len(above), reason)

    def _not_finite(self, step: int, what: str) -> Verdict:
        self._num_skipped_in_a_row += 1
        reason = f"{what} is not finite"
        self._event("skipped", step=step, reason=reason, in_a_row=self._num_skipped_in_a_row)
        self.ledger.skip(step, reason)
        if self._num_skipped_in_a_row <= self._training.skip_nonfinite or self._training.is_range_test:
            return "skip"
        reason = f"the {what} was not finite in {self._num_skipped_in_a_row} steps in a row up to step {step}"
        return self._bad(step, self._num_skipped_in_a_row, reason)

    def _bad(self, step: int, count: int, reason: str) -> Verdict:
        """Return the verdict on a spike, or on too many non-finite steps: the last `count` steps until
        `step`."""
        policy, self._reason, self._first_bad_step = self._training.on_spike, reason, step - count + 1
        if self.rewinds and self.ledger.num_rewinds < policy.times:
            return "rewind"
        if not self.rewinds and not self._num_skipped_in_a_row:
            self._event(
                "symptom",
                kind="spike",
                step=step,
                text=f"{reason}; training.on_spike can have the run go back",
            )
            self._watch.begin_anew()
            return "apply"
        tried = f", after {self.ledger.num_rewinds} rewinds" if self.rewinds else ""
        rate = (
            f"lower training.learning_rate ({self._training.learning_rate:g}) or look at the rows of the "
            "last steps"
        )
        raise DivergedError(f"{reason}{tried}; {rate}")

    def checkpoints_before(self) -> Iterator[int]:
        """Yield the newest steps whose checkpoint may serve for a rewind, the better one first.

        A loss belongs to the weights before its step, so the update of the step before the first bad one may
        have caused it. If no step was good since the last rewind, the checkpoint of that rewind was not good
        enough either.
        """
        last = self.ledger.last_rewind
        again = last is not None and last["last"] == self._first_bad_step - 1
        yield last["checkpoint"] - 1 if last is not None and again else self._first_bad_step - 2
        yield self._first_bad_step - 1

    def rewound(self, checkpoint: int, step: int) -> None:
        """Record that the weights are those of `checkpoint` again, and the steps up to `step` are left
        out."""
        self.ledger.rewind(checkpoint, step, self._reason)
        self._event(
            "rewound",
            step=step,
            checkpoint_step=checkpoint,
            reason=self._reason,
            times=self.ledger.num_rewinds,
        )
        self._watch.above.clear()
        self._num_skipped_in_a_row = 0

    def nowhere_to_go(self) -> DivergedError:
        """Return the error for a run without a complete earlier checkpoint."""
        return DivergedError(f"{self._reason}; there is no whole checkpoint of a step before to go back to")

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        watched = {"losses": list(self._watch.losses), "above": list(self._watch.above)}
        return {
            "num_skipped_in_a_row": self._num_skipped_in_a_row,
            "ledger": self.ledger.entries,
            "watched": watched,
        }

    def restore(self, extra: dict[str, Any]) -> None:
        """Resume from a checkpoint's state."""
        self._num_skipped_in_a_row = extra.get("num_skipped_in_a_row", 0)
        self.ledger.entries = list(extra.get("ledger", []))
        watched = extra.get("watched", {})
        self._watch.losses.extend(watched.get("losses", []))
        self._watch.above = list(watched.get("above", []))
