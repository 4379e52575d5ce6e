"""The job file that `launcher init` writes, whole or with the answers so far."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import ConfigurationError, Problem
from launcher.job.job_file import read
from launcher.job.load import load
from launcher.job.reference import schema_text
from launcher.job.schema import Job, Model

SCHEMA_FILE = "job.schema.json"
_HEAD = f"""# yaml-language-server: $schema={SCHEMA_FILE}
# Every key: `launcher schema`. Check: `launcher validate`. What will run: `launcher plan`.
"""


def name_for(model: str, train: str) -> str:
    """Return a name for a run, made of the model's and the file's."""
    text = f"{Path(model).name}-{Path(train).stem}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", text).strip("-._")[:100] or "job"


def value_at(content: dict[str, Any], key: str) -> Any:
    """Return what the content of a job file has at a key, as `data.train.path`; None where it has nothing."""
    value: Any = content
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of the content of a job file; None takes it out, and a section that is then empty too."""
    first, dot, rest = key.partition(".")
    if not dot:
        content.pop(first, None)
        if value is not None:
            content[first] = value
        return
    section = content.setdefault(first, {})
    put(section, rest, value)
    if not section:
        del content[first]


def text(content: dict[str, Any]) -> str:
    """Return the job file, in the order of the schema, with a hint for YAML editors."""
    ordered = {key: content[key] for key in Job.model_fields if key in content}
    if "model" in ordered:
        ordered["model"] = {
            key: ordered["model"][key] for key in Model.model_fields if key in ordered["model"]
        }
    return _HEAD + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, default_flow_style=False)


def refuse_place(path: Path, overwrite: bool) -> None:
    """Raise ConfigurationError where a job file cannot be written: it is there already, or its folder is not."""
    if path.exists() and not overwrite:
        raise ConfigurationError(
            Problem("--out", str(path), "is there already; name another file, or --force to write over it")
        )
    if not path.parent.is_dir():
        raise ConfigurationError(Problem("--out", str(path), f"the folder {path.parent} is not there"))


def write(path: Path, content: dict[str, Any], overwrite: bool = False) -> None:
    """Write the job file and the schema beside it, and load it to see that it holds.

    Raises ConfigurationError as `refuse_place`, and where the answers make no valid job; then nothing is left
    behind.
    """
    refuse_place(path, overwrite)
    trial = path.with_name(f".{path.name}.trial")
    try:
        trial.write_text(text(content), encoding="utf-8")
        try:
            load(trial)
        except ConfigurationError as error:
            raise ConfigurationError(error.problems, str(path)) from None
        trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)
    path.with_name(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")


def unfinished(path: Path) -> Path:
    """Return the file beside a job file that keeps the answers until there are all of them."""
    return path.with_name(f"{path.stem}.unfinished.yaml")


def keep(path: Path, content: dict[str, Any]) -> None:
    """Keep the answers so far, so that whatever ends the questions loses none of them."""
    head = f"# The answers so far; `launcher init --out {path.name}` goes on with them.\n"
    draft = unfinished(path)
    trial = draft.with_name(f".{draft.name}.trial")
    trial.write_text(head + text(content).removeprefix(_HEAD), encoding="utf-8")
    trial.replace(draft)


def kept(path: Path) -> dict[str, Any]:
    """Return the answers that were kept for a job file; none where there are none. Raises ConfigurationError
    where they cannot be read."""
    return read(unfinished(path)) if unfinished(path).is_file() else {}
