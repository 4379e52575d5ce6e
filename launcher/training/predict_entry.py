"""The ranks of `launcher predict`: they write a model's prediction for every row of a file.

They run in a scratch run directory with a plan and a request, so they are supervised like any other attempt. A
stretch of rows is read, encoded in shares by the ranks, batched by similar length, and written in row order
before the next stretch is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from launcher.data.formats import format_of
from launcher.data.rows import NOTHING_TO_LEARN, IfThere, Row, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.partial import Partial
from launcher.runs.phases import PhaseReport
from launcher.runs.places import here
from launcher.tasks.task import AnswerOptions
from launcher.training import entry, exchange
from launcher.training.asking import ask, refuse_silent
from launcher.training.data.sources import Rows, open_source
from launcher.training.data.stretches import Share, stretches
from launcher.training.devices import start_process_group
from launcher.training.engines.engine import Engine
from launcher.training.evaluation import Interrupted
from launcher.training.samples import as_json, as_sample
from launcher.training.signals import StopRequest
from launcher.training.subject import Subject, as_trained

_PASSES = 16
"""Forward passes of each rank in a stretch. A stop or crash loses at most one stretch; rows are grouped by
length within one."""
_TO_GENERATE = "to have answers generated: --set evaluation.generate.max_new_tokens=128"
_SHOWN = 5
"""Rows shown with their answers at the end, from the first."""


@dataclass
class Predicting:
    """One rank's part in a prediction."""

    subject: Subject
    engine: Engine
    options: AnswerOptions
    rows: Rows
    stop: StopRequest
    with_input: bool = False
    """Whether a record has the row's own columns as well."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """The first rows that were answered, with their answers; on rank 0 alone."""

    def stretches(self, skip: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the records of the rows after the first `skip`, in order, on rank 0; empty lists on the others.

        Raises Interrupted between two forward passes if any rank got a stop request.
        """
        batch, rank = self.subject.plan.batch, distributed.get_rank()
        size = batch.data_parallel_size
        for rows in stretches(self.rows, skip, _PASSES * batch.micro_batch_size * size):
            here.at("preparing", detail=rows[0].file)
            share = Share(rows[rank::size], self.subject.task, self.subject.tokenizer)
            gathered = exchange.all_gather(self._records(share))
            records = (
                [gathered[place % size][place // size] for place in range(len(rows))] if rank == 0 else []
            )
            self._show(rows, records)
            yield records

    def _show(self, rows: list[Row], records: list[dict[str, Any]]) -> None:
        for row, record in zip(rows, records, strict=False):
            if (
                len(self.first) < _SHOWN
                and not isinstance(row.values, RowProblem)
                and "problem" not in record
            ):
                beside = ("row", "input", "cut")
                answer = {name: value for name, value in record.items() if name not in beside}
                self.first.append(as_sample(self.subject.task, row.id, row.values, answer))

    def _records(self, share: Share) -> list[dict[str, Any]]:
        message: dict[int, list[tuple[int, Any]]] = {}
        task = self.subject.task
        passes = share.passes(self.subject.plan.batch.micro_batch_size)
        here.at("evaluating", total=len(passes))
        for number, samples in enumerate(passes):
            if self._stops():
                raise Interrupted
            answers = ask(
                self.engine, task, samples, self.options, self.subject.plan, lambda: self.stop.requested
            )
            # Padding samples, at the end, have no answer.
            for sample, answer in zip(samples, answers, strict=False):
                message.setdefault(sample.id, []).append((sample.window, answer))
            here.moved(number + 1)
        if task.generates and self._stops():
            raise Interrupted  # the last texts may have been cut short
        return [self._record(row, share, message.get(row.id, [])) for row in share.rows]

    def _record(self, row: Row, share: Share, parts: list[tuple[int, Any]]) -> dict[str, Any]:
        task, own = self.subject.task, {}
        if self.with_input and not isinstance(row.values, RowProblem):
            own["input"] = {name: as_json(value) for name, value in row.values.items()}
        if (problem := share.problems.get(row.id)) is not None:
            detail = problem.detail[:200]
            if problem.reason == NOTHING_TO_LEARN and task.traits.causal and not task.generates:
                detail += f"; {_TO_GENERATE}"
            return {"row": row.id, **own, "problem": problem.reason, "detail": detail, "line": row.line}
        assert not isinstance(row.values, RowProblem)
        answer = task.answer(row.values, [answer for _, answer in sorted(parts, key=lambda part: part[0])])
        return {"row": row.id, **own, **answer} | ({"cut": True} if row.id in share.cut else {})

    def _stops(self) -> bool:
        vote = torch.tensor(float(self.stop.requested), device=self.subject.plan.mesh.device)
        distributed.all_reduce(vote)
        return bool(vote > 0)


def predict(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Write the predictions of the model in request.json for the plan's evaluation rows, and a summary to
    prediction.json."""
    request = read_json(scratch.path / "request.json")
    run, model = (Path(request["run"]) if request["run"] else None), request["model"]
    options = AnswerOptions(**request["options"])
    subject = Subject.of(as_trained(plan, run), run, model)
    source = subject.plan.data.evaluation
    if source is None:
        raise ConfigurationError(Problem("--input", None, "is missing"))
    refuse_silent(subject.task)
    subject.task.for_prediction = True
    # If training read two parallel text files, an input with an unknown suffix is read as text.
    otherwise = ".txt" if plan.data.train.targets is not None else None
    rows = open_source(source, subject.task.columns, otherwise)
    if with_input := bool(request.get("with_input")):
        rows = _with_all_columns(rows)
    start_process_group(plan)
    subject.task.configure(subject.config)
    engine = subject.build(scratch)
    step = subject.load(run, engine, request["step"]) if run is not None else None
    began, leads = time.monotonic(), distributed.get_rank() == 0
    output = Partial(Path(request["output"]))
    of = _identity(subject, rows, run, model, step) | {"options": request["options"]}
    of |= {"the input's columns": True} if with_input else {}
    skipped = int(exchange.from_first(output.begin(of) if leads else 0))
    report = PhaseReport(scratch, "predicting", "rows")
    stopped, predicting = False, Predicting(subject, engine, options, rows, stop, with_input)
    if leads:
        report(output.num_rows, max(rows.num_rows_expected, output.num_rows))
    try:
        for records in predicting.stretches(skipped):
            if leads:
                here.at("recording", detail=str(output.path))
                output.append(records)
                report(output.num_rows, max(rows.num_rows_expected, output.num_rows))
    except Interrupted:
        stopped = True
    if leads:
        if not stopped:
            output.finish()
        facts = {"step": step, "seconds": round(time.monotonic() - began, 3), "first": predicting.first}
        _conclude(scratch, output, stopped, skipped, facts)
    distributed.barrier()


def _with_all_columns(rows: Rows) -> Rows:
    """Return the same rows with every column of their files: of some formats only those that are named are
    read."""
    names = [
        name for file in rows.files for name in format_of(file.path, rows.otherwise).names(Path(file.path))
    ]
    return replace(rows, columns=tuple(dict.fromkeys((*rows.columns, *map(IfThere, names)))))


def _identity(
    subject: Subject, rows: Rows, run: Path | None, model: str | None, step: int | None
) -> dict[str, Any]:
    """Return everything that determines the predictions, under readable names."""
    data = subject.plan.data.model_dump(
        mode="json", exclude={"train", "evaluation", "num_workers", "unusable", "packing"}
    )
    wanted = subject.task.evaluation.model_dump(mode="json", exclude={"samples"})
    of = {
        "the input's contents": rows.digest,
        "the task": subject.plan.task,
        "data": data,
        "evaluation": wanted,
    }
    return of | subject.identity(run, model, step)


def _conclude(
    scratch: RunDirectory, output: Partial, stopped: bool, skipped: int, facts: dict[str, Any]
) -> None:
    done = output.num_rows - skipped
    summary = {
        "rows": output.num_rows,
        "answered": output.num_rows - sum(output.problems.values()),
        "problems": output.problems,
    }
    summary |= {
        "rows_before": skipped,
        **facts,
        "rows_per_second": round(done / max(facts["seconds"], 1e-9), 1),
    }
    write_atomically(scratch.path / "prediction.json", json.dumps(summary) + "\n")
    if stopped:
        line = f"stopped; {output.num_rows:,} rows are in {output.path}; the same command goes on there"
        events.event(scratch.events_file, "stopped", step=0, line=line)
    else:
        events.event(scratch.events_file, "finished", step=0, metrics={})


if __name__ == "__main__":
    entry.main(train=predict)
