"""Checks of a job whose rows are read as training goes: what cannot be without knowing all of them."""

from __future__ import annotations

from collections.abc import Iterator

from launcher import tasks
from launcher.data.section import Data
from launcher.data.shards import SHARDS
from launcher.data.streams import can_stream
from launcher.job.schema import Job
from launcher.tasks.task import Finding, Task, finding

_KEY = "data.streaming"


def findings(job: Job) -> Iterator[Finding]:
    """Yield everything that does not go with streaming."""
    if not job.data.streaming:
        default = Data.model_fields["shuffle_window"].default
        if "shuffle_window" in job.data.model_fields_set and job.data.shuffle_window != default:
            reason = (
                "is of rows that are streamed; stored rows are shuffled all together: leave it out, or write "
                "data.streaming: true"
            )
            yield finding("data.shuffle_window", job.data.shuffle_window, reason, _KEY)
        return
    yield from _length(job)
    yield from _source(job)
    task = tasks.of_job(job)
    if not task.streams:
        can = ", ".join(sorted(name for name in tasks.names() if _may_stream(name)))
        reason = (
            f"a {task.name} job counts or fits over all of its rows before it begins, or its rows name files; "
            f"write false. {can} stream"
        )
        yield finding(_KEY, True, reason, "model.task")
    if job.data.num_workers != "auto":
        reason = "with streaming each rank has one process that tokenises; leave it out"
        yield finding("data.num_workers", job.data.num_workers, reason, _KEY)


def _may_stream(name: str) -> bool:
    """Return whether a task streams whatever its columns are."""
    kind = tasks.find(name)
    counts = kind.learn_from is not Task.learn_from or kind.needs_labels is not Task.needs_labels
    return not (counts or kind.traits.reads_files or kind.streams is not Task.streams)


def _length(job: Job) -> Iterator[Finding]:
    """Yield lengths given in epochs: streamed rows are not counted in advance."""
    training = job.training
    if training.max_steps is None:
        reason = (
            "streamed rows are not counted before, so that an epoch has no number of steps; write "
            "training.max_steps, and leave epochs out"
        )
        yield finding("training.max_steps", training.epochs, reason, _KEY, "training.epochs")
    for key, every in (
        ("checkpoint.every", job.checkpoint.every),
        ("training.evaluate_every", training.evaluate_every),
    ):
        if every is not None and every.unit == "epochs":
            reason = (
                "the length of an epoch is not known where rows are streamed; write a number of steps, or a "
                "time such as 15min"
            )
            yield finding(key, str(every), reason, _KEY)


def _source(job: Job) -> Iterator[Finding]:
    """Yield sources that cannot be read from an arbitrary position, or in shares."""
    train = job.data.train
    if train.sources is not None:
        reason = (
            "several sources are mixed in shares of what they have, which is not known of streamed rows; "
            "name files of one kind by one pattern, as path: data/*.jsonl"
        )
        yield finding("data.train", None, reason, _KEY)
        return
    if train.name is not None:
        reason = (
            "streaming reads files on this machine; fetch those of the data set, as `hf download "
            f"{train.name} --repo-type dataset --local-dir DIRECTORY`, and name them: path: "
            "DIRECTORY/**/*.parquet"
        )
        yield finding("data.train.name", train.name, reason, _KEY)
    for key, value, reason in (
        ("targets", train.targets, "two files line for line are not streamed; write one .jsonl of both"),
        ("limit", train.limit, "files come in another order in each epoch, so that no rows are the first "
         "ones; leave it out, as training.max_steps says how much is read"),
    ):  # fmt: skip
        if value is not None:
            yield finding(f"data.train.{key}", value, reason, _KEY)
    if train.path is not None and not can_stream(train.path):
        reason = (
            f"only {', '.join(SHARDS)} can be read from any place on; write the rows as one of them, as "
            "`datasets.load_dataset('csv', data_files=...)['train'].to_parquet(...)` does, or leave "
            "data.streaming out"
        )
        yield finding("data.train.path", train.path, reason, _KEY)
