"""The conversion of foreign files into a job file, with remarks on every key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import ConfigurationError, Problem
from launcher.importing import command_line, foreign_files
from launcher.importing.merge import JOB_KEYS, MODEL, TRAIN, job_content, merge
from launcher.importing.reading import Reading, Remark
from launcher.job.load import validate, without
from launcher.job.problems import refused
from launcher.job.schema import Training

COMMAND = "command line"
_COLUMNS = {"text", "prompt", "messages", "source"}
"""The columns of which a job has at least one once they are known."""


@dataclass(frozen=True)
class Imported:
    """The job file, and the remarks on each key."""

    content: dict[str, Any]
    text: str
    remarks: tuple[Remark, ...]
    commands: tuple[str, ...] = ()
    """Commands to run before the job."""


def import_files(paths: list[Path], words: list[str] | None = None) -> Imported:
    """Return the job of the files and the words of a command line together.

    Raises ConfigurationError with every problem: unreadable files, invalid values, numbers that do not divide.
    """
    readings: list[Reading] = []
    problems: list[Problem] = []
    folders: dict[str, Path] = {}
    for path in paths:
        try:
            readings.append(foreign_files.read(path))
            folders[str(path)] = path.parent
        except ConfigurationError as error:
            problems += error.problems
    if words:
        reading = Reading(COMMAND)
        command_line.read(words, reading)
        readings.append(reading)
    try:
        foreign_files.follow(readings, folders)
    except ConfigurationError as error:
        problems += error.problems
    if not paths and not words:
        problems.append(Problem("FILE", None, "is missing: name files, or write a command line after --"))
    merged = merge(readings)
    problems += merged.problems
    content = _whole(job_content(merged, [str(path) for path in paths]))
    problems += _unfit(content, merged.facts) if not problems else []
    if problems:
        raise ConfigurationError(problems)
    data = content["data"]
    open_keys = []
    if content["model"]["name"] == MODEL:
        open_keys.append(("model.name", MODEL, "the model's directory or its name on the hub"))
    if isinstance(data["train"], dict) and data["train"].get("path") == TRAIN:
        open_keys.append(("data.train", TRAIN, "the rows to learn from"))
    if not data.keys() & _COLUMNS:
        text = "which columns are what: text, or prompt and completion, or messages, or text and label"
        open_keys.append(("data", "(no column)", text))
    placeholders = [Remark("fill in", "(no file)", *one) for one in open_keys]
    remarks = (*merged.remarks, *placeholders, *_left_to_launcher(merged.facts))
    commands = tuple(dict.fromkeys(command for reading in readings for command in reading.commands))
    return Imported(content, _text(content, readings, remarks), remarks, commands)


def _whole(value: Any) -> Any:
    """Return the same value with 2.0 as 2."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() and value < 1e6 else value


def _left_to_launcher(facts: dict[str, Any]) -> list[Remark]:
    """Return remarks on settings that no file has: launcher's defaults, which may differ from the script's."""
    names = {key: Training.model_fields[key].default for key in ("learning_rate", "schedule", "warmup")}
    left = [f"{key} {value}" for key, value in names.items() if f"training.{key}" not in facts]
    left += [] if {"training.epochs", "training.max_steps"} & facts.keys() else ["epochs 1"]
    text = "no file says these: launcher's own defaults stand, so write what the source has"
    return [Remark("fill in", "(no file)", "training", ", ".join(left), text)] if left else []


def _unfit(content: dict[str, Any], facts: dict[str, Any]) -> list[Problem]:
    """Return the problems of the job file itself, each with the foreign key that caused it."""
    sources = {JOB_KEYS.get(key, key): f"{fact.source}: {fact.said}" for key, fact in facts.items()}
    kept = without(content, set())
    problems = refused(kept)
    secrets = {problem.key for problem in problems}
    problems += [problem for problem in validate(kept)[1] if problem.key not in secrets]
    return [Problem(sources.get(one.key, one.key), one.value, one.reason) for one in problems]


def _text(content: dict[str, Any], readings: list[Reading], remarks: Sequence[Remark]) -> str:
    head = [
        f"# Made by `launcher import` of {', '.join(reading.source for reading in readings)}.".replace(
            "\n", " "
        )
    ]
    head.append(
        "# What is marked `fill in` no file said; `launcher validate` says whether anything is missing."
    )
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    body = re.sub(r"^(  warmup: [1-9]\d*)$", r"\1   # steps", body, flags=re.MULTILINE)
    body = body.replace(f"{MODEL}\n", f"{MODEL}   # fill in: a directory, or a name on the hub\n")
    columns = ", and which columns are what: text, or prompt and completion, or messages"
    columns = "" if content["data"].keys() & _COLUMNS else columns
    body = body.replace(f"{TRAIN}\n", f"{TRAIN}   # fill in{columns}\n")
    body = re.sub(r"(FILL-IN\S*)\n", r"\1   # fill in\n", body)
    for remark in remarks:
        batch = re.match(r"batch\.(global_batch_size) = (\d+): (.*)", remark.text)
        if remark.kind == "fill in" and batch:
            line = f"  {batch[1]}: {batch[2]}\n"
            body = body.replace(line, f"{line[:-1]}   # fill in: {batch[3]}\n")
    return "\n".join([*head, body])
