"""Name a frozen model that computes beside the one that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Companion:
    """A frozen model that a task's loss asks beside the one that trains, as the teacher of a distillation."""

    name: str
    """A directory with a Hugging Face model, or a model's name on the hub."""
    auto_class: Any
    """The transformers Auto class that makes it."""
    key: str
    """The key of the job file that names it, for messages."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
