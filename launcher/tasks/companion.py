"""The name of a frozen model that computes next to the one that trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Companion:
    """A frozen model that a task's loss uses next to the one that trains: the teacher of a distillation."""

    name: str
    """A directory with a Hugging Face model, or a model's name on the hub."""
    key: str
    """The key of the job file that names it, for messages."""
    auto_class: str | None = None
    """The name of its transformers Auto class; None: the task's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    only_matrix: bool = False
    """True for a directory of hidden states written ahead, of which only the output matrix is loaded."""
