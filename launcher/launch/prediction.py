"""Prediction for every row of a file by a run's model or one in a directory, supervised like an attempt."""

from __future__ import annotations

import glob
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.paths import nearest_file
from launcher.launch.evaluation import Request
from launcher.launch.scratch import ask
from launcher.launch.screen import Watcher
from launcher.planner.dataset.usable_rows import why_no_columns
from launcher.runs.partial import refuse_existing
from launcher.tasks.task import AnswerOptions, Task

_LOGITS = "--logits"


def refuse_directory(output: Path) -> None:
    """Raise ConfigurationError if a new directory of logits exists already, or its parent folder does not."""
    if output.exists():
        reason = "is there already; name another directory, or remove it"
        raise ConfigurationError(Problem(_LOGITS, str(output), reason))
    if not output.absolute().parent.is_dir():
        reason = f"the folder {output.absolute().parent} is not there"
        raise ConfigurationError(Problem(_LOGITS, str(output), reason))


def refuse_missing(rows: Path) -> None:
    """Raise ConfigurationError, with the nearest name, if there is no file of rows."""
    if not rows.exists() and not glob.has_magic(str(rows)):
        raise ConfigurationError(Problem("--input", str(rows), f"no such file{nearest_file(rows)}"))


@dataclass(frozen=True)
class Logits:
    """The model whose logits of a job's training rows are written, and the directory for them."""

    request: Request
    output: Path

    def run(self, watcher: Watcher) -> dict[str, Any]:
        """Write the logits and return the summary. Raises Stopped after a stop request, OutOfMemoryError if not
        even one row fits, else the failure's own class."""
        refuse_directory(self.output)
        task, data = self.request.plan.task, self.request.plan.data
        if task not in (able := [name for name in tasks.names() if tasks.find(name).distils]):
            reason = f"nothing learns from logits of a {task} task; of {', '.join(able)} a model does"
            raise ConfigurationError(Problem(_LOGITS, str(self.output), reason))
        if self.request.model is None and tasks.virtual_tokens(self.request.plan.model):
            reason = (
                "the run trains virtual tokens, which no student has before its rows; name another teacher"
            )
            raise ConfigurationError(Problem(_LOGITS, str(self.output), reason))
        data = data.model_copy(update={"evaluation": data.train, "packing": False})
        plan = self.request.planned(self.request.model, writes_logits=True)
        plan = plan.model_copy(update={"data": data})
        wanted = self.request.asked | {"output": str(self.output.absolute())}
        summary = ask(plan, "launcher.training.logits_entry", wanted, "logits.json", watcher)
        return {"output": str(self.output), **summary, "engine": plan.engine, "ranks": plan.mesh.world_size}


@dataclass(frozen=True)
class Prediction:
    """The model, the rows it predicts for, and the file for its predictions."""

    request: Request
    rows: Path
    output: Path
    options: AnswerOptions
    with_input: bool = False
    """Whether each row's own columns are written too."""

    @property
    def columns(self) -> list[str]:
        """Return the columns that every row must have."""
        return self._task.required_columns

    @property
    def _task(self) -> Task:
        task = tasks.unprepared(self.request.plan)
        task.for_prediction = True
        return task

    def refuse_other_columns(self) -> None:
        """Raise ConfigurationError or DataError if no row that is looked at has the columns, before a model is
        loaded."""
        if self.request.plan.data.train.targets is not None:
            return  # lines of a text, whatever the file is called
        if (reason := why_no_columns(str(self.rows.absolute()), self._task)) is not None:
            raise ConfigurationError(Problem("--input", str(self.rows), reason))

    def run(self, watcher: Watcher) -> dict[str, Any]:
        """Write the predictions and return the summary. Raises Stopped after a stop request, OutOfMemoryError if
        not even one row fits, else the failure's own class."""
        refuse_existing(self.output)
        self.refuse_other_columns()
        data = self.request.plan.data
        source = type(data.train)(path=str(self.rows.absolute()))
        data = data.model_copy(update={"evaluation": source, "packing": False})
        plan = self.request.planned(self.request.model, predicts=True)
        plan = plan.model_copy(update={"data": data})
        wanted = self.request.asked | {"output": str(self.output.absolute()), "options": asdict(self.options)}
        wanted |= {"with_input": self.with_input}
        summary = ask(plan, "launcher.training.predict_entry", wanted, "prediction.json", watcher)
        summary |= {"with_input": self.with_input}
        return {"output": str(self.output), **summary, "engine": plan.engine, "ranks": plan.mesh.world_size}
