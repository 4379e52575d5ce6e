"""The manifest of a teacher's logits that `launcher predict --logits` wrote ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_text
from launcher.values import Section

KEY = "distillation.logits"
MANIFEST = "manifest.json"
TEACHER_LOGITS = "teacher_logits"
"""The key of a batch for the logits that were written for its samples."""
FORMAT = 1
Count = Annotated[int, Field(ge=0)]


class Manifest(Section):
    """The origin of the logits, and their files: `keys.npy`, `logits.npy`, `checks.npy`."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    task: str
    problem: str | None
    """The kind of problem of a classification."""
    classes: tuple[str, ...] | None
    """The class names, in order; None for a regression."""
    num_outputs: Annotated[int, Field(ge=1)]
    """Logits of a row."""
    num_samples: Annotated[int, Field(ge=1)]
    teacher: dict[str, Any]
    """The run and its step, or the files of a model's directory."""
    precision: str
    data: dict[str, Any]
    """The hashes of the data's files and of the samples, and the rows that were used."""
    files: dict[str, Count]
    """The bytes of each file."""
    digest: str
    """A hash of all logits with their samples."""

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Return the manifest in a directory.

        Raises ConfigurationError if it is missing or damaged, or if a file's size has changed.
        """
        try:
            manifest = cls.model_validate_json(read_text(directory / MANIFEST))
        except FileNotFoundError:
            reason = f"has no {MANIFEST}; `launcher predict TEACHER --job JOB --logits DIR` writes one"
            raise ConfigurationError(Problem(KEY, str(directory), reason)) from None
        except (OSError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            why = ": ".join((*map(str, first["loc"]), first["msg"])) if first else str(error)
            reason = f"its {MANIFEST} is not what was written ({why.splitlines()[0]}); write the logits anew"
            raise ConfigurationError(Problem(KEY, str(directory), reason)) from None
        for name, expected in manifest.files.items():
            file = directory / name
            there = file.stat().st_size if file.is_file() else None
            if there != expected:
                has = "is not there" if there is None else f"has {there:,} bytes"
                reason = f"{name} {has}, and {expected:,} were written; write the logits anew"
                raise ConfigurationError(Problem(KEY, str(directory), reason))
        return manifest

    def unlike(self, task: str, data: Any) -> str:
        """Return how the logits contradict a job's keys; empty if they do not."""
        if self.task != task:
            return f"logits of {self.task}, and the model does {task}"
        if self.problem != getattr(data, "problem", None):
            return f"logits of {self.problem} (data.problem), and the job has {data.problem}"
        return ""

    def other_classes(self, names: tuple[str, ...] | None) -> str:
        """Return how the classes differ from the model's; empty if they are the same, in order."""
        if self.problem is None or self.problem == "regression" or names is None:
            return ""
        by_number = names == tuple(str(number) for number in range(len(names)))
        if names == self.classes or (by_number and self.classes == tuple(f"LABEL_{name}" for name in names)):
            return ""
        own, theirs = _shown(names), _shown(self.classes or ())
        return f"logits of {theirs}, and the model's classes are {own}: they must be the same, in order"


def _shown(names: tuple[str, ...]) -> str:
    classes = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} classes ({classes})"
