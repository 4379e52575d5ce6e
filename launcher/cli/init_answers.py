"""The answers of `launcher init`, parsed, and what they are about: columns, keys, tasks."""

from __future__ import annotations

import difflib
import inspect
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.data.columns import Overview
from launcher.errors import ConfigurationError, Problem
from launcher.job.describe import docstring, keys
from launcher.job.yaml_text import parse
from launcher.planner.hardware.gpu_table import gpu_type
from launcher.tasks.task import Task

NONE = ("", "none", "-", "no")
"""Answers that leave an option out."""
SHOWN = 40
"""The most columns of a file that are listed."""


def shown(path: str, seen: Overview) -> list[str]:
    """Return lines that list the columns of a file, with their kinds and a value from the first row."""
    width = shutil.get_terminal_size().columns
    names = max(len(one.name) for one in seen.columns[:SHOWN])
    kinds = max(len(one.kind) for one in seen.columns[:SHOWN])
    header = "" if seen.has_header else "; it has no header, so columns are named by number"
    lines = [f"{path}: {seen.num_rows:,} rows{header}"]
    for one in seen.columns[:SHOWN]:
        example = "" if one.example is None else repr(one.example)
        line = f"  {one.name:{names}}  {one.kind:{kinds}}  {example}"
        lines.append(line if len(line) <= width else f"{line[: width - 3]}...")
    more = len(seen.columns) - SHOWN
    return [*lines, f"  and {more} more columns"] if more > 0 else lines


def given_columns(pairs: Sequence[str], task: type[Task]) -> dict[str, Any]:
    """Return columns by role from flags such as `prompt=question`. Raises ConfigurationError if invalid."""
    roles = list(dict.fromkeys(role for way in task.column_ways for role in way))
    columns: dict[str, Any] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if role not in roles or not equals or not column:
            *first, last = roles
            either = f"{', '.join(first)} or {last}" if first else last
            reason = f"write ROLE=COLUMN, where ROLE is {either}: the columns of {task.name}"
            raise ConfigurationError(Problem("--column", pair, reason))
        columns[role] = column.split(",") if role == "text" and "," in column else column
    return columns


def columns_among(role: str, known: Sequence[str]) -> Callable[[str], Any]:
    """Return a check that accepts the name of a column, or several names separated by commas."""

    def check(text: str) -> Any:
        names = [part.strip() for part in text.split(",")] if text not in known else [text]
        for name in names:
            if name not in known and not re.fullmatch(r"-\d+", name):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                reason = f"no such column; there are {', '.join(known[:SHOWN])}; the nearest is {near}"
                raise ConfigurationError(Problem(f"data.{role}", name, reason))
        return names[0] if len(names) == 1 else names

    return check


def help_of(key: str) -> str:
    """Return the reference's text about a key of the job file; empty for an unknown key."""
    of_key = next((one for one in keys() if one.path == key), None)
    return "" if of_key is None else " ".join(docstring(of_key.section, of_key.name).split())


def in_a_line(task: type[Task]) -> str:
    """Return the task that is learned: the first clause of its class's docstring."""
    text = " ".join((inspect.getdoc(task) or "").split())
    return re.split(r"[.;:](?:\s|$)", text, maxsplit=1)[0]


def share_of(text: str) -> float | None:
    """Return a share above 0 and below 1, written as `10%` or `0.1`; None for anything else."""
    try:
        share = float(text.rstrip(" %")) / (100 if text.rstrip().endswith("%") else 1)
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def parse_value(text: str) -> Any:
    """Return a value as YAML would read it: a number if it is written as one."""
    return parse(text, "answer")


def or_none(text: str) -> str | None:
    """Return an answer unchanged; None if it leaves the option out."""
    return None if text.lower() in NONE else text


def model_in(folder: Path, say: Callable[[str], None], name: str) -> str:
    """Return a model's name as a job file in `folder` has it: for a model in a Python package, its
    directory. Raises ConfigurationError, with the package to install, if the package is missing."""
    from launcher.training.demo.models import PACKAGES, model_directory

    if name not in PACKAGES or (folder / name).is_dir():
        return name
    directory = str(model_directory(name))
    say(f"  {name} is in {directory}")
    return directory


def gpu(text: str) -> str | None:
    """Return a GPU's name from the table; None for an answer that names none. Raises ConfigurationError
    for a GPU that is not in the table."""
    return None if text.lower() in NONE else gpu_type(text, "cluster.gpu").key


def one_of(key: str, choices: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a check that accepts one of some words, and returns its value."""

    def check(text: str) -> Any:
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1, cutoff=0.0)[0]
            raise ConfigurationError(
                Problem(key, text, f"write one of {', '.join(choices)}; the nearest is {near}")
            )
        return choices[text]

    return check
