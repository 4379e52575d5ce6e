"""The model to evaluate or predict with: a run's, or one in a directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import distributed

from launcher import tasks
from launcher.errors import CheckpointError, ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.planner.model.model_support import Way
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals
from launcher.tasks.task import Task
from launcher.training import engines
from launcher.training.averaging import read_from_average
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.engines.engine import Engine
from launcher.training.model import pretrained
from launcher.training.model.model_files import EVALUATION, is_weights


@dataclass(frozen=True)
class Subject:
    """A model with its config, tokenizer and task. The task's `configure` must update the config before
    `build`."""

    plan: Plan
    config: Any
    tokenizer: Any
    task: Task

    @classmethod
    def of(cls, plan: Plan, run: Path | None, model: str | None) -> Subject:
        """Return the model in the directory `model`, if it is given; else the job's initial model, with the
        classes of the run.

        Without a run, the classes are those that the job would train for. No teacher is used. Raises
        ConfigurationError.
        """
        plan = plan.model_copy(update={"distillation": None})
        planned = pretrained.settled(plan if model is None else plan.of_directory(model))
        config = pretrained.read_config(planned)
        task = tasks.build(planned, tokenizer := _tokenizer(planned, plan, model))
        if run is not None and (run / "model" / "config.json").is_file():
            task.adopt(pretrained.read_config(planned.of_directory(str(run / "model"))), as_it_stands=True)
        else:
            task.adopt(config, as_it_stands=model is not None)
        subject = cls(planned, config, tokenizer, task)
        if model is not None and (file := Path(model) / EVALUATION).is_file():
            subject.adopt(file)
        return subject

    def build(self, scratch: RunDirectory) -> Engine:
        """Return the plan's engine with the model loaded. Called by all ranks together."""
        ds_config = read_json(scratch.rendered / "ds_config.json") if self.plan.engine == "deepspeed" else {}
        return engines.build(self.plan, self.task, self.config, ds_config, trains=False)

    def load(self, run: Path, engine: Engine, step: int | None) -> int:
        """Load the run's newest complete checkpoint, or that of `step`, into the engine. Return its step. Called
        by all ranks together.

        Raises ConfigurationError if there is none, and CheckpointError if it is damaged.
        """
        results = RunDirectory(run)
        ranks = distributed.get_rank(), distributed.get_world_size()
        tensors = read_from_average(engine.state_dict(), engine, self.plan)
        progress = Checkpointer(results, self.plan, *ranks).open(read_only=True).load(tensors, step)
        if progress is None:
            raise ConfigurationError(Problem("RUN", str(run), "has no checkpoint yet"))
        engine.after_load()
        if (file := results.newest_evaluation(progress.step)) is not None:
            self.adopt(file)
        return progress.step

    def identity(self, run: Path | None, model: str | None, step: int | None) -> dict[str, Any]:
        """Return values that identify this model, under readable names."""
        if run is not None:
            return {"the run": RunDirectory(run).run_id(), "the checkpoint's step": step}
        telling = ("config.json", EVALUATION)
        weights = [
            path for path in sorted(Path(str(model)).iterdir()) if is_weights(path) or path.name in telling
        ]
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
        return {"the model's files": xxhash.xxh3_64_hexdigest(json.dumps(files).encode())}

    def adopt(self, file: Path) -> None:
        """Adopt the values that an evaluation of this model fitted, and do not fit again. Raises CheckpointError
        if the file is damaged."""
        try:
            self.task.adopt_evaluation(dict(read_json(file)["details"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = "holds what was fitted on the held-out rows, and cannot be read"
            raise CheckpointError(f"{file} {reason} ({error}); remove it to go without") from None
        self.task.keeps_fitted = True


def as_trained(plan: Plan, run: Path | None) -> Plan:
    """Return the plan with the run's actual layout of samples, if its check after loading chose another than
    planned."""
    taken = (
        Totals(RunDirectory(run)).refresh().last.get("layout", {}).get("taken") if run is not None else None
    )
    return plan.model_copy(update=Way(*taken.split())._asdict()) if taken else plan


def _tokenizer(plan: Plan, job: Plan, model: str | None) -> Any:
    try:
        return pretrained.read_processor(plan)
    except ConfigurationError:
        # A directory with only weights: use the tokenizer of the job's model.
        if model is None:
            raise
        return pretrained.read_processor(job)
