"""The job file that `launcher init` writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import ConfigurationError, Problem
from launcher.job.load import load
from launcher.job.reference import schema_text

SCHEMA_FILE = "job.schema.json"
_HEAD = f"""# yaml-language-server: $schema={SCHEMA_FILE}
# Every key: `launcher schema`. Check: `launcher validate`. What will run: `launcher plan`.
"""


@dataclass(frozen=True)
class Answers:
    """Hold what `launcher init` asks for."""

    name: str
    model: str
    task: str
    train: str
    evaluation: str | None = None
    columns: tuple[tuple[str, Any], ...] = ()
    """What each column of the data is, as (("prompt", "question"), ("completion", "answer"))."""


def name_for(model: str, train: str) -> str:
    """A name for a run, made of the model's and the file's."""
    text = f"{Path(model).name}-{Path(train).stem}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", text).strip("-._")[:100] or "job"


def text(answers: Answers) -> str:
    """The job file, with a hint for YAML editors and the keys that most people change."""
    data: dict[str, Any] = {"train": {"path": answers.train}}
    if answers.evaluation:
        data["evaluation"] = {"path": answers.evaluation}
    data |= dict(answers.columns)
    content = {
        "name": answers.name,
        "model": {"name": answers.model, "task": answers.task},
        "data": data,
        "batch": {"global_batch_size": 32},
        "training": {"epochs": 1, "learning_rate": 2e-05},
    }
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return _HEAD + body


def write(path: Path, answers: Answers, overwrite: bool = False) -> None:
    """Write the job file and the schema beside it, and load it to see that it holds.

    Raises ConfigurationError where the file is there already or the answers make no valid job; then nothing
    is left behind.
    """
    if path.exists() and not overwrite:
        raise ConfigurationError(
            Problem("--out", str(path), "is there already; name another file, or --force to write over it")
        )
    if not path.parent.is_dir():
        raise ConfigurationError(Problem("--out", str(path), f"the folder {path.parent} is not there"))
    trial = path.with_name(f".{path.name}.trial")
    try:
        trial.write_text(text(answers), encoding="utf-8")
        try:
            load(trial)
        except ConfigurationError as error:
            raise ConfigurationError(error.problems, str(path)) from None
        trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)
    path.with_name(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
