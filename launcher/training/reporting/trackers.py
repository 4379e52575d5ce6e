"""Logging of a run's numbers to trackers, under the usual names; no tracker can stop training.

The trackers are Accelerate's. This module sets how each starts, so that all attempts of a run, also requeued
ones, are one run there.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from launcher.job.schema import Tracking
from launcher.planner.plan import Plan
from launcher.redaction import redact_all
from launcher.runs.layout import RunDirectory

STEP = "train/global_step"
"""The x axis of all charts in W&B. Its own steps never go back, but a run resumed from a checkpoint does."""
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "trackio": "TRACKIO_PROJECT",
}
_DEFAULT_PROJECT = "launcher"
_RUN_ID_TAG = "launcher.run_id"
_NO_SETTINGS = {"decisions", "refused", "format", "tracking"}

logger = logging.getLogger(__name__)


class Trackers:
    """The plan's trackers, on rank 0. A tracker that fails is dropped with a warning."""

    def __init__(self, run: RunDirectory, plan: Plan, step: int) -> None:
        """Start the trackers, or resume this run in them, after `step` steps."""
        self._trackers: list[GeneralTracker] = []
        if plan.trackers:
            PartialState()  # without it Accelerate's trackers fail at their first log line
        for name in plan.trackers:
            self._safely(name, functools.partial(self._start, name, run, plan, step))

    def log(self, values: dict[str, float | int | str], step: int) -> None:
        """Log numbers, or texts, of a step to every tracker."""
        for tracker in list(self._trackers):
            if not self._safely(tracker.name, functools.partial(_log, tracker, values, step)):
                self._trackers.remove(tracker)

    def finish(self) -> None:
        """Flush every tracker."""
        for tracker in self._trackers:
            self._safely(tracker.name, tracker.finish)

    def _start(self, name: str, run: RunDirectory, plan: Plan, step: int) -> None:
        tracker = _STARTS[name](LOGGER_TYPE_TO_CLASS[name], run, plan, step)
        self._trackers.append(tracker)

    @staticmethod
    def _safely(name: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a metrics backend raises must not stop training
            logger.warning("tracker %s failed and is left out from here on: %s", name, error)
            return False
        return True


def settings(run: RunDirectory, plan: Plan) -> dict[str, Any]:
    """Return the hyper-parameters, by key: the plan without secrets, and the run's path."""
    flat = plan.flat(_NO_SETTINGS) | {"run_id": run.run_id(), "run_directory": str(run.path)}
    return {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in redact_all(flat).items()
    }


def _log(tracker: GeneralTracker, values: dict[str, float | int | str], step: int) -> None:
    if tracker.name == "wandb":
        tracker.log({**values, STEP: step})
        return
    if tracker.name == "mlflow":  # it accepts numbers only
        values = {key: value for key, value in values.items() if not isinstance(value, str)}
    if values:
        tracker.log(values, step=step)


def _project(plan: Plan, name: str) -> str:
    """Return the project: the job's, that of the tracker's own variable, or launcher's."""
    project = (plan.tracking or Tracking()).project
    return project or os.environ.get(_PROJECT_VARIABLES[name]) or _DEFAULT_PROJECT


def _tensorboard(kind: Any, run: RunDirectory, plan: Plan, step: int) -> GeneralTracker:
    from torch.utils.tensorboard.summary import hparams

    # Steps after an attempt's last checkpoint are repeated, and must not appear twice.
    purge = step + 1 if step else 0
    tracker: GeneralTracker = kind(plan.name, logging_dir=str(run.path / "trackers"), purge_step=purge)
    tracker.start()
    # Like `store_init_configuration`, but in this run and not in a separate folder per attempt.
    for summary in hparams(settings(run, plan), {"train/loss": 0, "eval/loss": 0}):
        tracker.writer.file_writer.add_summary(summary)
    return tracker


def _wandb(kind: Any, run: RunDirectory, plan: Plan, step: int) -> GeneralTracker:
    tracking = plan.tracking or Tracking()
    folder = run.path / "trackers"
    folder.mkdir(exist_ok=True)
    tracker: GeneralTracker = kind(
        _project(plan, "wandb"),
        name=plan.name,
        group=tracking.group,
        tags=tracking.tags or None,
        id=run.run_id(),
        resume="allow",
        dir=str(folder),
    )
    tracker.start()
    tracker.store_init_configuration(settings(run, plan))
    tracker.tracker.define_metric(STEP)
    tracker.tracker.define_metric("*", step_metric=STEP, step_sync=True)
    return tracker


def _trackio(kind: Any, run: RunDirectory, plan: Plan, step: int) -> GeneralTracker:
    tracker: GeneralTracker = kind(
        _project(plan, "trackio"),
        name=f"{plan.name}-{run.run_id()[:8]}",
        group=(plan.tracking or Tracking()).group,
        config=settings(run, plan),
        resume="allow",
    )
    tracker.start()
    return tracker


def _mlflow(kind: Any, run: RunDirectory, plan: Plan, step: int) -> GeneralTracker:
    import mlflow

    tracking, project = plan.tracking or Tracking(), _project(plan, "mlflow")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        (run.path / "trackers").mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{run.path / 'trackers' / 'mlflow.db'}")
    query = f"tags.`{_RUN_ID_TAG}` = '{run.run_id()}'"
    earlier = mlflow.search_runs(
        experiment_names=[project], filter_string=query, max_results=1, output_format="list"
    )
    tags = {_RUN_ID_TAG: run.run_id(), "group": tracking.group, "tags": ", ".join(tracking.tags)}
    tracker: GeneralTracker = kind(
        project,
        run_id=earlier[0].info.run_id if earlier else None,
        run_name=plan.name,
        tags={key: value for key, value in tags.items() if value},
    )
    tracker.start()
    if not earlier:  # MLflow's parameters cannot change
        tracker.store_init_configuration(settings(run, plan))
    return tracker


_STARTS: dict[str, Callable[[Any, RunDirectory, Plan, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
