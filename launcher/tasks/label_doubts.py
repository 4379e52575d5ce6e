"""Doubts whether a column of labels holds classes, and a note on which of two classes F1 is for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.data.columns import Kind, describe, number_in
from launcher.data.labels import class_name
from launcher.errors import Problem
from launcher.tasks.classes import Classes, is_number, spelling

_LONG = 60
"""The mean length of class names, in characters, above which they are probably texts."""


_PLAIN = {
    ("0", "1"), ("-1", "1"), ("no", "yes"), ("n", "y"), ("false", "true"), ("negative", "positive"),
    ("neg", "pos"), ("bad", "good"),
}  # fmt: skip
"""Pairs of classes of which the second is clearly the positive one."""


def f1_notes(rows: Sequence[dict[str, Any]], column: str, positive: str | None) -> Iterator[Problem]:
    """Yield a note on which of two classes `f1` is for, unless their names make it clear; or that `positive`
    is neither."""
    key = "data.positive_label"
    names = sorted({class_name(row[column]) for row in rows})
    if len(names) != 2:
        return
    if all(map(is_number, names)):
        names.sort(key=int)
    first, second = names
    if positive is None and (spelling(first), spelling(second)) not in _PLAIN:
        reason = (
            f"f1 is that of {second!r}, the second of two classes (of a model that has them, its own second); "
            f"for that of {first!r} write {key}: {json.dumps(first, ensure_ascii=False)}"
        )
        yield Problem(key, second, reason)
    elif positive is not None and Classes(names, by_number=True).id_of(positive) is None:
        yield Problem(key, positive, f"is none of their classes, {first!r} and {second!r}")


def label_doubts(rows: Sequence[dict[str, Any]], column: str) -> Iterator[str]:
    """Yield why `column` may not hold the class of each row, with columns that may."""
    names = [class_name(row[column]) for row in rows]
    classes = set(names)
    numbers = [number for row in rows if (number := number_in(row[column])) is not None]
    if len(numbers) == len(rows) and not all(map(float.is_integer, numbers)):
        yield (
            f"the label {column!r} holds numbers, as {names[0]}, and each is taken for a class, {len(classes)} "
            f"in {len(rows)} rows; to learn numbers write data.problem: regression"
        )
        return
    mean = sum(map(len, names)) / len(names)
    if len(classes) == len(names):
        what = f"each of {len(rows)} rows has a class of its own, as {names[0][:40]!r}"
    elif mean > _LONG and 2 * len(classes) > len(names):
        what = f"{len(classes)} classes in {len(rows)} rows have names of {mean:.0f} characters in the mean"
    else:
        return
    yield f"{what}; is the label in another column than {column!r}?{_others(rows, column)}"


def _others(rows: Sequence[dict[str, Any]], column: str) -> str:
    """Return the other columns that hold a few repeated values, in words; empty if there are none."""
    few = [
        f"{one.name!r} has {len(one.values)} different values"
        for one in describe(rows)
        if one.kind is Kind.CLASS and one.name != column
    ]
    return f" {', '.join(few[:3])}" if few else ""
