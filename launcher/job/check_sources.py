"""Checks of where a job's rows come from: one source or several, their shares and their own columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from pydantic import ValidationError

from launcher import tasks
from launcher.data.aligned import NUM_COLUMNS, unfit
from launcher.data.rows import required
from launcher.data.section import Data, MixedSource, Source, Sources
from launcher.errors import ConfigurationError
from launcher.job.schema import Job
from launcher.tasks.mixed import data_of, of_one_task, own_columns
from launcher.tasks.multi_task_columns import MultiTaskColumns
from launcher.tasks.task import Finding, Task, finding


def findings(job: Job) -> Iterator[Finding]:
    """Yield everything about a job's sources that contradicts itself."""
    several = isinstance(job.data, MultiTaskColumns)
    for role, given in (("train", job.data.train), ("evaluation", job.data.evaluation)):
        if given is None:
            continue
        for number, source in enumerate(given.parts):
            key = given.key(role, number)
            if (task := getattr(source, "task", None)) is not None and not several:
                reason = "is a key of several tasks at once; leave it out, or write model.task: multi-task"
                yield finding(f"{key}.task", task, reason, "model.task")
            yield from _source(key, source)
            columns = list(_columns(key, source, job))
            yield from columns
            if source.targets is not None and not columns:
                yield from _targets(key, source.targets, source, job)
        if given.sources is not None:
            yield from _several(role, given)
    yield from _mixing(job.data)


def _several(role: str, given: Sources) -> Iterator[Finding]:
    """Yield what a list of sources says twice, or of some alone."""
    for name, field in Source.model_fields.items():
        if (value := getattr(given, name)) != field.default:
            reason = "stands beside a list of sources; write it in an entry of the list"
            yield finding(f"data.{role}.{name}", value, reason)
    sources = given.sources or ()
    aliases = [source.alias for source in sources]
    for number, source in enumerate(sources):
        key = given.key(role, number)
        if source.alias is not None and source.alias in aliases[:number]:
            reason = (
                f"is the name of entry {aliases.index(source.alias)} too; metrics go by it: write another"
            )
            yield finding(f"{key}.alias", source.alias, reason)
        if role == "evaluation" and source.weight is not None:
            reason = "held-out rows are all measured, in no shares; leave it out"
            yield finding(f"{key}.weight", source.weight, reason)
        elif source.weight is None and any(other.weight is not None for other in sources):
            there = next(n for n, other in enumerate(sources) if other.weight is not None)
            reason = f"is missing, and entry {there} has one: write a weight for every source, or for none"
            yield finding(f"{key}.weight", None, reason)


def _mixing(data: Data) -> Iterator[Finding]:
    """Yield shares that are said twice, or of one source."""
    if data.mixing is None:
        return
    if data.train.sources is None:
        reason = "there is one source, and nothing to mix: write data.train as a list, or leave it out"
        yield finding("data.mixing", None, reason, "data.train")
    elif data.mixing.temperature != 1 and any(one.weight is not None for one in data.train.sources):
        reason = "the weights of the sources say their shares already; leave it out, or the weights"
        yield finding("data.mixing.temperature", data.mixing.temperature, reason, "data.train")


def _columns(key: str, source: Source, job: Job) -> Iterator[Finding]:
    """Yield what is wrong with a source's own columns: unknown keys, values, contradictions."""
    if not isinstance(source, MixedSource) or not source.columns:
        return
    if (task := _task_of(source, job)) is None:
        return
    known, wrong = own_columns(task), False
    for name, value in source.columns.items():
        if name in known:
            continue
        wrong = True
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        reason = f"a source of a {task.name} job may have columns of its own for {', '.join(known)}"
        if name in type(job.data).model_fields:
            reason += f"; {name} is the same for all sources: write it in data"
        else:
            reason += f"; the nearest is {near[0]}"
        shown = value if isinstance(value, (str, int, float, bool)) else None
        yield finding(f"{key}.columns.{name}", shown, reason, key, "model.task")
    if wrong:
        return
    try:
        data = data_of(job.model.task, job.data, source)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        reason = "write the name of a column, as text, or as a list of them where data takes one"
        yield finding(f"{key}.columns.{name}", str(source.columns.get(name)), reason, key)
        return
    if getattr(data, "messages", None) and not getattr(job.data, "messages", None):
        reason = (
            "chats have a date that data keeps for all sources: write data.messages, and the columns of the "
            "others in their sources"
        )
        yield finding(f"{key}.columns.messages", source.columns["messages"], reason, "data.messages")
    for one in task(data).checks():
        problem = one.problem
        named = {place.removeprefix("data.") for place in one.keys}
        if problem.key == "data" or (problem.key.startswith("data.") and named & source.columns.keys()):
            own = problem.key.replace("data", f"{key}.columns", 1)
            yield finding(own, problem.value, problem.reason, key, *one.keys)


def _task_of(source: Source, job: Job) -> type[Task] | None:
    """Return the task that a source's rows are for; None where it names none of several."""
    try:
        return tasks.find(of_one_task(job.model.task, job.data, source)[0])
    except (KeyError, ConfigurationError, ValueError):
        return None


def _targets(key: str, targets: str, source: Source, job: Job) -> Iterator[Finding]:
    """Yield what goes against reading two text files side by side."""
    if source.path is None:
        reason = (
            "is read line for line beside path, and there is none; a data set on the hub has its own columns"
        )
        yield finding(f"{key}.targets", targets, reason, f"{key}.path", f"{key}.name")
        return
    if (task := _task_of(source, job)) is None:
        return
    columns = required(task(data_of(job.model.task, job.data, source)).columns)
    if len(columns) != NUM_COLUMNS:
        named = ", ".join(map(repr, columns))
        reason = (
            f"two files have two columns, and this job reads {len(columns)} ({named}); use .jsonl, .csv or "
            ".tsv"
        )
        yield finding(f"{key}.targets", targets, reason, "model.task", "data")
    for part, name in (("path", source.path), ("targets", targets)):
        if (why := unfit(name)) is not None:
            yield finding(f"{key}.{part}", name, why, f"{key}.path")


def _source(key: str, source: Source) -> Iterator[Finding]:
    parts = (f"{key}.path", f"{key}.name")
    if source.path is None and source.name is None:
        yield finding(key, None, "needs path (a local file) or name (a data set on the hub)", *parts)
    if source.path is not None and source.name is not None:
        yield finding(
            f"{key}.name",
            source.name,
            "path and name are both there, and rows come from one place; leave one out",
            *parts,
        )
    if source.name is None and source.subset is not None:
        yield finding(
            f"{key}.subset", source.subset, "only a hub data set (name) has subsets; leave it out", *parts
        )
