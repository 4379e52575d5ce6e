"""Logits of a teacher that `launcher predict --logits` wrote ahead: what their directory says of itself."""

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
"""Under this name a batch has what was written of it."""
FORMAT = 1
Count = Annotated[int, Field(ge=0)]


class Manifest(Section):
    """Hold what the logits are of, and the files that they are in: `keys.npy`, `logits.npy`, `checks.npy`."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    task: str
    problem: str | None
    """Of a classification."""
    classes: tuple[str, ...] | None
    """Their names, in order; None of a number."""
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
        """Return what a directory says of itself.

        Raises ConfigurationError where there is none, it is damaged, or a file has not the size that it was
        written with.
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
        """Return in what the logits do not suit a job, as far as its keys say; empty where they do."""
        if self.task != task:
            return f"logits of {self.task}, and the model does {task}"
        if self.problem != getattr(data, "problem", None):
            return f"logits of {self.problem} (data.problem), and the job has {data.problem}"
        return ""

    def other_classes(self, names: tuple[str, ...] | None) -> str:
        """Return in what the classes differ from the model's; empty where they are the same, in order."""
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
