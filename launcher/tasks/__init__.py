"""Tasks by name: what a model learns to do. A task's module is imported at its first use."""

from __future__ import annotations

import difflib
import functools
import importlib
from typing import TYPE_CHECKING, Any, Protocol

from launcher.errors import ConfigurationError, Problem

if TYPE_CHECKING:
    from launcher.tasks.distillation import Distillation
    from launcher.tasks.generation import Evaluation
    from launcher.tasks.task import Task

TASKS = {
    "audio-classification": "launcher.tasks.audio_classification:AudioClassification",
    "causal-lm": "launcher.tasks.causal_lm:CausalLM",
    "image-classification": "launcher.tasks.image_classification:ImageClassification",
    "image-text-to-text": "launcher.tasks.image_text_to_text:ImageTextToText",
    "image-to-text": "launcher.tasks.image_to_text:ImageToText",
    "masked-lm": "launcher.tasks.masked_lm:MaskedLM",
    "multi-task": "launcher.tasks.multi_task:MultiTask",
    "question-answering": "launcher.tasks.question_answering:QuestionAnswering",
    "sequence-classification": "launcher.tasks.sequence_classification:SequenceClassification",
    "sequence-to-sequence": "launcher.tasks.sequence_to_sequence:SequenceToSequence",
    "speech-recognition": "launcher.tasks.speech_recognition:SpeechRecognition",
    "token-classification": "launcher.tasks.token_classification:TokenClassification",
}
GROUP = "launcher.tasks"
"""The entry point group of installed packages' own tasks: `name = "package.module:Class"`."""


class Planned(Protocol):
    """The part of a plan from which a task is built."""

    @property
    def task(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def data(self) -> Any: ...
    @property
    def layout(self) -> Any: ...
    @property
    def head(self) -> Any: ...
    @property
    def evaluation(self) -> Evaluation | None: ...
    @property
    def distillation(self) -> Distillation | None: ...


class Asked(Protocol):
    """The part of a job from which a task is built."""

    @property
    def model(self) -> Any: ...
    @property
    def data(self) -> Any: ...
    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def distillation(self) -> Distillation | None: ...


@functools.cache
def find(name: str) -> type[Task]:
    """Return the class of a task by its name. Raises ConfigurationError with the nearest name for an unknown
    one."""
    if name in TASKS:
        module, _, attribute = TASKS[name].partition(":")
        built_in: type[Task] = getattr(importlib.import_module(module), attribute)
        return built_in
    from importlib import metadata  # takes as long to import as the rest of `launcher validate`'s own modules

    for entry in metadata.entry_points(group=GROUP, name=name):
        own: type[Task] = entry.load()
        return own
    known = names()
    begun = [other for other in known if name and other.startswith(name)]
    near = (begun or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]
    raise ConfigurationError(
        Problem("model.task", name, f"no such task; there are {', '.join(known)}; the nearest is {near}")
    )


def names() -> list[str]:
    """Return the name of every task: launcher's own, and those of installed packages."""
    from importlib import metadata

    return [*TASKS, *sorted(metadata.entry_points(group=GROUP).names)]


def names_of(name: str, data: Any) -> list[str]:
    """Return the names of the tasks that a model learns: `model.task` alone, or those of a multi-task job."""
    parts = find(name)(data).parts
    return list(dict.fromkeys(part.name for part in parts.values())) or [name]


def of_job(job: Asked) -> Task:
    """Return a job's task, without a processor. Raises ConfigurationError for an unknown one."""
    task = find(job.model.task)(job.data)
    task.evaluation, task.distillation = job.evaluation, job.distillation
    task.virtual_tokens, task.virtual_prefix = virtual_tokens(job.model), _is_prefix(job.model)
    return task


def build(plan: Planned, processor: Any, labels: list[str] | None = None) -> Task:
    """Return the plan's task, prepared with the model's processor. `labels` are the classes that the model
    already has, if any.

    Raises ConfigurationError for an unknown task, or a processor that cannot serve it.
    """
    task = unprepared(plan, labels)
    task.prepare(processor)
    return task


def unprepared(plan: Planned, labels: list[str] | None = None) -> Task:
    """Return the plan's task without a processor: for its model and loss, not for data. Raises
    ConfigurationError for an unknown one."""
    task = find(plan.task)(plan.data, labels)
    task.layout, task.head = plan.layout, plan.head
    task.evaluation, task.distillation = plan.evaluation or task.evaluation, plan.distillation
    task.virtual_tokens, task.virtual_prefix = virtual_tokens(plan.model), _is_prefix(plan.model)
    return task


def virtual_tokens(model: Any) -> int:
    """Return the number of virtual tokens before each sample, by the section `model` of a job or a plan."""
    adapter = model.adapter
    return adapter.virtual_tokens if adapter is not None and adapter.is_prompt else 0


def _is_prefix(model: Any) -> bool:
    return model.adapter is not None and model.adapter.is_prefix
