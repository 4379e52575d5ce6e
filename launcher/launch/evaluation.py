"""Evaluation of a run or a model on this machine, supervised like an attempt."""

from __future__ import annotations

import glob
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem, StorageError
from launcher.job.load import load
from launcher.job.paths import nearest_file
from launcher.job.schema import Job
from launcher.launch.scratch import ask
from launcher.launch.screen import Watcher
from launcher.planner.evaluation import plan_evaluation
from launcher.planner.fisher import plan_fisher
from launcher.planner.memory.profiles import Profiles
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.runs.layout import RunDirectory, make_directory, write_atomically
from launcher.runs.wording import finite


@dataclass(frozen=True)
class Request:
    """The model to evaluate (a run's checkpoint or a model directory), and the plan that names the data."""

    plan: Plan
    run: Path | None
    model: str | None
    step: int | None
    on: Path | None = None
    """The file that replaces the job's own held-out rows."""

    @classmethod
    def of(
        cls, target: str, job: Path | None, step: int | None, num_ranks: int | None, overrides: list[str]
    ) -> Request:
        """Return the request of a command line. Raises ConfigurationError if the target is neither a run nor a
        model with a job, or if the run trains by a script."""
        if job is None:
            run = RunDirectory.find(target)
            if Plan.read(run.plan_file).script:
                reason = "runs a script of its own, which alone knows how to measure its model"
                raise ConfigurationError(Problem("RUN", target, reason))
            return cls(_plan(_load(run.job_file, overrides), num_ranks), run.path, None, step)
        if not (Path(target) / "config.json").is_file():
            reason = "no config.json there; with --job it must be a directory with a model"
            raise ConfigurationError(Problem("MODEL", target, reason))
        if step is not None:
            raise ConfigurationError(
                Problem("--checkpoint", step, "a model has no checkpoints; leave it out, or name a run")
            )
        return cls(_plan(_load(job, overrides), num_ranks), None, str(Path(target).resolve()), None)

    def measured_on(self, other: Path) -> Request:
        """Return the same request for another file with the same columns, or another job's held-out rows.

        Raises ConfigurationError if there is no such file, or if that job has no held-out rows or another task.
        """
        data = self.plan.data
        if not other.exists() and not glob.has_magic(str(other)):
            raise ConfigurationError(Problem("--on", str(other), f"no such file{nearest_file(other)}"))
        if other.suffix in (".yaml", ".yml"):
            job = _load(other, [])
            if job.model.task != self.plan.task:
                reason = f"is a job of {job.model.task}, and what is measured does {self.plan.task}"
                raise ConfigurationError(Problem("--on", str(other), reason))
            theirs = _plan(job, self.plan.mesh.world_size)
            if theirs.data.evaluation is None:
                raise ConfigurationError(
                    Problem("--on", str(other), "names no held-out rows (data.evaluation)")
                )
            data = theirs.data
        else:
            data = data.model_copy(update={"evaluation": type(data.train)(path=str(other.absolute()))})
        return Request(self.plan.model_copy(update={"data": data}), self.run, self.model, self.step, other)

    def planned(self, *directories: str | None, predicts: bool = False, writes_logits: bool = False) -> Plan:
        """Return the plan for evaluating, predicting with, or writing the logits of the models in these
        directories (None: the job's own), and print the memory that they need. Raises OutOfMemoryError."""
        plan, line = plan_evaluation(self.plan, directories, Profiles(starts=True), predicts, writes_logits)
        if line:
            Watcher().say(line)  # also where the ranks' display is a quiet one
        return plan

    @property
    def asked(self) -> dict[str, Any]:
        """Return the part of the request that the ranks read."""
        return {"run": None if self.run is None else str(self.run), "model": self.model, "step": self.step}


def _load(job_file: Path, overrides: list[str]) -> Job:
    """Return a job for evaluation: without its teacher, which evaluation does not use and may be gone."""
    return load(job_file, [*overrides, "distillation=null"])


def _plan(job: Job, num_ranks: int | None) -> Plan:
    return plan_job(job, num_ranks, profiles=Profiles(starts=True))


def evaluate_locally(request: Request, watcher: Watcher, resamples: int = 0) -> dict[str, Any]:
    """Return {"before": metrics, "after": metrics, ...}, also written below the run.

    `resamples`: how often rows are resampled for confidence intervals, with the job's seed; 0 for none. Raises
    ConfigurationError if there are no held-out rows, OutOfMemoryError if not even one row fits, and the
    failure's own class if the ranks failed.
    """
    plan = request.plan
    if plan.data.evaluation is None:
        reason = "the job names no held-out rows; write --on FILE, or --set data.evaluation.path=FILE"
        raise ConfigurationError(Problem("data.evaluation", None, reason))
    # The model that the job starts from is evaluated too.
    plan = request.planned(None, *([request.model] if request.model else []))
    wanted = request.asked | {"resamples": resamples, "seed": plan.training.seed}
    result = ask(plan, "launcher.training.evaluate_entry", wanted, "evaluation.json", watcher)
    result |= {"on": request.on and str(request.on), "engine": plan.engine, "precision": plan.precision}
    result |= {"ranks": plan.mesh.world_size, "time": round(time.time(), 3)}
    if request.run is not None:
        result["file"] = str(_keep(request, request.run, result))
    return result


def estimate_fisher(request: Request, watcher: Watcher, num_rows: int) -> dict[str, Any]:
    """Estimate a model's Fisher information from `num_rows` samples, and write it into RUN/evaluations or
    MODEL/fisher. Returns {"file": path, "step", "rows", "parameters"}.

    Raises ConfigurationError for a run that trains an adapter or streams its rows, OutOfMemoryError if it
    cannot fit, and the failure's own class if the ranks failed.
    """
    plan = request.plan
    if request.run is not None and plan.model.adapter is not None:
        reason = (
            "trains an adapter, and its model's own weights stay as they were; write both as one model by "
            f"launcher export {request.run} --out DIRECTORY, and name DIRECTORY as model.name of a job for --job"
        )
        raise ConfigurationError(Problem("--fisher", str(request.run), reason))
    if plan.data.streaming:
        reason = "rows are drawn from all, and streamed ones are not known: --set data.streaming=false"
        raise ConfigurationError(Problem("--fisher", "data.streaming", reason))
    suffix = "" if request.on is None else f"-{file_name_of(request.on)}"
    if request.run is not None:
        file = request.run / "evaluations" / f"fisher-step-STEP{suffix}.safetensors"
    else:
        assert request.model is not None
        # Not next to the weights, where other tools would take it for a part of them.
        file = Path(request.model) / "fisher" / f"{suffix[1:] or plan.name}.safetensors"
    # Planned for the model that is measured, as if all its weights were trained.
    of = plan if request.model is None else plan.of_directory(request.model)
    taken = plan_fisher(of, Profiles(starts=True))
    plan = taken.model_copy(update={"model": plan.model})
    wanted = request.asked | {"rows": num_rows, "file": str(file)}
    return ask(plan, "launcher.training.fisher_entry", wanted, "fisher.json", watcher)


def file_name_of(on: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", on.stem)[:80]


def _keep(request: Request, run: Path, result: dict[str, Any]) -> Path:
    """Write the result into the run, over an earlier one of the same step on the same rows."""
    name = f"evaluate-step-{result['step']:08d}"
    if request.on is not None:
        name += f"-{file_name_of(request.on)}"
    path = run / "evaluations" / f"{name}.json"
    try:
        make_directory(path.parent)
        write_atomically(path, json.dumps(finite(result), indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
