"""The run of a learning-rate range test: the job with a growing learning rate, and nothing saved."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.job.training import Training
from launcher.launch.plan_file import read_plan
from launcher.launch.run_setup import free_directory, is_free, load_job, open_run
from launcher.planner.memory.profiles import CACHED, Profiles
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, runs_folder

FEWEST_STEPS = 20
_LONGEST_NAME = 100
_SUFFIX = "-lr-find"
_PLAIN = (
    "data.evaluation=null",
    "training.evaluate_every=null",
    "training.early_stopping=null",
    "training.epochs=null",
    "training.schedule=range-test",
    "training.warmup=0",
    "training.on_spike.action=ignore",
    "training.ema=null",
    "model.unfreeze=[]",
    "checkpoint.keep_best=0",
    "trackers=[]",
)
"""The overrides that make a job a plain test: no evaluation, nothing saved, and only the weights that train
first."""
_OF_SCHEDULES = ("decay", "decay_shape", "restarts", "power", "start_division")


@dataclass(frozen=True)
class Span:
    """The learning rates of a range test: from the lowest to the highest in `num_steps` steps, or until the
    smoothed loss is `stop_factor` times its lowest."""

    lowest: float = 1e-7
    highest: float = 1.0
    num_steps: int = 100
    stop_factor: float | None = 4.0

    def check(self) -> None:
        """Raise ConfigurationError with every invalid value."""
        problems = []
        for option, value in (("--from", self.lowest), ("--to", self.highest)):
            if not (math.isfinite(value) and value > 0):
                problems.append(Problem(option, value, "a learning rate is a number above 0"))
        if not problems and self.lowest >= self.highest:
            reason = (
                f"the rate grows, and --from is {self.lowest:g}; write a higher one, as {10 * self.lowest:g}"
            )
            problems.append(Problem("--to", self.highest, reason))
        if self.num_steps < FEWEST_STEPS:
            reason = f"too few to see a curve in their losses; write {FEWEST_STEPS} or more"
            problems.append(Problem("--steps", self.num_steps, reason))
        if self.stop_factor is not None and not (math.isfinite(self.stop_factor) and self.stop_factor > 1):
            reason = "times the lowest smoothed loss; write a number above 1, as 4, or --no-stop"
            problems.append(Problem("--stop-factor", self.stop_factor, reason))
        if problems:
            raise ConfigurationError(problems)

    def overrides(self, job: Job) -> list[str]:
        """Return the overrides that turn a job into its range test. Rates of groups keep their ratio to
        `training.learning_rate`. Raises ConfigurationError if the job cannot have such rates."""
        training = job.training
        own = [one.learning_rate for one in training.groups if one.learning_rate is not None]
        largest = max(1.0, *(rate / training.learning_rate for rate in own), 0.0)
        near = training.l2_sp
        if near is not None and near.fisher is None and near.alpha * self.highest * largest > 1:
            reason = (
                f"with training.l2_sp.alpha ({near.alpha:g}) a step would go beyond the start; write "
                f"{1 / (near.alpha * largest):g} or less"
            )
            raise ConfigurationError(Problem("--to", self.highest, reason))
        times = self.highest / training.learning_rate
        groups = [
            one.model_dump(mode="json", exclude_none=True)
            | ({"learning_rate": one.learning_rate * times} if one.learning_rate is not None else {})
            for one in training.groups
        ]
        return [
            f"name={job.name[: _LONGEST_NAME - len(_SUFFIX)]}{_SUFFIX}",
            *_PLAIN,
            *(f"training.{key}={json.dumps(Training.model_fields[key].default)}" for key in _OF_SCHEDULES),
            f"training.max_steps={self.num_steps}",
            f"training.learning_rate={self.highest!r}",
            f"training.minimum_learning_rate={self.lowest!r}",
            f"training.stop_factor={json.dumps(self.stop_factor)}",
            f"training.groups={json.dumps(groups)}",
        ]


def open_test(
    job_file: Path,
    overrides: list[str],
    nproc: int | None,
    directory: Path | None,
    span: Span,
    profiles: Profiles = CACHED,
) -> tuple[RunDirectory, Plan]:
    """Create the run of a job's range test, in `directory` or the first free one of runs/NAME-lr-find,
    runs/NAME-lr-find-2, ...

    Raises what `open_run` raises, and ConfigurationError if the directory is not empty.
    """
    span.check()
    job = load_job(job_file, overrides, None)
    if directory is None:
        directory = free_directory(runs_folder() / f"{job.name}{_SUFFIX}")
    elif not is_free(directory):
        reason = "holds something already, and each test has a directory of its own; name a new one"
        raise ConfigurationError(Problem("--run-dir", str(directory), reason))
    return open_run(job_file, [*overrides, *span.overrides(job)], nproc, directory, profiles=profiles)


def find_test(path: Path) -> tuple[RunDirectory, Plan]:
    """Return the range test in a directory. Raises ConfigurationError if there is none."""
    run = RunDirectory.find(path)
    plan = read_plan(run)
    if not plan.training.is_range_test:
        reason = "is a run and no range test; name the job file that it was begun with"
        raise ConfigurationError(Problem("JOB|RUN", str(path), reason))
    return run, plan
