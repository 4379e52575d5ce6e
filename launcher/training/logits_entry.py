"""The ranks of `launcher predict --logits`: they write a model's logits for every training row of a job.

They run in a scratch run directory with a plan and a request, so they are supervised like any other attempt.
That plan's evaluation rows are the rows to write logits for.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import distributed

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.phases import PhaseReport
from launcher.tasks.written_logits import FORMAT
from launcher.training import entry, exchange
from launcher.training.data.dataset import Dataset
from launcher.training.data.logits_writer import Writer
from launcher.training.data.written_logits import read_as, vocabulary_of
from launcher.training.devices import start_process_group
from launcher.training.evaluate_entry import Measuring
from launcher.training.loss import LogitTransform
from launcher.training.model import pretrained
from launcher.training.model.loading import whole_shape
from launcher.training.model.teacher import unlike_tokenizers
from launcher.training.signals import StopRequest
from launcher.training.subject import Subject, as_trained
from launcher.training.writing_logits import Writing, speaks
from launcher.training.written_states import parts_of_head


def write(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Write the logits of the model in request.json, and a summary to logits.json."""
    request = read_json(scratch.path / "request.json")
    run, model = (Path(request["run"]) if request["run"] else None), request["model"]
    subject = Subject.of(as_trained(plan, run), run, model)
    if model is not None and speaks(subject.task):
        subject = _reading_as_the_student(subject, plan)
    own = Measuring(scratch, stop, 0, plan.training.seed)
    dataset = own.dataset(subject, os.environ.get("RANK", "0") == "0")
    start_process_group(plan)
    engine = own.engine(subject, dataset)
    if speaks(subject.task) and subject.task.head != "chunked":
        kind = subject.config.model_type
        reason = f"a {kind} model's own head is not only a matrix; name it as distillation.teacher instead"
        raise ConfigurationError(Problem("--logits", request["output"], reason))
    step = subject.load(run, engine, request["step"]) if run is not None else None
    about = _about(subject, dataset, {"name": str(run or model)} | subject.identity(run, model, step))
    result = _write(Writing(subject, engine, stop, dataset), Path(request["output"]), about, scratch)
    if distributed.get_rank() == 0 and "bytes" in result:
        write_atomically(scratch.path / "logits.json", json.dumps(result | {"step": step}) + "\n")
    if "bytes" in result:
        own.event("finished", step=0, metrics={})
    else:
        done, total = result["samples"], result["of"]
        line = f"stopped; logits of {done:,} of {total:,} samples are there; the same command goes on there"
        own.event("stopped", step=0, line=line)
    distributed.barrier()


def _write(writing: Writing, directory: Path, about: dict[str, Any], scratch: RunDirectory) -> dict[str, Any]:
    """Write everything into the directory. Return a summary; after a stop it has no `bytes`. Called by all ranks
    together."""
    began, leads = time.monotonic(), distributed.get_rank() == 0
    # Longest first, so that running out of memory shows at once.
    order = sorted(writing.places, key=lambda key: (-writing.places[key].length, key))
    keys, counts, about = sorted(order), None, about | {"num_samples": len(order)}
    if speaks(writing.subject.task):
        counts = [writing.places[key].num_supervised for key in keys]
        about |= _about_states(writing, sum(counts))
    writer = writing.writer = Writer(directory, about, keys, counts)
    before = int(exchange.from_first(writer.begin() if leads else 0))
    if not leads:
        writer.join()
    done = writing.write(order, before, PhaseReport(scratch, "predicting", "samples"))
    rows = writing.dataset.report.rows_used
    summary: dict[str, Any] = {"samples": done, "samples_before": before, "rows": rows}
    if done < len(order):
        return summary | {"of": len(order)}
    summary |= {"tokens": sum(counts)} if counts is not None else {}
    summary["bytes"] = sum(writer.finish().files.values()) if leads else 0
    return summary | {"seconds": round(time.monotonic() - began, 3)}


def _reading_as_the_student(subject: Subject, plan: Plan) -> Subject:
    """Return a language model that reads the rows with the tokenizer and chat template of the job's own model,
    which is to learn from it.

    Raises ConfigurationError if the two tokenizers do not agree.
    """
    tokenizer = pretrained.read_processor(plan)
    if reason := unlike_tokenizers(tokenizer, subject.tokenizer):
        reason = f"its tokenizer is not that of the job's model: {reason}"
        raise ConfigurationError(Problem("MODEL", subject.plan.model.name, reason))
    task = tasks.build(subject.plan, tokenizer)
    task.adopt(subject.config, as_it_stands=True)
    return replace(subject, tokenizer=tokenizer, task=task)


def _about(subject: Subject, dataset: Dataset, teacher: dict[str, Any]) -> dict[str, Any]:
    """Return everything that determines the logits, as fields of the manifest."""
    report, plan = dataset.report, subject.plan
    hashes = {"source": report.source_hash, "samples": report.samples_hash, "rows": report.rows_used}
    return {
        "format": FORMAT,
        "task": plan.task,
        "problem": getattr(plan.data, "problem", None),
        "classes": list(subject.task.labels) if subject.task.labels else None,
        "num_outputs": getattr(subject.config, "num_labels", None),
        "teacher": teacher,
        "precision": plan.precision,
        "data": hashes
        | {"max_length": plan.data.max_length, "longest": report.longest, "read_as": read_as(subject.task)},
    }


def _about_states(writing: Writing, num_tokens: int) -> dict[str, Any]:
    """Return the fields of the manifest that are a language model's."""
    subject, head = writing.subject, parts_of_head(writing.engine.model)
    transform = LogitTransform.of(subject.config.get_text_config())
    num_ids, vocabulary_hash = vocabulary_of(subject.tokenizer)
    num_outputs, width = whole_shape(head["matrix"])
    hidden = {
        "width": width,
        "num_tokens": num_tokens,
        "has_bias": "bias" in head,
        "scale": transform.scale,
        "softcap": transform.softcap,
        "matrix_hash": "",  # known once it is written
        "num_ids": num_ids,
        "vocabulary_hash": vocabulary_hash,
    }
    return {"num_outputs": num_outputs, "hidden": hidden}


if __name__ == "__main__":
    entry.main(train=write)
