"""Evaluate a run or a model on this machine, supervised like an attempt of a run."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem, by_failure_class
from launcher.job.load import load
from launcher.planning.decide import plan as decide
from launcher.planning.plan import Plan
from launcher.runs import failure as failures
from launcher.runs import prepared
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.scheduling import local
from launcher.scheduling.supervisor import Watcher


@dataclass(frozen=True)
class Request:
    """What to measure: a run's checkpoint, or a model's directory, with the plan that says by what data."""

    plan: Plan
    run: Path | None
    model: str | None
    step: int | None

    @classmethod
    def of(cls, target: str, job: Path | None, step: int | None, num_ranks: int | None, overrides: list[str]) -> Request:
        """From the command line. Raises ConfigurationError where the target is neither a run nor a model with a job."""
        if job is None:
            run = RunDirectory.find(target)
            if Plan.read(run.plan_file).script:
                raise ConfigurationError(Problem("RUN", target, "runs a script of its own, which alone knows how to measure its model"))
            return cls(decide(load(run.job_file, overrides), num_ranks), run.path, None, step)
        if not (Path(target) / "config.json").is_file():
            raise ConfigurationError(Problem("MODEL", target, "no config.json there; with --job it must be a directory with a model"))
        if step is not None:
            raise ConfigurationError(Problem("--checkpoint", step, "a model has no checkpoints; leave it out, or name a run"))
        return cls(decide(load(job, overrides), num_ranks), None, str(Path(target).resolve()), None)


def evaluate_locally(request: Request, watcher: Watcher) -> dict[str, Any]:
    """{"before": metrics, "after": metrics}. Raises the failure's own class where the ranks failed."""
    with tempfile.TemporaryDirectory(prefix="launcher-evaluate-") as directory:
        scratch = RunDirectory(Path(directory))
        write_atomically(scratch.plan_file, request.plan.to_json())
        asked = {"run": None if request.run is None else str(request.run), "model": request.model, "step": request.step}
        write_atomically(scratch.path / "request.json", json.dumps(asked))
        code = local.run(scratch, request.plan, watcher, entry="launcher.training.measure")
        if code != 0:
            _raise(scratch, code)
        for record in read(scratch.events_file):
            for said in prepared.lines(record):
                watcher.say(said)
        result: dict[str, Any] = json.loads((scratch.path / "evaluation.json").read_text(encoding="utf-8"))
        return result


def _raise(scratch: RunDirectory, code: int) -> None:
    failure = failures.read(scratch.attempt(scratch.last_attempt()) / "failure.json")
    if failure is None:
        raise KeyboardInterrupt
    raise by_failure_class(failure.failure_class)(f"rank {failure.rank}: {failure.cause}")
