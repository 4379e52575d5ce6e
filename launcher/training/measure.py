"""Measure a model as it was and as it is, on all ranks: what `launcher evaluate` starts.

It runs in a scratch run directory with a plan and a request, so that it is supervised like any other attempt.
"""

from __future__ import annotations

import functools
import gc
import json
import os
from pathlib import Path
from typing import Any

from torch import distributed

from launcher.errors import ConfigurationError, Problem
from launcher.planning.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.training import entry, tasks
from launcher.training import model as models
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.data.prepare import prepare, refuse_mostly_dropped
from launcher.training.devices import start_process_group
from launcher.training.engines.fsdp import FsdpEngine
from launcher.training.evaluation import evaluate
from launcher.training.loss_check import check_loss
from launcher.training.signals import StopRequest
from launcher.training.trainer import phase_report


def measure(scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None) -> None:
    """Evaluate what request.json names and write evaluation.json: {"before": {metric: value}, "after": {metric: value}}."""
    request = json.loads((scratch.path / "request.json").read_text(encoding="utf-8"))
    plan = models.settled(plan)
    tokenizer = models.read_tokenizer(plan)
    task = tasks.build(plan, tokenizer)
    if plan.data.evaluation is None:
        raise ConfigurationError(Problem("data.evaluation", None, "nothing to measure on; name held-out rows in the job file"))
    dataset = prepare(plan.data.evaluation, "evaluation", plan, task, tokenizer, phase_report(scratch, "preparing", "rows"))
    refuse_mostly_dropped(dataset.report, plan)
    if os.environ.get("RANK", "0") == "0":
        events.event(scratch.events_file, "prepared", **dataset.report.to_dict())
    start_process_group(plan)
    result = {}
    for name in ("before", "after"):
        changed = plan.model_copy(update={"model": plan.model.model_copy(update={"name": request["model"]})})
        measured = changed if name == "after" and request["model"] else plan
        config = models.read_config(measured)
        task.configure(config)
        engine = FsdpEngine(measured, task, config, trains=False)
        check_loss(engine, task, dataset, measured, functools.partial(_event, scratch))
        if name == "after" and request["run"]:
            _load(Path(request["run"]), plan, engine, request["step"])
        report = phase_report(scratch, "evaluating", "batches") if distributed.get_rank() == 0 else _silent
        result[name] = evaluate(engine, task, dataset, measured, report)
        del engine
        gc.collect()
    if distributed.get_rank() == 0:
        write_atomically(scratch.path / "evaluation.json", json.dumps(result) + "\n")
        events.event(scratch.events_file, "finished", step=0, metrics=result["after"])
    distributed.barrier()


def _load(run: Path, plan: Plan, engine: FsdpEngine, step: int | None) -> None:
    checkpointer = Checkpointer(RunDirectory(run), plan, distributed.get_rank(), distributed.get_world_size(), read_only=True)
    if checkpointer.load(engine.tensors(), step) is None:
        raise ConfigurationError(Problem("RUN", str(run), "has no checkpoint yet"))
    engine.loaded()


def _event(scratch: RunDirectory, name: str, **fields: Any) -> None:
    if distributed.get_rank() == 0:
        events.event(scratch.events_file, name, **fields)


def _silent(done: int, total: int) -> Any:
    return None


if __name__ == "__main__":
    entry.main(train=measure)
