"""Checks across the keys of a job: each says the key, the value and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from launcher import tasks
from launcher.job import check_adapter, check_sources, check_streaming, slurm_options
from launcher.job.schema import Cluster, Job
from launcher.job.training import Training
from launcher.tasks.mixed import not_measured
from launcher.tasks.task import Finding, finding


def findings(job: Job) -> Iterator[Finding]:
    """Everything in a job that contradicts itself."""
    yield from check_sources.findings(job)
    yield from check_streaming.findings(job)
    yield from tasks.of_job(job).checks()
    yield from check_adapter.findings(job)
    yield from _training(job)
    yield from _evaluation(job)
    yield from _distillation(job)
    yield from _machine(job)
    yield from _slurm(job.cluster)


def _training(job: Job) -> Iterator[Finding]:
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
    if training.moments != "fp32" and training.optimizer not in ("adamw", "adam"):
        reason = f"is of Adam's moments, and training.optimizer is {training.optimizer}; leave it out"
        yield finding("training.moments", training.moments, reason, "training.optimizer")
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
    """Yield what goes against staying near the start: none that was learned, or a step beyond it."""
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
        if training.schedule != schedule and value != Training.model_fields[key].default:
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


def _evaluation(job: Job) -> Iterator[Finding]:
    for key in sorted(job.evaluation.model_fields_set) if not tasks.find(job.model.task).writes else ():
        if (value := getattr(job.evaluation, key)) is not None:
            shown = value if isinstance(value, str) else None
            reason = f"the model of a {job.model.task} task writes nothing; leave it out"
            yield finding(f"evaluation.{key}", shown, reason, "model.task")
    if job.data.evaluation is not None:
        yield from _metrics(job)
        return
    if job.training.early_stopping is not None:
        yield finding(
            "training.early_stopping",
            None,
            "watches an evaluation metric, and there are no rows to measure on: name data.evaluation",
            "data.evaluation",
        )
    if job.training.evaluate_every is not None:
        reason = "there are no rows to measure on: name data.evaluation"
        yield finding("training.evaluate_every", str(job.training.evaluate_every), reason, "data.evaluation")
    if job.checkpoint.keep_best > 0:
        reason = (
            "the best is known by an evaluation, and there are no rows to measure on: name data.evaluation "
            "or set it to 0"
        )
        yield finding("checkpoint.keep_best", job.checkpoint.keep_best, reason, "data.evaluation")


def _metrics(job: Job) -> Iterator[Finding]:
    task, early = tasks.of_job(job), job.training.early_stopping
    watched = {"checkpoint.metric": job.checkpoint.metric if job.checkpoint.keep_best else "loss"}
    watched["training.early_stopping.metric"] = early.metric if early else "loss"
    for key, metric in watched.items():
        if (reason := not_measured(task, metric)) is not None:
            yield finding(key, metric, reason, "model.task", "data.problem", "data.evaluation")


def _distillation(job: Job) -> Iterator[Finding]:
    distillation = job.distillation
    if distillation is None:
        return
    if not tasks.find(job.model.task).distils:
        can = ", ".join(name for name in tasks.names() if tasks.find(name).distils)
        reason = f"a {job.model.task} task learns from no teacher; {can} do"
        yield finding("distillation", None, reason, "model.task")
    elif getattr(job.data, "problem", None) == "regression" and distillation.temperature != 1:
        reason = "a number has no temperature, only classes and tokens have; leave it out"
        yield finding("distillation.temperature", distillation.temperature, reason, "data.problem")
    if distillation.hidden_states is not None and tasks.find(job.model.task).traits.unit != "token":
        reason = "hidden states are compared token by token, and an image has none; leave it out"
        yield finding("distillation.hidden_states", None, reason, "model.task")


def _machine(job: Job) -> Iterator[Finding]:
    cluster = job.cluster
    if cluster.gpus_per_node == 0 and job.model.attention == "flash_attention_2":
        yield finding(
            "model.attention",
            "flash_attention_2",
            "needs a GPU, and cluster.gpus_per_node is 0; write sdpa or auto",
            "cluster.gpus_per_node",
        )
    if cluster.gpus_per_node not in (0, "auto") and cluster.ranks_per_node not in (
        "auto",
        cluster.gpus_per_node,
    ):
        reason = (
            f"each GPU has one rank, and there are {cluster.gpus_per_node}; write {cluster.gpus_per_node} "
            "or leave it out"
        )
        yield finding("cluster.ranks_per_node", cluster.ranks_per_node, reason, "cluster.gpus_per_node")


def _slurm(cluster: Cluster) -> Iterator[Finding]:
    """Options of sbatch that are said twice, that exclude each other, or that are not the job's to give."""
    given = {name: value for name, value in cluster.sbatch.items() if slurm_options.is_asked(value)}
    for name, value in given.items():
        option, key = slurm_options.long_name(name), f"cluster.sbatch.{name}"
        if option in slurm_options.KEYS:
            yield finding(
                key,
                value,
                f"has a key of its own, which the plan goes by; write it as {slurm_options.KEYS[option]}",
            )
        elif option in slurm_options.DECIDED:
            yield finding(
                key, value, f"is not the job's to give: {slurm_options.DECIDED[option]}; leave it out"
            )
        elif option != name:
            yield finding(key, value, f"options stand here by their long names; write {option}")
        elif option == "gres" and any(
            part.split(":")[0].strip().removeprefix("gres/") == "gpu" for part in str(value).split(",")
        ):
            reason = (
                "GPUs have keys of their own, which the plan goes by; write cluster.gpus_per_node (and "
                "gpu_type), and the rest here"
            )
            yield finding(key, value, reason, "cluster.gpus_per_node")
    named = slurm_options.named(cluster.model_dump(exclude={"sbatch"}))
    for number, (name, value) in enumerate(given.items()):
        there = {option: f"cluster.{option}" for option in named} | {
            option: f"cluster.sbatch.{option}" for option in list(given)[:number]
        }
        for other in sorted(
            {*slurm_options.rivals([name]), *({name} & named - slurm_options.KEYS.keys())} & there.keys()
        ):
            yield finding(
                f"cluster.sbatch.{name}",
                value,
                f"Slurm takes this or {there[other]}, not both; leave one out",
                there[other],
            )
