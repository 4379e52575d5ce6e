"""The job of a user's own script, which may leave out the sections that the script brings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.data.section import Sources
from launcher.errors import ConfigurationError
from launcher.job import check, paths, profile
from launcher.job.job_file import read
from launcher.job.load import override, validate, without
from launcher.job.problems import refused
from launcher.job.schema import Job

OWN = "(the script's own)"
"""Stands in a plan where the script decides."""
NO_DATA = tasks.find("causal-lm").Columns(train=Sources(name=OWN))
_DECIDED_BY_THE_SCRIPT = ("data", "batch", "training", "checkpoint", "trackers", "tracking")
_CHECKED = ("cluster", "parallel", "memory", "precision", "model.name", "name")


def load(path: Path | None, overrides: list[str], script: Path) -> Job:
    """Return the job in the file at `path`, or an empty one, for `script`. Raises ConfigurationError with
    every problem found."""
    content = {} if path is None else read(path)
    problems = override(content, overrides) + refused(content)
    problems += profile.apply(content, Path.cwd() if path is None else path.resolve().parent)
    problems += refused(content)  # of the profile
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", script.stem).lstrip("._-")[:100]
    content.setdefault("name", name or "script")
    # Something stands in for what a job must have and a script brings.
    for section, key, value in (("model", "name", OWN), ("data", "train", {"name": OWN})):
        if content.get(section) is None:
            content[section] = {}
        if isinstance(content[section], dict):
            content[section].setdefault(key, value)
    job, validated = validate(content)
    problems += validated
    if job is None:
        job, _ = validate(without(content, {problem.key for problem in problems}))
    if job is not None:
        given = job.data
        job, missing = paths.resolve(
            job.model_copy(update={"data": NO_DATA}), Path.cwd() if path is None else path.resolve().parent
        )
        job = job.model_copy(update={"data": given})
        named = {problem.key for problem in problems}
        across = [finding.problem for finding in check.findings(job) if not named & set(finding.keys)]
        problems += [*missing, *(problem for problem in across if problem.key.startswith(_CHECKED))]
    if problems or job is None:
        raise ConfigurationError(problems, "--script" if path is None else str(path))
    return job


def unused(job: Job) -> list[str]:
    """Return what a job sets and a script decides itself, by key."""
    given = job.model_dump(exclude_unset=True, by_alias=True)
    unused_keys = [
        key
        for key in _DECIDED_BY_THE_SCRIPT
        if key in given and (key != "data" or job.data.train.name != OWN)
    ]
    return unused_keys + [f"model.{key}" for key in given.get("model", {}) if key != "name"]


def without_placeholders(content: dict[str, Any]) -> dict[str, Any]:
    """Return a job for job.yaml: what only stands for the script's own is left out again."""
    kept = dict(content)
    if content.get("data", {}).get("train", {}).get("name") == OWN:
        del kept["data"]
    kept["model"] = {key: value for key, value in content.get("model", {}).items() if value != OWN}
    return {key: value for key, value in kept.items() if value or key != "model"}
