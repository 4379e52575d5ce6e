"""Load a job file with `--set` overrides, or report every problem at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.errors import ConfigurationError, Problem
from launcher.job import check, paths, profile
from launcher.job.describe import expected_of, keys
from launcher.job.job_file import read
from launcher.job.problems import refused, translate
from launcher.job.schema import Job
from launcher.job.yaml_text import parse

_PLACEHOLDERS: dict[tuple[str, ...], Any] = {
    ("name",): "job",
    ("model", "name"): "model",
    ("data", "train"): {"path": "train.jsonl"},
}

_ENTRY = re.compile(r"\d{1,9}", re.ASCII)
"""The number of an entry of a list, in a key."""


def override(content: dict[str, Any], overrides: list[str]) -> list[Problem]:
    """Put each `a.b=value` (YAML, or else plain text, as `*.csv`) into `content`; what cannot be put there
    comes back as problems. A number names an entry of a list, from 0: `a.0.b=value`."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        steps = key.strip().split(".")
        if not equals or not all(steps):
            problems.append(Problem("--set", key, "write KEY=VALUE, as training.learning_rate=1e-5"))
            continue
        try:
            parsed = parse(value, f"--set {key}")
        except ConfigurationError as error:
            if value.lstrip().startswith(("[", "{", "'", '"')):
                problems += [Problem(f"--set {key}", None, problem.reason) for problem in error.problems]
                continue
            parsed = value
        if (reason := _put(content, steps, parsed)) is not None:
            problems.append(Problem(f"--set {key}", None, reason))
    return problems


def _put(content: dict[str, Any], steps: list[str], value: Any) -> str | None:
    """Set the value at the path `steps` through sections and lists; return why that is impossible, else None."""
    section: Any = content
    for number, step in enumerate(steps):
        if _ENTRY.fullmatch(step) and isinstance(section, dict) and isinstance(section.get("sources"), list):
            section = section["sources"]  # as a run keeps a list of sources
        if (reason := _no_place(section, ".".join(steps[:number]), step)) is not None:
            return reason
        place: Any = int(step) if isinstance(section, list) else step
        if number == len(steps) - 1:
            section[place] = value
            break
        child = section[place] if isinstance(section, list) else section.get(place)
        if child is None:
            child = section[place] = {}
        section = child
    return None


def _no_place(section: Any, where: str, step: str) -> str | None:
    """Return why what stands at the key `where` has no place for `step`; None where it has one."""
    is_entry = _ENTRY.fullmatch(step) is not None
    if isinstance(section, list):
        if is_entry and int(step) < len(section):
            return None
        if not section:
            return f"{where} is an empty list; write {where}=[...]"
        wrong = f"has no entry {step}" if is_entry else f"is a list, and {step} is no number of an entry"
        return f"{where} {wrong}: they are {where}.0 to {where}.{len(section) - 1}; or write {where}=[...]"
    if not isinstance(section, dict):
        return f"{where.rpartition('.')[2]} is not a section: it holds {type(section).__name__}"
    known = next((key for key in keys() if key.path == where), None)
    if is_entry and known is not None:
        holds = "holds a section of keys" if section else "is not in the job file"
        return f"{where} {holds}, so it has no entry {step}; write it as {expected_of(known.field)}"
    return None


def without(content: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """Return a copy of `content` that a Job can be made of when the refused keys are left out: checks go on
    with the rest."""
    kept = copy.deepcopy(content)
    for key in keys:
        *parents, last = key.split(".")
        section: Any = kept
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    for parents_and_key, value in _PLACEHOLDERS.items():
        section = kept
        for step in parents_and_key[:-1]:
            section = section.setdefault(step, {})
        section.setdefault(parents_and_key[-1], value)
    return kept


def load(
    path: str | Path,
    overrides: list[str] | None = None,
    also: Callable[[Job], Iterable[Problem]] = lambda job: (),
) -> Job:
    """Return the job in the file at `path`, with each `a.b=value` of `overrides` put over it; its paths are
    absolute. `also` yields what else is held against it.

    Raises ConfigurationError with every problem found: unknown keys, values, contradictions, missing files,
    secrets.
    """
    path = Path(path)
    content = read(path)
    problems = override(content, overrides or [])
    job, others = examine(content, path.resolve().parent)
    problems += others
    if job is not None:
        bad = {problem.key for problem in problems}
        problems += [problem for problem in also(job) if not _about(problem.key, bad)]
    if problems or job is None:
        raise ConfigurationError(problems, str(path))
    return job


def examine(content: dict[str, Any], folder: Path) -> tuple[Job | None, list[Problem]]:
    """Return the job of a job file's content, and all that is wrong with it; None where it is none. `content`
    gets what its profile says beside; paths in it are relative to `folder`."""
    problems = refused(content)
    problems += profile.apply(content, folder)
    problems += refused(content)  # of the profile
    job, validated = validate(content)
    problems += validated
    bad = {problem.key for problem in problems}
    if job is None:
        job, _ = validate(without(content, bad))
    if job is not None:
        job, missing = paths.resolve(job, folder)
        problems += [problem for problem in missing if not _about(problem.key, bad)]
        problems += [
            finding.problem
            for finding in check.findings(job)
            if not any(_about(key, bad) for key in finding.keys)
        ]
    return job, problems


def _about(key: str, bad: set[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in bad)


def validate(content: dict[str, Any]) -> tuple[Job | None, list[Problem]]:
    """Return the job, or pydantic's problems with it."""
    try:
        return Job.model_validate(content), []
    except ValidationError as error:
        return None, translate(error, content)
