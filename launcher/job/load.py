"""Load a job file with `--set` overrides, or report every problem at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.errors import ConfigurationError, Problem
from launcher.job import check, paths, profile
from launcher.job.job_file import read
from launcher.job.problems import refused, translate
from launcher.job.schema import Job
from launcher.job.yaml_text import parse

_PLACEHOLDERS: dict[tuple[str, ...], Any] = {
    ("name",): "job",
    ("model", "name"): "model",
    ("data", "train"): {"path": "train.jsonl"},
}


def override(content: dict[str, Any], overrides: list[str]) -> list[Problem]:
    """Put each `a.b=value` (YAML, or else plain text, as `*.csv`) into `content`; what cannot be put there
    comes back as problems."""
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
        section = content
        for step in steps[:-1]:
            if section.get(step) is None:
                section[step] = {}
            section = section[step]
            if not isinstance(section, dict):
                problems.append(
                    Problem(
                        f"--set {key}", None, f"{step} is not a section: it holds {type(section).__name__}"
                    )
                )
                break
        else:
            section[steps[-1]] = parsed
    return problems


def without(content: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """A copy of `content` that a Job can be made of when the refused keys are left out: checks go on with the
    rest."""
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


def load(path: str | Path, overrides: list[str] | None = None) -> Job:
    """The job in the file at `path`, with each `a.b=value` of `overrides` put over it; its paths are
    absolute.

    Raises ConfigurationError with every problem found: unknown keys, values, contradictions, missing files,
    secrets.
    """
    path = Path(path)
    content = read(path)
    problems = override(content, overrides or [])
    problems += refused(content)
    problems += profile.apply(content, path.resolve().parent)
    problems += refused(content)  # of the profile
    job, validated = validate(content)
    problems += validated
    bad = {problem.key for problem in problems}
    if job is None:
        job, _ = validate(without(content, bad))
    if job is not None:
        job, missing = paths.resolve(job, path.resolve().parent)
        problems += [problem for problem in missing if not _about(problem.key, bad)]
        problems += [
            finding.problem
            for finding in check.findings(job)
            if not any(_about(key, bad) for key in finding.keys)
        ]
    if problems or job is None:
        raise ConfigurationError(problems, str(path))
    return job


def _about(key: str, bad: set[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in bad)


def validate(content: dict[str, Any]) -> tuple[Job | None, list[Problem]]:
    """The job, or what pydantic holds against it."""
    try:
        return Job.model_validate(content), []
    except ValidationError as error:
        return None, translate(error, content)
