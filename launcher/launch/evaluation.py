"""Evaluate a run or a model on this machine, supervised like an attempt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.load import load
from launcher.launch.scratch import ask
from launcher.launch.screen import Watcher
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.runs.layout import RunDirectory


@dataclass(frozen=True)
class Request:
    """Name what to measure: a run's checkpoint, or a model's directory, with the plan that says by what
    data."""

    plan: Plan
    run: Path | None
    model: str | None
    step: int | None

    @classmethod
    def of(
        cls, target: str, job: Path | None, step: int | None, num_ranks: int | None, overrides: list[str]
    ) -> Request:
        """From the command line. Raises ConfigurationError where the target is neither a run nor a model with
        a job."""
        if job is None:
            run = RunDirectory.find(target)
            if Plan.read(run.plan_file).script:
                raise ConfigurationError(
                    Problem(
                        "RUN", target, "runs a script of its own, which alone knows how to measure its model"
                    )
                )
            return cls(plan_job(load(run.job_file, overrides), num_ranks), run.path, None, step)
        if not (Path(target) / "config.json").is_file():
            raise ConfigurationError(
                Problem(
                    "MODEL", target, "no config.json there; with --job it must be a directory with a model"
                )
            )
        if step is not None:
            raise ConfigurationError(
                Problem("--checkpoint", step, "a model has no checkpoints; leave it out, or name a run")
            )
        return cls(plan_job(load(job, overrides), num_ranks), None, str(Path(target).resolve()), None)


def evaluate_locally(request: Request, watcher: Watcher) -> dict[str, Any]:
    """{"before": metrics, "after": metrics}. Raises the failure's own class where the ranks failed."""
    content = {
        "run": None if request.run is None else str(request.run),
        "model": request.model,
        "step": request.step,
    }
    return ask(request.plan, "launcher.training.evaluate_entry", content, "evaluation.json", watcher)
