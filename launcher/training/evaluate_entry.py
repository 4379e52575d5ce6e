"""The ranks of `launcher evaluate`: evaluation of a model before and after training.

They run in a scratch run directory with a plan and a request, so they are supervised like any other attempt.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.planner.plan import BatchPlan, Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.training import confidence, entry
from launcher.training.confidence import Apart, Whole
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import prepare_sources, refuse_unknown
from launcher.training.data.prepare import refuse_mostly_dropped
from launcher.training.devices import start_process_group
from launcher.training.engines.engine import Engine
from launcher.training.evaluation import Interrupted, batches_by_source, evaluate
from launcher.training.inputs import phase_report, preparation_report, refuse_tokens
from launcher.training.model.loss_check import check_loss
from launcher.training.signals import StopRequest
from launcher.training.subject import Subject


@dataclass
class Measuring:
    """One rank's part in evaluating one or two models."""

    scratch: RunDirectory
    stop: StopRequest
    resamples: int
    """Number of bootstrap resamples for confidence intervals; 0 for none."""
    seed: int

    def dataset(self, subject: Subject, leads: bool) -> Dataset:
        """Return the held-out rows as samples for this model. Called before the process group exists."""
        given, plan, task = subject.plan.data.evaluation, subject.plan, subject.task
        assert given is not None
        refuse_unknown(task, given, plan)
        report = preparation_report(self.scratch, self.stop)
        dataset = prepare_sources(given, "evaluation", plan, task, subject.tokenizer, report)
        for one in dataset.reports:
            refuse_mostly_dropped(one, plan)
        if leads:
            events.event(self.scratch.events_file, "prepared", **dataset.report.to_dict())
        task.configure(subject.config)
        refuse_tokens(dataset, "data.evaluation", subject.tokenizer, subject.config)
        return dataset

    def engine(self, subject: Subject, dataset: Dataset) -> Engine:
        """Return the sharded model after checking its loss."""
        engine = subject.build(self.scratch)
        check_loss(engine, subject.task, dataset, subject.plan, self.event)
        return engine

    def look(self, subject: Subject, engine: Engine, dataset: Dataset) -> Whole:
        """Return the metrics and details over the rows, and each row's state if intervals are requested."""
        plan = subject.plan
        evaluator = Whole(subject.task.evaluator)
        if self.resamples:
            size = plan.batch.data_parallel_size
            each = BatchPlan(
                global_batch_size=size, micro_batch_size=1, accumulation_steps=1, data_parallel_size=size
            )
            plan = plan.model_copy(update={"batch": each})
            ids = [id for batches in batches_by_source(dataset, plan) for id in confidence.ids_of(batches)]
            evaluator = Apart(subject.task.evaluator, ids)
        report = (
            phase_report(self.scratch, "evaluating", "batches") if distributed.get_rank() == 0 else _silent
        )
        evaluator.metrics = evaluate(
            engine,
            subject.task,
            dataset,
            plan,
            report,
            self.stops,
            lambda: self.stop.requested,
            evaluator.shown.update,
            evaluator,
        )
        return evaluator

    def stops(self) -> bool:
        """Return whether any rank was asked to stop."""
        vote = torch.tensor(float(self.stop.requested))
        distributed.all_reduce(vote)
        return bool(vote > 0)

    def event(self, name: str, **fields: Any) -> None:
        """Write an event, once for all ranks."""
        if distributed.get_rank() == 0:
            events.event(self.scratch.events_file, name, **fields)

    def intervals(self, found: dict[str, Whole]) -> dict[str, Any]:
        """Return the interval of each metric before, after, and of the change. Called on rank 0 alone."""
        draws = {
            name: one.drawn(self.resamples, self.seed)
            for name, one in found.items()
            if isinstance(one, Apart)
        }
        both = draws["before"].keys() & draws["after"].keys()
        draws["change"] = {name: draws["after"][name] - draws["before"][name] for name in sorted(both)}
        shown = {
            name: {metric: confidence.interval(values) for metric, values in of.items()}
            for name, of in draws.items()
        }
        return {"level": confidence.LEVEL, "resamples": self.resamples, "seed": self.seed, **shown}


def measure(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Evaluate the models that request.json names and write evaluation.json: metrics and details before and
    after, and intervals if requested."""
    request = read_json(scratch.path / "request.json")
    if plan.data.evaluation is None:
        raise ConfigurationError(
            Problem("data.evaluation", None, "nothing to measure on; name held-out rows in the job file")
        )
    run, model = (Path(request["run"]) if request["run"] else None), request["model"]
    own = Measuring(scratch, stop, request["resamples"], request["seed"])
    if own.resamples:  # rows are resampled, and a packed sequence has several
        plan = plan.model_copy(update={"data": plan.data.model_copy(update={"packing": False})})
    # A run is one model with two states. A model directory is compared with the job's initial model.
    subjects = [Subject.of(plan, run, None), *([Subject.of(plan, None, model)] if model else [])]
    # Before the process group starts: a rank that tokenises for long would let its peers time out.
    datasets = [
        own.dataset(one, one is subjects[0] and os.environ.get("RANK", "0") == "0") for one in subjects
    ]
    start_process_group(plan)
    results: dict[str, Whole] = {}
    step = None
    try:
        for subject, dataset in zip(subjects, datasets, strict=True):
            engine = own.engine(subject, dataset)
            results["after" if results else "before"] = own.look(subject, engine, dataset)
            if run is not None:
                step = subject.load(run, engine, request["step"])
                results["after"] = own.look(subject, engine, dataset)
            del engine
            gc.collect()
    except Interrupted:
        own.event(
            "stopped", step=0, line="stopped before everything was measured; the same command begins anew"
        )
    else:
        if distributed.get_rank() == 0:
            _write(
                scratch,
                results,
                {"step": step} | ({"confidence": own.intervals(results)} if own.resamples else {}),
                datasets[0],
            )
    distributed.barrier()


def _write(scratch: RunDirectory, found: dict[str, Whole], more: dict[str, Any], dataset: Dataset) -> None:
    result: dict[str, Any] = {name: one.metrics for name, one in found.items()}
    if any(one.shown for one in found.values()):
        result["details"] = {name: one.shown for name, one in found.items()}
    report = dataset.report.to_dict()
    kept = ("files", "source_hash", "rows_read", "rows_used", "dropped", "num_cut")
    result["data"] = {key: report[key] for key in kept}
    write_atomically(scratch.path / "evaluation.json", json.dumps(result | more) + "\n")
    events.event(scratch.events_file, "finished", step=0, metrics=result["after"])


def _silent(done: int, total: int) -> Any:
    return None


if __name__ == "__main__":
    entry.main(train=measure)
