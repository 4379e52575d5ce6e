"""Choose the checkpoint of a teacher's run, and check whether precomputed logits fit a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Model
from launcher.planner.decider import Decider
from launcher.planner.model.model_config import config_of, locate
from launcher.planner.model.model_shape import Stack
from launcher.planner.model.vocabulary import read_vocabulary
from launcher.planner.plan import Plan, Precision
from launcher.runs.checkpoints import Stored, list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.runs.retention import best
from launcher.runs.wording import size
from launcher.tasks.distillation import Distillation
from launcher.tasks.mixed import measured
from launcher.tasks.written_logits import KEY, Manifest

_KEY = "distillation.checkpoint"


def settle(decider: Decider, precision: Precision) -> Distillation | None:
    """Return the job's section `distillation`, with the checkpoint's step if the teacher is a run. Problems
    go to the decider. `precision` is the run's."""
    distillation = decider.job.distillation
    if distillation is None:
        return None
    if distillation.logits is not None:
        _written_ahead(decider, distillation.logits, precision)
        return distillation
    assert distillation.teacher is not None
    if _lacks_head(decider.job.model, distillation):
        reason = "it has no classification head, so that it has nothing to teach"
        decider.refuse("distillation.teacher", distillation.teacher, reason)
    if distillation.hidden_states is not None:
        decider.problems += _hidden_states(decider.job.model, distillation)
    run = RunDirectory(Path(distillation.teacher).parent)
    if Path(distillation.teacher).name != "model" or not run.plan_file.is_file():
        if distillation.checkpoint is not None:
            decider.refuse(_KEY, distillation.checkpoint, "the teacher is no run, and has none; leave it out")
        return distillation
    try:
        plan = Plan.read(run.plan_file)
    except ConfigurationError as error:
        decider.refuse("distillation.teacher", str(run.path), error.problems[0].reason)
        return distillation
    whole = [stored for stored in list_checkpoints(run) if not stored.problems]
    steps = [stored.step for stored in whole]
    if plan.script or plan.task != decider.job.model.task:
        does = "runs a script of its own" if plan.script else f"is a run of {plan.task}"
        reason = f"{does}, and what learns from it does {decider.job.model.task}"
        decider.refuse("distillation.teacher", str(run.path), reason)
    elif tasks.virtual_tokens(plan.model):
        reason = (
            "trains virtual tokens, which are no part of the weights that a teacher is read from; name a run "
            "with another adapter"
        )
        decider.refuse("distillation.teacher", str(run.path), reason)
    elif not whole:
        decider.refuse("distillation.teacher", str(run.path), "has no whole checkpoint yet")
    elif distillation.checkpoint is None:
        step, reason = _chosen(plan, whole)
        decider.decide(_KEY, step, reason)
        return distillation.model_copy(update={"checkpoint": step})
    elif distillation.checkpoint not in steps:
        has = ", ".join(map(str, steps[-6:]))
        decider.refuse(_KEY, distillation.checkpoint, f"{run.path.name} has no such checkpoint; it has {has}")
    return distillation


def left_open(decider: Decider) -> dict[str, str | int | float | bool]:
    """Return the job's values of `data` that are decided when a run is planned. If a language model's hidden
    states were written ahead, they are those of its samples: the date that a chat template writes is one."""
    job = decider.job
    left = list(tasks.of_job(job).left_open())
    then: dict[str, Any] = {}
    if left and job.distillation is not None and job.distillation.logits is not None:
        then = Manifest.read(Path(job.distillation.logits)).data.get("read_as") or {}
    return {
        one.key: decider.decide(
            f"data.{one.key}",
            then.get(one.key) or one.value,
            f"as {KEY} were written" if then.get(one.key) else one.reason,
        )
        for one in left
    }


def _written_ahead(decider: Decider, directory: str, precision: Precision) -> None:
    """Compare the job with a teacher's logits that were written ahead, as far as the files here tell."""
    job = decider.job
    try:
        manifest = Manifest.read(Path(directory))
    except ConfigurationError as error:
        decider.problems += error.problems
        return
    vocabulary = read_vocabulary(locate(job.model.name, job.model.revision))
    reason = manifest.unlike(job.model.task, job.data)
    if not reason and vocabulary is not None:
        reason = manifest.other_tokenizer(vocabulary.num_ids)
    if reason:
        decider.refuse(KEY, directory, reason)
        return
    if (hidden := manifest.hidden) is None:
        return
    what = (
        f"hidden states of {hidden.num_tokens:,} tokens and an output matrix, "
        f"{size(sum(manifest.files.values()))}, of {manifest.teacher.get('name')}"
    )
    if manifest.precision != precision:
        what += f"; they were computed in {manifest.precision}, as a teacher in this run's {precision} is not"
    decider.decide(KEY, directory, what)


def _lacks_head(model: Model, distillation: Distillation) -> bool:
    """Return whether a classification teacher lacks a classification head, as far as its config tells."""
    head = getattr(tasks.find(model.task), "head_name", None)
    teacher = config_of(_named(distillation, model)) or {}
    known = () if teacher.get("auto_map") else teacher.get("architectures") or ()
    return bool(head and known) and not any(str(name).endswith(f"For{head}") for name in known)


def _named(distillation: Distillation, model: Model) -> Model:
    assert distillation.teacher is not None
    return Model(name=distillation.teacher, revision=distillation.revision, task=model.task)


def _hidden_states(model: Model, distillation: Distillation) -> tuple[Problem, ...]:
    """Return the problems of comparing hidden states, as far as the configs are here."""
    assert distillation.hidden_states is not None
    configs = [config_of(one) for one in (model, _named(distillation, model))]
    if any(config.get("is_encoder_decoder") for config in configs if config is not None):
        reason = (
            "an encoder-decoder has two stacks of layers, and it is not said which to compare; leave it out"
        )
        return (Problem("distillation.hidden_states", None, reason),)
    own, other = map(Stack.of, configs)
    if own is None or other is None:
        return ()
    try:
        distillation.hidden_states.pairs(own.num_layers, other.num_layers)
    except ConfigurationError as error:
        return tuple(error.problems)
    return ()


def _chosen(plan: Plan, whole: list[Stored]) -> tuple[int, str]:
    """Return the chosen step of a run, and the reason."""
    metric = plan.checkpoint.metric
    ranked = best(whole, 1, metric, measured(tasks.unprepared(plan)).get(metric, "lower"))
    if plan.checkpoint.keep_best and ranked:
        return ranked[0].step, f"the best {metric} of those that the teacher's run kept"
    return whole[-1].step, "the newest of the teacher's run"
