"""Suggestions of a task and its columns for a file, by kinds and usual names of columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from launcher import tasks
from launcher.data.columns import Column, Kind, Overview
from launcher.tasks.roles import Role
from launcher.tasks.task import Task

_TELLING = {
    **dict.fromkeys(
        (Kind.IMAGE, Kind.SOUND, Kind.MESSAGES, Kind.IMAGE_MESSAGES, Kind.ANSWERS, Kind.SPANS, Kind.TAGS), 3
    ),
    **dict.fromkeys((Kind.CLASS, Kind.WORDS), 1),
}
"""The score of a column's kind as a sign of a task: high for images, low for classes, none for text."""
_BY_NAME = 3
"""The score of a usual name."""
_ABOUT_ROWS = {
    *("id", "idx", "index", "uid", "guid", "uuid", "url", "key"),
    *("source", "split", "language", "lang", "speaker", "author", "domain"),
}
"""Names of columns that tell where a row is from, and are neither input nor target."""


class Suggestion(NamedTuple):
    """A task that a file may be for, and its columns."""

    task: str
    columns: Mapping[str, str | list[str]]
    """The column of each role, or the two of a pair."""
    score: int
    """How well the columns fit, relative to other suggestions for the same file."""


def ranked(seen: Overview) -> list[Suggestion]:
    """Return the best suggestion for each task that a file has the columns for, the most likely task
    first."""
    best = [one for name in tasks.names() if (one := for_task(seen, tasks.find(name))) is not None]
    return sorted(best, key=lambda one: -one.score)


def for_task(seen: Overview, task: type[Task]) -> Suggestion | None:
    """Return the best of a task's ways to name columns; None if the file lacks the columns for all."""
    fits = [_fits(seen, task, way) for way in task.column_ways]
    each = [one for one, way in zip(fits, task.column_ways, strict=True) if len(one.columns) == len(way)]
    return max(each, key=lambda one: one.score, default=None)


def for_way(seen: Overview, task: type[Task], way: tuple[str, ...]) -> Mapping[str, str | list[str]]:
    """Return the most likely columns of a file for the roles of one way; roles without a fitting column are
    left out."""
    return _fits(seen, task, way).columns


def _fits(seen: Overview, task: type[Task], way: tuple[str, ...]) -> Suggestion:
    columns: dict[str, str | list[str]] = {}
    total = 0
    for role in way:
        if (fit := _fit(role, task.column_roles.get(role, Role()), seen, columns)) is not None:
            columns[role], score = fit
            total += score
    return Suggestion(task.name, columns, total)


def _fit(
    role: str, wanted: Role, seen: Overview, taken: Mapping[str, str | list[str]]
) -> tuple[str | list[str], int] | None:
    """Return the best column for a role and its score; None if none fits."""
    used = {name for one in taken.values() for name in ([one] if isinstance(one, str) else one)}
    free = {one.name: one for one in seen.columns if one.name not in used and one.kind is not Kind.EMPTY}
    for kinds, telling in ((wanted.kinds, True), (wanted.by_name, False)):
        for name in (role, *wanted.names):
            parts = [name] if isinstance(name, str) else list(name)
            if all(part in free and free[part].kind in kinds for part in parts):
                score = _BY_NAME + (_TELLING.get(free[parts[0]].kind, 0) if telling else 0)
                return (parts[0] if isinstance(name, str) else parts), score
    alike: list[Column] = [
        one for one in free.values() if one.kind in wanted.kinds and one.name.lower() not in _ABOUT_ROWS
    ]
    if not alike:
        return None
    # If there are several columns of tags, as in CoNLL-2003, the last has the entities.
    one = alike[-1] if alike[0].kind is Kind.TAGS else alike[0]
    return one.name, _TELLING.get(one.kind, 0)
