"""Measure a model before and after training: what `launcher evaluate` starts.

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

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Model
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.tasks.task import Task
from launcher.training import entry
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.data.dataset import Dataset
from launcher.training.data.prepare import prepare, refuse_mostly_dropped
from launcher.training.data.sources import open_source
from launcher.training.devices import start_process_group
from launcher.training.engines.fsdp import FsdpEngine
from launcher.training.evaluation import evaluate
from launcher.training.inputs import phase_report, refuse_tokens
from launcher.training.model import pretrained
from launcher.training.model.loss_check import check_loss
from launcher.training.signals import StopRequest


def measure(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Evaluate what request.json names and write evaluation.json: {"before": {metric: value}, "after":
    {metric: value}}."""
    request = read_json(scratch.path / "request.json")
    if plan.data.evaluation is None:
        raise ConfigurationError(
            Problem("data.evaluation", None, "nothing to measure on; name held-out rows in the job file")
        )
    run = Path(request["run"]) if request["run"] else None
    after = _as_it_stands(plan, request["model"]) if request["model"] else plan
    # Before the ranks know each other, who would wait in vain for whoever tokenises.
    prepared = {"before": _material(scratch, plan, plan, run), "after": _material(scratch, after, plan, run)}
    start_process_group(plan)
    result = {}
    for name, (measured, config, task, dataset) in prepared.items():
        engine = FsdpEngine(measured, task, config, trains=False)
        engine.load()
        check_loss(engine, task, dataset, measured, functools.partial(_event, scratch))
        if name == "after" and run is not None:
            _load(run, plan, engine, request["step"])
        report = phase_report(scratch, "evaluating", "batches") if distributed.get_rank() == 0 else _silent
        result[name] = evaluate(engine, task, dataset, measured, report)
        del engine
        gc.collect()
    if distributed.get_rank() == 0:
        write_atomically(scratch.path / "evaluation.json", json.dumps(result) + "\n")
        events.event(scratch.events_file, "finished", step=0, metrics=result["after"])
    distributed.barrier()


def _as_it_stands(plan: Plan, model: str) -> Plan:
    """The plan for a model's directory: what the job does to the model that it trains is done to that one
    alone."""
    planned = plan.model
    as_it_is = Model(
        name=model,
        task=planned.task,
        attention=planned.attention,
        trust_remote_code=planned.trust_remote_code,
    )
    return plan.model_copy(update={"model": as_it_is})


def _material(
    scratch: RunDirectory, plan: Plan, job: Plan, run: Path | None
) -> tuple[Plan, Any, Task, Dataset]:
    """The plan with its model's config, its task and its rows. Classes are those of the run, or of a model
    that stands for itself.

    Of the model that the job begins with they are those that it would be trained for.
    """
    source = plan.data.evaluation
    assert source is not None
    begins, plan = plan is job, pretrained.settled(plan)
    config = pretrained.read_config(plan)
    try:
        tokenizer = pretrained.read_tokenizer(plan)
    except (
        ConfigurationError
    ):  # a directory with nothing but weights; the job's model says how texts are read
        if begins:
            raise
        tokenizer = pretrained.read_tokenizer(job)
    task = tasks.build(plan, tokenizer)
    if run is not None and (run / "model" / "config.json").is_file():
        task.adopt(pretrained.read_config(_as_it_stands(plan, str(run / "model"))), as_it_stands=True)
    else:
        task.adopt(config, as_it_stands=not begins)
    if task.labels_given:
        task.refuse_unknown(open_source(source, task.columns))
    dataset = prepare(source, "evaluation", plan, task, tokenizer, phase_report(scratch, "preparing", "rows"))
    refuse_mostly_dropped(dataset.report, plan)
    if begins and os.environ.get("RANK", "0") == "0":
        events.event(scratch.events_file, "prepared", **dataset.report.to_dict())
    task.configure(config)
    refuse_tokens(dataset, "data.evaluation", tokenizer, config)
    return plan, config, task, dataset


def _load(run: Path, plan: Plan, engine: FsdpEngine, step: int | None) -> None:
    checkpointer = Checkpointer(RunDirectory(run), plan, distributed.get_rank(), distributed.get_world_size())
    checkpointer.open(read_only=True)
    if checkpointer.load(engine.state_dict(), step) is None:
        raise ConfigurationError(Problem("RUN", str(run), "has no checkpoint yet"))
    engine.after_load()


def _event(scratch: RunDirectory, name: str, **fields: Any) -> None:
    if distributed.get_rank() == 0:
        events.event(scratch.events_file, name, **fields)


def _silent(done: int, total: int) -> Any:
    return None


if __name__ == "__main__":
    entry.main(train=measure)
