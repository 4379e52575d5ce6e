"""The section `data` of a job with several tasks at once, and its contradictions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from launcher import tasks
from launcher.data.section import Data, Sources
from launcher.errors import ConfigurationError
from launcher.tasks.task import Finding, Task, finding

_OWN = ("task", "loss_weight")
"""Keys of an entry of `data.tasks` besides the columns of its task."""
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"


class MultiTaskColumns(Data):
    """Name rows of several tasks, each with its own columns."""

    tasks: dict[str, dict[str, Any]]
    """The tasks by names of your own, each a section: `task` (what it is), `loss_weight` (how much its loss
    counts, 1 where it is left out) and the columns and options that such a task has in `data`. Each entry of
    `train` and `evaluation` names by `task` whose rows it has."""

    def __hash__(self) -> int:
        """Return the hash of its JSON: a mapping of tasks has none."""
        return hash(self.model_dump_json())


@dataclass(frozen=True)
class TaskEntry:
    """One of several tasks in the job file."""

    kind: type[Task]
    data: Data
    """The section `data` of a job with this task alone."""
    loss_weight: float


def entry_of(data: MultiTaskColumns, name: str) -> TaskEntry:
    """Return one of the tasks. Raises KeyError for an unknown name, ValueError for wrong keys,
    ConfigurationError for an unknown kind of task."""
    content = data.tasks[name]
    kind = tasks.find(str(content.get("task")))
    shared = {key: getattr(data, key) for key in data.model_fields_set & Data.model_fields.keys()}
    own = {key: value for key, value in content.items() if key not in _OWN}
    shared |= {"train": rows_for(data.train, name) or data.train, "mixing": None}
    if data.evaluation is not None:
        shared["evaluation"] = rows_for(data.evaluation, name)
    weight = content.get("loss_weight", 1.0)
    if not _is_weight(weight):
        raise ValueError(f"loss_weight {weight!r} is no number above 0")
    return TaskEntry(kind, kind.Columns.model_validate(shared | own), float(weight))


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def rows_for(given: Sources, name: str) -> Sources | None:
    """Return the sources that have rows for a task; None if there are none."""
    own = tuple(source for source in given.sources or () if source.task == name)
    return Sources(sources=own) if own else None


def contradictions(data: MultiTaskColumns) -> Iterator[Finding]:
    """Yield problems with the tasks, and with the assignment of rows to tasks."""
    if not data.tasks:
        yield finding("data.tasks", None, "is empty: name the tasks, each with its own section", "model.task")
    for name, content in data.tasks.items():
        yield from _entry(data, name, content)
    for role, given in (("train", data.train), ("evaluation", data.evaluation)):
        if given is not None:
            yield from _rows(role, given, data.tasks)


def _entry(data: MultiTaskColumns, name: str, content: Mapping[str, Any]) -> Iterator[Finding]:
    key = f"data.tasks.{name}"
    if not name or set(name) - set(_LETTERS):
        reason = "names a head of the model: write letters, digits, `_` and `-`"
        yield finding(key, None, reason, "data.tasks")
        return
    weight = content.get("loss_weight", 1.0)
    if not _is_weight(weight):
        reason = "a loss counts by a number above 0; leave out a task that is not to be learned"
        shown = weight if isinstance(weight, (str, int, float)) else None
        yield finding(f"{key}.loss_weight", shown, reason)
        return
    wanted = content.get("task")
    try:
        kind = tasks.find(wanted if isinstance(wanted, str) else "")
    except ConfigurationError as error:
        reason = (
            error.problems[0].reason if wanted else f"is missing; tasks that go together are {_together()}"
        )
        yield finding(f"{key}.task", wanted if isinstance(wanted, str) else None, reason)
        return
    if (why := why_alone(kind)) is not None:
        reason = f"{why}; tasks that go together are {_together()}"
        yield finding(f"{key}.task", kind.name, reason)
        return
    unknown = list(_unknown_keys(key, kind, content))
    yield from unknown
    if unknown:
        return
    try:
        own = entry_of(data, name)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            place, value = str(item["loc"][0]), item["input"]
            shown = value if isinstance(value, (str, int, float, bool)) else None
            yield finding(f"{key}.{place}", shown, item["msg"], "data.tasks")
        return
    for one in own.kind(own.data).checks():
        place = one.problem.key.removeprefix("data.")
        if place.partition(".")[0] not in Data.model_fields:
            yield finding(f"{key}.{place}", one.problem.value, one.problem.reason, "data.tasks")


def _unknown_keys(key: str, kind: type[Task], content: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield keys of an entry that its task does not have."""
    known = [*_OWN, *(name for name in kind.Columns.model_fields if name not in Data.model_fields)]
    for name in content:
        if name in ("train", "evaluation"):
            reason = f"rows stand in data.{name}: write an entry there with task: {key.rpartition('.')[2]}"
        elif name in Data.model_fields:
            reason = f"is the same for all tasks, which share a pass; write it as data.{name}"
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            reason = f"a {kind.name} task has no such key; the nearest is {near}"
        if name not in known:
            value = content[name]
            shown = value if isinstance(value, (str, int, float, bool)) else None
            yield finding(f"{key}.{name}", shown, reason, "data.tasks")


def _rows(role: str, given: Sources, names: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield problems with sources that name no task or an unknown one, and with tasks without rows."""
    if given.sources is None:
        reason = "several tasks have several sources; write a list, each entry with its task"
        yield finding(f"data.{role}", None, reason, "data.tasks")
        return
    for number, source in enumerate(given.sources):
        key = f"{given.key(role, number)}.task"
        if source.task is None:
            reason = f"is missing: say whose rows these are, {' or '.join(names)}"
            yield finding(key, None, reason, "data.tasks")
        elif source.task not in names:
            near = difflib.get_close_matches(source.task, names, n=1, cutoff=0.0)
            reason = "data.tasks has no such task" + (f"; the nearest is {near[0]}" if near else "")
            yield finding(key, source.task, reason, "data.tasks")
    for number, (source, alias) in enumerate(zip(given.sources, given.aliases, strict=True)):
        is_only = sum(other.task == source.task for other in given.sources) == 1
        if alias in names and not (alias == source.task and is_only):
            reason = f"metrics of the task {alias} go by that name, and are not this source's: write another"
            yield finding(f"{given.key(role, number)}.alias", source.alias, reason, "data.tasks")
    for name in names:
        if rows_for(given, name) is None:
            reason = f"has no rows of the task {name}; add an entry with task: {name}, or leave the task out"
            yield finding(f"data.{role}", None, reason, f"data.tasks.{name}")


def why_alone(kind: type[Task]) -> str | None:
    """Return why a task cannot share an encoder and a pass with others; None if it can."""
    traits = kind.traits
    if kind.Columns is MultiTaskColumns:
        return "is several tasks itself"
    if traits.reads_files:
        return "has rows that name files, and the others read texts by a tokenizer"
    if traits.encoder_decoder:
        return "writes a text with a decoder, and the tasks share an encoder"
    if traits.layout != "padded":
        return "learns words of the vocabulary, and has passes of its own kind"
    return None


def _together() -> str:
    return ", ".join(name for name in tasks.TASKS if why_alone(tasks.find(name)) is None)
