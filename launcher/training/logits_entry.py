"""The ranks of `launcher predict --logits`: they write a model's logits for every training row of a job.

They run in a scratch run directory with a plan and a request, so they are supervised like any other attempt.
That plan's evaluation rows are the rows to write logits for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.phases import PhaseReport
from launcher.runs.places import here
from launcher.tasks.task import Sample
from launcher.tasks.written_logits import FORMAT
from launcher.training import entry, exchange
from launcher.training.data.dataset import Dataset
from launcher.training.data.written_logits import Writer, key_of, samples_of
from launcher.training.devices import start_process_group, to_device
from launcher.training.engines.engine import Engine
from launcher.training.evaluate_entry import Measuring
from launcher.training.signals import StopRequest
from launcher.training.subject import Subject, as_trained

_SECONDS_BETWEEN = 30.0
"""Seconds between flushes, and so the most work that a crash loses."""


@dataclass
class Writing:
    """One rank's part in writing logits."""

    subject: Subject
    engine: Engine
    stop: StopRequest
    dataset: Dataset
    places: dict[int, tuple[int, int]]
    """The item number and the length for each key."""
    writer: Writer | None
    """The output; on rank 0 only."""

    def write(self, order: Sequence[int], done: int, report: PhaseReport) -> int:
        """Write the logits of these keys, skipping the first `done`. Return how many are written in total: fewer
        than all after a stop. Called by all ranks together."""
        plan, ranks = self.subject.plan, range(distributed.get_world_size())
        micro, own = plan.batch.micro_batch_size, plan.mesh.data_rank(distributed.get_rank())
        here.at("evaluating", total=len(order))
        kept = time.monotonic()
        while done < len(order) and not self._stops():
            stretch = order[done : done + micro * plan.batch.data_parallel_size]
            shares = [stretch[begin : begin + micro] for begin in range(0, len(stretch), micro)]
            keys = shares[own] if own < len(shares) else []
            samples = [self._sample(key) for key in keys] or [self._sample(stretch[0]).as_filler()]
            told = exchange.all_gather_arrays([self._logits(samples)])
            done += len(stretch)
            if self.writer is None:
                continue
            for rank in ranks:
                number = plan.mesh.data_rank(rank)
                # Padding samples are not written.
                keys = shares[number] if number < len(shares) else []
                for key, logits in zip(keys, told[rank][0], strict=False):
                    self.writer.put(key, logits)
            report(done, len(order))
            here.moved(done)
            if time.monotonic() - kept > _SECONDS_BETWEEN:
                self.writer.keep(done)
                kept = time.monotonic()
        return done

    def _sample(self, key: int) -> Sample:
        [sample] = self.dataset.item(self.places[key][0])
        return sample

    def _logits(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the logits of a rank's samples, fp32 [samples, outputs]."""
        batch = self.subject.task.collate([[sample] for sample in samples])
        output = self.engine.evaluate(to_device(batch, self.subject.plan.mesh.device))
        assert output.predictions is not None
        return output.predictions.float().cpu().numpy()

    def _stops(self) -> bool:
        vote = torch.tensor(float(self.stop.requested), device=self.subject.plan.mesh.device)
        distributed.all_reduce(vote)
        return bool(vote > 0)


def write(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Write the logits of the model in request.json, and a summary to logits.json."""
    request = read_json(scratch.path / "request.json")
    run, model = (Path(request["run"]) if request["run"] else None), request["model"]
    subject = Subject.of(as_trained(plan, run), run, model)
    own = Measuring(scratch, stop, 0, plan.training.seed)
    dataset = own.dataset(subject, os.environ.get("RANK", "0") == "0")
    start_process_group(plan)
    engine = own.engine(subject, dataset)
    step = subject.load(run, engine, request["step"]) if run is not None else None
    places: dict[int, tuple[int, int]] = {}
    for number, sample in enumerate(samples_of(dataset)):
        places.setdefault(key_of(sample), (number, sample.length))
    # Longest first, so that running out of memory shows at once.
    order = sorted(places, key=lambda key: (-places[key][1], key))
    began, writer = time.monotonic(), None
    if distributed.get_rank() == 0:
        about = _about(subject, dataset, {"name": str(run or model)} | subject.identity(run, model, step))
        writer = Writer(Path(request["output"]), about | {"num_samples": len(order)}, sorted(places))
    before = int(exchange.from_first(writer.begin() if writer else 0))
    writing = Writing(subject, engine, stop, dataset, places, writer)
    done = writing.write(order, before, PhaseReport(scratch, "predicting", "samples"))
    if writer is not None:
        writer.keep(done)
        if done == len(order):
            manifest = writer.finish()
            seconds = round(time.monotonic() - began, 3)
            summary: dict[str, Any] = {
                "samples": done,
                "samples_before": before,
                "rows": dataset.report.rows_used,
                "seconds": seconds,
            }
            summary |= {"bytes": sum(manifest.files.values()), "step": step}
            write_atomically(scratch.path / "logits.json", json.dumps(summary) + "\n")
    if done < len(order):
        line = (
            f"stopped; logits of {done:,} of {len(order):,} samples are there; the same command goes on there"
        )
        own.event("stopped", step=0, line=line)
    else:
        own.event("finished", step=0, metrics={})
    distributed.barrier()


def _about(subject: Subject, dataset: Dataset, teacher: dict[str, Any]) -> dict[str, Any]:
    """Return everything that determines the logits, as fields of the manifest."""
    report, plan = dataset.report, subject.plan
    hashes = {"source": report.source_hash, "samples": report.samples_hash, "rows": report.rows_used}
    return {
        "format": FORMAT,
        "task": plan.task,
        "problem": plan.data.problem,  # type: ignore[attr-defined]
        "classes": list(subject.task.labels) if subject.task.labels else None,
        "num_outputs": subject.config.num_labels,
        "teacher": teacher,
        "precision": plan.precision,
        "data": hashes | {"max_length": plan.data.max_length},
    }


if __name__ == "__main__":
    entry.main(train=write)
