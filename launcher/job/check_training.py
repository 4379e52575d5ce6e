"""Checks across the keys of how a job trains: its length, its schedule, its batch, and what stays as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from launcher import tasks
from launcher.job.schema import Job
from launcher.job.training import Training
from launcher.tasks.task import Finding, finding


def findings(job: Job) -> Iterator[Finding]:
    """Yield what is wrong with how a job trains."""
    training, batch = job.training, job.batch
    length = ("training.epochs", "training.max_steps")
    if training.epochs is not None and training.max_steps is not None:
        yield finding(
            "training.max_steps",
            training.max_steps,
            "epochs and max_steps both say how long; leave one out (or set it to null)",
            *length,
        )
    if training.minimum_learning_rate > training.learning_rate:
        reason = (
            f"above learning_rate ({training.learning_rate:g}): the schedule would end higher than it begins"
        )
        yield finding(
            "training.minimum_learning_rate", training.minimum_learning_rate, reason, "training.learning_rate"
        )
    yield from _unfreeze(job)
    yield from _schedule(training)
    yield from _optimizer(training)
    if job.parallel.engine == "deepspeed" and (problem := cut_flat(training)) is not None:
        yield finding(*problem, "parallel.engine")
    yield from _near_the_start(job)
    traits = tasks.find(job.model.task).traits
    if training.neftune_noise_alpha is not None and (traits.encoder_decoder or traits.unit != "token"):
        reason = (
            "noise is for models that read one sequence of tokens; a model of this task reads "
            + ("two, with one table" if traits.encoder_decoder else f"{traits.unit}s")
            + "; leave it out"
        )
        yield finding("training.neftune_noise_alpha", training.neftune_noise_alpha, reason, "model.task")
    if training.warmup >= 1 and training.warmup != int(training.warmup):
        yield finding(
            "training.warmup",
            training.warmup,
            "from 1 it is a number of steps, and steps are whole; below 1 it is a share of all steps",
        )
    elif training.max_steps is not None and training.warmup > training.max_steps:
        reason = f"longer than the whole training of {training.max_steps} steps"
        yield finding("training.warmup", training.warmup, reason, *length)
    if batch.micro_batch_size != "auto" and batch.micro_batch_size > batch.global_batch_size:
        reason = (
            f"above global_batch_size ({batch.global_batch_size}); one rank's pass cannot hold more than "
            "the whole step"
        )
        yield finding("batch.micro_batch_size", batch.micro_batch_size, reason, "batch.global_batch_size")


def _unfreeze(job: Job) -> Iterator[Finding]:
    """Yield what is wrong with the order of `model.unfreeze`: top down, one after another."""
    model = job.model
    if model.unfreeze and not model.freeze.by_depth:
        reason = (
            "nothing is frozen by depth (model.freeze: layers, embeddings, base), so nothing is there to open"
        )
        yield finding("model.unfreeze", None, reason, "model.freeze")
    for earlier, later in itertools.pairwise(model.unfreeze):
        if (earlier.at < 1) != (later.at < 1):
            reason = "one entry says a share of all steps and another a number; write all of them alike"
            yield finding("model.unfreeze", f"{later.at:g}", reason)
        elif later.at <= earlier.at:
            reason = f"comes after the entry at {earlier.at:g}, and entries stand in their order in time"
            yield finding("model.unfreeze", f"{later.at:g}", reason)
    for number, one in enumerate(model.unfreeze if job.training.max_steps else ()):
        if one.at >= job.training.max_steps:  # type: ignore[operator]
            reason = f"never comes: the training has {job.training.max_steps} steps"
            yield finding("model.unfreeze", f"{one.at:g} (entry {number})", reason, "training.max_steps")


def _near_the_start(job: Job) -> Iterator[Finding]:
    """Yield problems of `l2_sp`: no pretrained weights to stay near, or a step that goes beyond them."""
    training, key = job.training, "training.l2_sp.alpha"
    if (near := training.l2_sp) is None:
        return
    if job.model.adapter is not None:
        reason = "an adapter leaves the weights where they are, so they stay near; leave it out"
        yield finding("training.l2_sp", None, reason, "model.adapter")
    if job.model.weights == "random":
        reason = "random weights are no place to stay near; leave it out, or write model.weights: pretrained"
        yield finding("training.l2_sp", None, reason, "model.weights")
    rates = [group.learning_rate or 0.0 for group in training.groups]
    if near.fisher is None and near.alpha * (highest := max([training.learning_rate, *rates])) > 1:
        reason = (
            f"times the highest learning rate ({highest:g}) is above 1: a step would go beyond the start; "
            f"write {1 / highest:g} or less"
        )
        yield finding(key, near.alpha, reason, "training.learning_rate")


def cut_flat(training: Training) -> tuple[str, str, str] | None:
    """Return the key, the value and the reason if the optimizer does not work under ZeRO, which shards
    parameters into flat pieces."""
    if training.moments == "8bit":
        reason = (
            "has a scale for each block of a matrix's rows, and ZeRO cuts parameters into flat pieces; write "
            "parallel.engine: fsdp, or bf16"
        )
        return "training.moments", training.moments, reason
    if not training.needs_whole_rows:
        return None
    reason = (
        "works on matrices, by whole ones or by rows and columns, and ZeRO cuts parameters into flat pieces; "
        "write parallel.engine: fsdp, or adamw"
    )
    return "training.optimizer", training.optimizer, reason


_OF_OPTIMIZERS = {
    "moments": ("adamw", "adam"),
    "betas": ("adamw", "adam", "muon"),
    "epsilon": ("adamw", "adam", "muon"),
    "momentum": ("sgd", "muon"),
}


def _optimizer(training: Training) -> Iterator[Finding]:
    """Yield keys of another optimizer than the one that is asked for."""
    for key, optimizers in _OF_OPTIMIZERS.items():
        value = getattr(training, key)
        if training.optimizer not in optimizers and value != Training.model_fields[key].default:
            reason = f"is a key of {', '.join(optimizers)}, and training.optimizer is {training.optimizer}"
            yield finding(f"training.{key}", value, f"{reason}; leave it out", "training.optimizer")


EARLIER_DEFAULTS: dict[str, object] = {"power": 2.0, "decay_shape": "linear"}
"""Defaults of `training` before 2026-11-30: a run of then that leaves such a key out keeps its value. One that
tested rates has it in its job."""
_OF_SCHEDULES = {
    "decay": "warmup-stable-decay",
    "decay_shape": "warmup-stable-decay",
    "restarts": "cosine-restarts",
    "power": "polynomial",
    "start_division": "one-cycle",
    "stop_factor": "range-test",
}


def _schedule(training: Training) -> Iterator[Finding]:
    """Yield keys of another schedule than the one that is asked for, and a fall that is no whole number of
    steps."""
    for key, schedule in _OF_SCHEDULES.items():
        value = getattr(training, key)
        default = Training.model_fields[key].default
        if training.schedule != schedule and value not in (default, EARLIER_DEFAULTS.get(key, default)):
            reason = f"is a key of the schedule {schedule}, and training.schedule is {training.schedule}"
            yield finding(f"training.{key}", value, f"{reason}; leave it out", "training.schedule")
    if training.decay >= 1 and training.decay != int(training.decay):
        reason = "from 1 it is a number of steps, and steps are whole; below 1 it is a share of all steps"
        yield finding("training.decay", training.decay, reason)
    if training.is_range_test:
        yield from _range_test(training)
    if training.schedule == "one-cycle" and training.start_division * training.minimum_learning_rate > (
        training.learning_rate
    ):
        reason = (
            f"above the first rate, {training.learning_rate / training.start_division:g}: the end is lower"
        )
        yield finding("training.minimum_learning_rate", training.minimum_learning_rate, reason)


def _range_test(training: Training) -> Iterator[Finding]:
    """Yield what a rate that only grows, in a run that saves nothing, has no use for."""
    lowest = training.minimum_learning_rate
    if lowest == 0 or lowest == training.learning_rate:
        reason = (
            "a range test begins there, and grows by the same factor at each step up to learning_rate "
            f"({training.learning_rate:g}): write a rate above 0 and below that, as "
            f"{training.learning_rate / 1e7:g}"
        )
        yield finding("training.minimum_learning_rate", lowest, reason, "training.schedule")
    if training.warmup > 0:
        reason = "a range test has no warm-up, as its rate grows from the first step on; write 0"
        yield finding("training.warmup", training.warmup, reason, "training.schedule")
    if training.on_spike.action == "rewind":
        reason = "a range test saves nothing that it could go back to; write ignore"
        yield finding("training.on_spike.action", "rewind", reason, "training.schedule")
