"""The tasks by name. Their modules are imported only when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.planning.plan import Plan
from launcher.training.tasks.task import Task

TASKS = {
    "causal-lm": ("launcher.training.tasks.causal_lm", "CausalLM"),
    "sequence-classification": ("launcher.training.tasks.sequence_classification", "SequenceClassification"),
}


def build(plan: Plan, tokenizer: Any, labels: list[str] | None = None) -> Task:
    """The plan's task, bound to the tokenizer. `labels` are the classes of a model that has them already.

    Raises ConfigurationError for an unknown task, or a tokenizer that cannot serve it.
    """
    task = unbound(plan, labels)
    task.bind(tokenizer)
    return task


def unbound(plan: Plan, labels: list[str] | None = None) -> Task:
    """The plan's task without a tokenizer: its model and its loss, no data. Raises ConfigurationError for an unknown one."""
    if plan.task not in TASKS:
        raise ConfigurationError(Problem("model.task", plan.task, f"no such task; there are {', '.join(TASKS)}"))
    module, attribute = TASKS[plan.task]
    task: Task = getattr(importlib.import_module(module), attribute)(plan.data, labels)
    task.layout, task.head = plan.layout, plan.head
    return task
