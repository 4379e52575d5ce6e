"""Evaluation of a run on its held-out rows, and predictions for the rows that are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.engines.engine import Engine
from launcher.training.evaluation import Interrupted, Report, evaluate
from launcher.training.inputs import TrainingInputs, phase_report
from launcher.training.samples import Shown
from launcher.training.signals import StopRequest


class HeldOut:
    """The held-out rows of a run, on one rank. All ranks call every method together.

    `agree` returns whether any rank votes True.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        inputs: TrainingInputs,
        engine: Engine,
        stop: StopRequest,
        agree: Callable[[bool], bool],
    ) -> None:
        self._run, self._plan, self._inputs, self._engine = run, plan, inputs, engine
        self._stop, self._agree = stop, agree
        self._rank = distributed.get_rank()
        self._shown = Shown.of(inputs.task, inputs.evaluation, plan, self._rank)

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]] | None:
        """Return metrics and details that are no numbers; empty without held-out rows, None after a stop."""
        rows, task, stop = self._inputs.evaluation, self._inputs.task, self._stop
        details: dict[str, Any] = {}
        if rows is None:
            return {}, details
        report: Report = lambda done, total: None  # noqa: E731
        if self._rank == 0:
            report = phase_report(self._run, "evaluating", "batches")
        try:
            metrics = evaluate(
                self._engine,
                task,
                rows,
                self._plan,
                report,
                lambda: self._agree(stop.requested),
                lambda: stop.requested,
                details.update,
            )
        except Interrupted:
            return None
        task.adopt_evaluation(details)
        return metrics, details

    def answers(self) -> list[dict[str, Any]]:
        """Return the model's predictions for the shown rows; none if a stop was requested meanwhile."""
        if self._shown is None:
            return []
        task, stop = self._inputs.task, self._stop
        answers = self._shown.answers(self._engine, task, self._plan, lambda: stop.requested)
        return [] if task.generates and self._agree(stop.requested) else answers
