"""The manifest of a teacher's logits that `launcher predict --logits` wrote ahead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_text
from launcher.values import Section

KEY = "distillation.logits"
MANIFEST = "manifest.json"
TEACHER_LOGITS = "teacher_logits"
"""The key of a batch for the logits that were written for its samples."""
TEACHER_STATES = "teacher_states"
"""The key of a batch for the hidden states that were written for its supervised tokens, [n, width]."""
MATRIX = "teacher's output matrix"
"""The name of the companion that turns hidden states into logits."""
FORMAT = 1
Count = Annotated[int, Field(ge=0)]


class HiddenOutput(Section):
    """Hidden states of a language model, written in the place of its logits, and its output matrix.

    The product of the two is exactly the logits, in a hundredth of their size or less.
    """

    width: Annotated[int, Field(ge=1)]
    """Numbers of a hidden state."""
    num_tokens: Annotated[int, Field(ge=1)]
    """Supervised tokens of all samples."""
    has_bias: bool
    """Whether the matrix has a bias, one number for each logit."""
    scale: float
    """The factor of the product."""
    softcap: float | None
    """The soft cap of the logits, after the factor."""
    matrix_hash: str
    """A hash of the matrix and its bias."""
    num_ids: Annotated[int, Field(ge=1)]
    """One more than the highest token id of the tokenizer."""
    vocabulary_hash: str
    """A hash of the tokenizer's vocabulary."""


class Manifest(Section):
    """The origin of the logits, and their files.

    Classes: `keys.npy`, `logits.npy`, `checks.npy`. A language model: `states.npy` and `ends.npy` in the place
    of `logits.npy`, and `matrix.npy`, with `bias.npy` if it has one.
    """

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    task: str
    problem: str | None
    """The kind of problem of a classification."""
    classes: tuple[str, ...] | None
    """The class names, in order; None for a regression."""
    num_outputs: Annotated[int, Field(ge=1)]
    """Logits of a row, or of a token: the rows of a language model's output matrix."""
    hidden: HiddenOutput | None = None
    """The states and the matrix of a language model; None for classes."""
    num_samples: Annotated[int, Field(ge=1)]
    teacher: dict[str, Any]
    """The run and its step, or the files of a model's directory."""
    precision: Literal["fp32", "fp16", "bf16"]
    """The precision of the computation, in which hidden states are stored; logits are in fp32."""
    data: dict[str, Any]
    """The hashes of the data's files and of the samples, the rows that were used, and for a language model the
    keys of `data` by which they were read (`read_as`)."""
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
        longest = self.data.get("longest", 0) if data.too_long != "drop" else 0
        if self.hidden is not None and longest > data.max_length:
            return (
                f"written of samples of up to {longest:,} tokens, and data.max_length is {data.max_length:,}"
            )
        return ""

    def other_tokenizer(self, num_ids: int, vocabulary_hash: str | None = None) -> str:
        """Return how the tokenizer differs from the one that the samples were written with; empty if it has the
        same tokens, or as many if the hash is not known."""
        if self.hidden is None or (self.hidden.num_ids == num_ids and vocabulary_hash is None):
            return ""
        if self.hidden.num_ids != num_ids:
            return (
                f"written with a tokenizer of {self.hidden.num_ids:,} tokens, and the model's has {num_ids:,}"
            )
        if self.hidden.vocabulary_hash != vocabulary_hash:
            return "written with another tokenizer: its tokens have other numbers than the model's"
        return ""

    def read_otherwise(self, source_hash: str, read_as: Mapping[str, Any]) -> str:
        """Return what differs between the rows that were written and those of a run, in words; empty if nothing
        does, or if it is not known."""
        then = self.data.get("read_as")
        if then is None:
            return ""
        differing = [
            f"data.{key} was {then.get(key)}, and is {value}"
            for key, value in read_as.items()
            if then.get(key) != value
        ]
        if self.data.get("source") != source_hash:
            differing.append("the files of data.train have changed, or are others")
        return "; ".join(differing)

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
