"""Describe the job schema: its keys, what may be written there, the docstring of each field."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launcher import tasks
from launcher.data.section import Data, parse_columns, parse_sources
from launcher.job.schema import Job, known_task
from launcher.job.tuning import parse_freeze, parse_layers, parse_share
from launcher.values import Interval, parse_seconds

_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_IN_WORDS: dict[Any, str] = {
    parse_layers: "layers by their numbers from 0, as 0-7 or 5, or all, or all but last 4",
    parse_share: "a share of all steps below 1, or as 10%, or a whole number of steps from 1",
    parse_freeze: "a list of patterns of parameter names, or a section of keys",
    parse_columns: "columns by the keys of `data`, as `{text: body}`",
    parse_sources: "a source (a section of keys), or a list of sources",
}
"""Forms of a value that a function reads, as people write it."""


@dataclass(frozen=True)
class Key:
    """One key that may be written in a job file."""

    path: str
    field: FieldInfo
    section: type[BaseModel]
    name: str


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds; None for a plain value."""
    parts = (field.annotation, *get_args(field.annotation))
    for candidate in (*parts, *(inner for part in parts for inner in get_args(part))):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel) and candidate is not Interval:
            return candidate
    return None


def written(name: str, field: FieldInfo) -> str:
    """Return the name of a field in a job file: its alias where it has one."""
    return field.alias or name


def keys(section: type[BaseModel] = Job, prefix: str = "") -> Iterator[Key]:
    """Yield every key below a section, parents before children, in the order of the schema: of `data` first
    what all tasks share."""
    for name, field in section.model_fields.items():
        key = Key(prefix + written(name, field), field, section, name)
        yield key
        if child := section_of(field):
            yield from keys(child, key.path + ".")
        if child is Data:
            for columns in columns_by_task().values():
                yield from (
                    key for key in keys(columns, "data.") if key.path.split(".")[1] not in Data.model_fields
                )


def value_of(job: Job, key: str) -> tuple[Any, bool] | None:
    """Return the value of a key of a job, and whether the job sets it; None where there is no such key. Of a
    section the value is its keys in words, those that the job sets first, with their values."""
    value: Any = job
    is_set = True
    for word in key.split("."):
        fields = type(value).model_fields if isinstance(value, BaseModel) else {}
        name = next((name for name, field in fields.items() if written(name, field) == word), None)
        if name is None:
            return None
        is_set = is_set and name in value.model_fields_set
        value = getattr(value, name)
    is_section = isinstance(value, BaseModel) and not isinstance(value, Interval)
    return (_in_words(value) if is_section else value), is_set


def _in_words(section: BaseModel) -> str:
    fields = {name: written(name, field) for name, field in type(section).model_fields.items()}
    chosen = section.model_dump(mode="json", include=section.model_fields_set, exclude_unset=True)
    texts = [f"{fields[name]} {value}" for name, value in chosen.items() if name in fields]
    left = [key for name, key in fields.items() if name not in chosen]
    return "; ".join([*texts, f"left as they are: {', '.join(left)}"] if left else texts)


def columns_by_task() -> dict[str, type[Data]]:
    """Return the section `data` of every task that comes with launcher."""
    return {name: tasks.find(name).Columns for name in tasks.TASKS}


def choices(annotation: Any) -> list[str]:
    """Return the fixed words that an annotation allows, in order."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in choices(part)]


def expected(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Return what may be written for an annotation, in words: `a whole number of at least 1, or auto`."""
    if annotation is Interval:
        return "a number of steps (200), a time (30s, 15min, 2h) or epochs (epoch, 2 epochs)"
    if any(getattr(part, "func", None) is parse_seconds for part in metadata):
        return "a time in seconds, or as 30s, 15min, 2h"
    if words := next(
        (_IN_WORDS[part.func] for part in metadata if getattr(part, "func", None) in _IN_WORDS), ""
    ):
        return words
    if any(getattr(part, "func", None) is known_task for part in metadata):
        return f"one of {', '.join(tasks.TASKS)}, or a task that an installed package brings"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(parts[0], parts[1:])
    if origin is Literal:
        return (
            " or ".join(str(word) for word in parts)
            if len(parts) < 3
            else "one of " + ", ".join(str(word) for word in parts)
        )
    if origin in (Union, UnionType):
        kept = [part for part in parts if part is not NoneType]
        return (
            expected(kept[0], metadata) if len(kept) == 1 else ", or ".join(expected(part) for part in kept)
        )
    if origin is dict:
        if get_origin(parts[0]) is Annotated and get_args(parts[0])[0] is int:
            return "layers of the model with those of the teacher, by numbers from 0, as {2: 4, 4: 8}"
        return "keys and values" + (" of a config.json" if parts[-1] is Any else "")
    if origin is tuple:
        if parts[-1] is Ellipsis:
            inner = get_args(parts[0])[0] if get_origin(parts[0]) is Annotated else parts[0]
            if get_origin(inner) is dict:
                return "a list of objects"
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                return "a list of sections of keys"
            return "a list of texts" if inner is str else f"a list of {' | '.join(choices(inner))}"
        return f"a list of {len(parts)}: each {expected(parts[0])}"
    return _PLAIN.get(annotation, "a section of keys") + limits(metadata)


def limits(metadata: tuple[Any, ...] | list[Any]) -> str:
    """Return bounds in words, with a leading space: ` of at least 0, below 1`, ` of at least 1 and at most
    1,024`."""
    words = []
    for attribute, text in (("ge", "of at least"), ("gt", "above"), ("le", "of at most"), ("lt", "below")):
        for part in metadata:
            parts = (
                [part]
                if hasattr(part, attribute)
                else [inner for inner in getattr(part, "metadata", []) if hasattr(inner, attribute)]
            )
            values = [getattr(bound, attribute) for bound in parts]
            words += [
                f"{text} {value:,}" if isinstance(value, int) else f"{text} {value:g}" for value in values
            ]
    return " " + ", ".join(words).replace(", of at most", " and at most") if words else ""


def expected_of(field: FieldInfo) -> str:
    """Return what may be written for a field, in words."""
    return expected(field.annotation, tuple(field.metadata))


@functools.cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    docstrings = {}
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, text in zip(section.body, section.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    docstrings[section.name, name] = inspect.cleandoc(words)
    return docstrings


def docstring(section: type[BaseModel], name: str) -> str:
    """Return the docstring line under a field in the source, in the class that it is from.

    Without one, the docstring of the section that the field holds.
    """
    child = section_of(section.model_fields[name])
    fallback = inspect.getdoc(child) if child else None
    kinds = (kind for kind in section.__mro__ if issubclass(kind, BaseModel) and kind is not BaseModel)
    lines = (
        _docstrings(kind.__module__).get((kind.__name__, name)) for kind in kinds if name in kind.model_fields
    )
    return next((line for line in lines if line), None) or fallback or ""
