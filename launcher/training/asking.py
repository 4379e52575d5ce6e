"""Predictions of a sharded model for given samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.tasks.task import AnswerOptions, Sample, Task
from launcher.training.devices import to_device
from launcher.training.engines.engine import Engine
from launcher.training.evaluation import written


def says(task: Task) -> bool:
    """Return whether a task implements `answers`; a task from the user's own package may not."""
    return type(task).answers is not Task.answers


def refuse_silent(task: Task) -> None:
    """Raise ConfigurationError for a task without `answers`."""
    if not says(task):
        reason = (
            f"{type(task).__name__} has no method `answers`, so that nothing can be said of a row; write one"
        )
        raise ConfigurationError(Problem("model.task", task.name, reason))


def ask(
    engine: Engine,
    task: Task,
    samples: Sequence[Sample],
    options: AnswerOptions,
    plan: Plan,
    leaving: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """Return the model's prediction for each sample as a JSON value; padding samples get none. Called by all
    ranks together.

    `leaving` is called before every generated token, on each rank by itself; True cuts that rank's texts
    short.
    """
    batch = task.collate([[sample] for sample in samples])
    output = engine.evaluate(to_device(batch, plan.mesh.device))
    if task.generates:
        items = [[sample] for sample in samples]
        output = output._replace(generated=written(engine, task, items, plan.mesh.device, leaving))
    message = task.answers(output, batch, samples, options)
    return [one for one, sample in zip(message, samples, strict=True) if sample.weight]
