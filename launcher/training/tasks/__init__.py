"""The tasks by name. Their modules are imported only when they are asked for."""

from __future__ import annotations

import importlib

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Data
from launcher.training.tasks.task import Task

TASKS = {
    "causal-lm": ("launcher.training.tasks.causal_lm", "CausalLM"),
    "sequence-classification": ("launcher.training.tasks.sequence_classification", "SequenceClassification"),
}


def create(name: str, data: Data, labels: list[str] | None = None) -> Task:
    """The task of this name. `labels` are the classes of a model that has them already. Raises ConfigurationError for an unknown name."""
    if name not in TASKS:
        raise ConfigurationError(Problem("model.task", name, f"no such task; there are {', '.join(TASKS)}"))
    module, attribute = TASKS[name]
    task: Task = getattr(importlib.import_module(module), attribute)(data, labels)
    return task
