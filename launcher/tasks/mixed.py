"""One of several data sources as its own section `data`, with its own columns; the names of its metrics."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from launcher import tasks
from launcher.data.rows import Row, RowProblem
from launcher.data.section import Data, MixedSource, Source, Sources
from launcher.metrics import Better
from launcher.tasks.multi_task_columns import MultiTaskColumns, entry_of
from launcher.tasks.task import Task

_OF_CHATS = ("tools", "date")
"""Keys that only `messages` may have next to it."""


def own_columns(task: type[Task]) -> tuple[str, ...]:
    """Return the keys of `data` that one of several sources may set for itself: the task's columns."""
    keys = dict.fromkeys(key for way in task.column_ways for key in way)
    return tuple(key for key in (*keys, "tools") if key in task.Columns.model_fields)


def of_one_task(task: str, data: Data, source: Source) -> tuple[str, Data]:
    """Return the task that a source's rows are for, and the section `data` of a job with that task alone.

    In a multi-task job that is the task that the source names. Raises KeyError if it names none.
    """
    if not isinstance(data, MultiTaskColumns):
        return task, data
    entry = entry_of(data, str(source.task if isinstance(source, MixedSource) else None))
    return entry.kind.name, entry.data


def data_of(task: str, data: Data, source: Source) -> Data:
    """Return the section `data` of a job with this source alone, for the source's own task of several.

    If a source names the columns of one way to write rows (`text`), those of the other ways (`prompt` and
    `completion`) are left out. Raises pydantic's ValidationError for unknown columns.
    """
    task, data = of_one_task(task, data, source)
    place = {name: getattr(source, name) for name in Source.model_fields if name in source.model_fields_set}
    values: dict[str, Any] = {name: getattr(data, name) for name in data.model_fields_set}
    values |= {"train": Sources(**place), "mixing": None}
    own = source.columns if isinstance(source, MixedSource) else None
    if own:
        ways = tasks.find(task).column_ways
        chosen = [way for way in ways if own.keys() & set(way)] or list(ways)
        kept = {key for way in chosen for key in way}
        others = {key for way in ways for key in way} - kept
        others |= set(_OF_CHATS) - own.keys() if "messages" in others else set()
        values = {key: value for key, value in values.items() if key not in others} | own
    return type(data).model_validate(values)


def task_of(task: str, data: Data, source: Source) -> Task:
    """Return the unprepared task for the rows of one of several sources. Raises as `of_one_task` and
    `data_of`."""
    kind, _ = of_one_task(task, data, source)
    return tasks.find(kind)(data_of(task, data, source))


def as_main(task: str, data: Data, source: Source, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield a source's rows with its own columns renamed to those of `data`."""
    own = data_of(task, data, source)
    task, data = of_one_task(task, data, source)
    names = {
        getattr(own, key): getattr(data, key)
        for key in own_columns(tasks.find(task))
        if isinstance(getattr(own, key), str) and isinstance(getattr(data, key), str)
    }
    for row in rows:
        if isinstance(row.values, RowProblem):
            yield row
        else:
            yield row._replace(values={names.get(name, name): value for name, value in row.values.items()})


def measured(task: Task) -> dict[str, Better]:
    """Return the metrics of a job's evaluation, each with its better direction: the task's over all rows, and
    `ALIAS/metric` for each of several sources."""
    metrics, held_out = dict(task.metrics), task.data.evaluation
    named = zip(held_out.aliases, held_out.parts, strict=False) if held_out is not None else ()
    for alias, source in named:
        own = task.parts.get(str(getattr(source, "task", None)), task)
        metrics |= {f"{alias}/{name}": better for name, better in own.metrics.items()}
    return metrics


def not_measured(task: Task, metric: str) -> str | None:
    """Return why a job's evaluation does not have a metric, with the nearest that it has; None if it has
    it."""
    known = measured(task)
    if metric in known:
        return None
    reason = f"a {task.kind} evaluation measures {', '.join(task.metrics)}"
    held_out = task.data.evaluation.aliases if task.data.evaluation is not None else ()
    if held_out and not task.parts:
        reason += f" of all rows, and of {', '.join(held_out)} alone, as {held_out[0]}/loss"
    return f"{reason}; the nearest is {difflib.get_close_matches(metric, known, n=1, cutoff=0.0)[0]}"
