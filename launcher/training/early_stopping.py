"""Reasons to end before the last step: early stopping, a losing sweep trial, a diverged range test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.runs.range_test import SmoothedLoss
from launcher.runs.successive_halving import Halving
from launcher.tasks.mixed import measured
from launcher.training.cadence import Patience


class EarlyEnd:
    """The decision, after each evaluation, whether training ends early; it is the same on all ranks.

    `agree` returns whether any rank votes True; `event` writes an event once for all ranks.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        leads: bool,
        agree: Callable[[bool], bool],
        event: Callable[..., None],
    ) -> None:
        early = plan.training.early_stopping
        self._patience = None
        if early:
            better = measured(tasks.unprepared(plan)).get(early.metric, "lower")
            self._patience = Patience(early.metric, early.patience, early.minimum_delta, better)
        self._halving = Halving.of(run)
        self._run, self._leads, self._agree, self._event = run, leads, agree, event
        self._left_behind = self._diverged = False
        self._smoothed = SmoothedLoss() if plan.training.is_range_test else None
        self._stop_factor = plan.training.stop_factor

    @property
    def reached(self) -> bool:
        """Return whether training ends now, before its last step."""
        return (
            self._left_behind or self._diverged or (self._patience is not None and self._patience.exhausted)
        )

    def judge(self, step: int, is_last: bool, metrics: dict[str, float]) -> None:
        """Decide from the evaluation after `step` whether training ends. Raises ConfigurationError for a
        metric that the task does not have."""
        self._be_patient(step, metrics)
        if self._halving is not None and step > 0 and not is_last:
            self._left_behind = self._agree(self._leads and self._halving.gives_up(self._run))
            if self._left_behind:
                self._event("halved", step=step, metric=self._halving.metric)

    def judge_loss(self, step: int, loss: float, learning_rate: float) -> None:
        """End a range test if the loss after `step` (counted from 1) has diverged.

        The loss is already summed over all ranks, so they decide alike without communication.
        """
        if self._smoothed is None:
            return
        self._smoothed.add(loss)
        if self._smoothed.diverged(self._stop_factor):
            self._diverged = True
            text = f"the loss diverged at a learning rate of {learning_rate:.2g}"
            self._event("noted", text=f"{text}: the range test ends at step {step}")

    def _be_patient(self, step: int, metrics: dict[str, float]) -> None:
        patience = self._patience
        if patience is None:
            return
        if patience.metric not in metrics:
            reason = f"is not among the metrics of this task: {', '.join(sorted(metrics))}"
            raise ConfigurationError(Problem("training.early_stopping.metric", patience.metric, reason))
        if step > 0 and patience.exhausted_by(metrics):
            self._event("early_stopping", step=step, metric=patience.metric, best=patience.best)

    def state(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"best": self._patience.best, "num_worse": self._patience.num_worse} if self._patience else {}

    def restore(self, best: float | None, num_worse: int) -> None:
        """Restore the state from a checkpoint."""
        if self._patience:
            self._patience.best, self._patience.num_worse = best, num_worse
