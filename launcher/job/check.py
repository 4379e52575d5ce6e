"""Checks across the keys of a job: each says the key, the value and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.errors import Problem
from launcher.job import slurm_options
from launcher.job.schema import Cluster, Job, Source

METRICS = {
    "causal-lm": ("loss", "perplexity", "accuracy"),
    "single-label": ("loss", "accuracy", "f1", "matthews"),
    "multi-label": ("loss", "accuracy", "f1_micro", "f1_macro"),
    "regression": ("loss", "mse", "pearson", "spearman"),
}
"""What an evaluation measures, by the task, or by the problem of a classification."""


@dataclass(frozen=True)
class Finding:
    """A problem, and every key it rests on: where one of those is already refused, this one says nothing new."""

    problem: Problem
    keys: tuple[str, ...]


def _finding(key: str, value: object, reason: str, *others: str) -> Finding:
    return Finding(Problem(key, value, reason), (key, *others))


def findings(job: Job) -> Iterator[Finding]:
    """Everything in a job that contradicts itself."""
    yield from _sources(job)
    yield from _causal_lm(job) if job.model.task == "causal-lm" else _classification(job)
    yield from _adapter(job)
    yield from _training(job)
    yield from _evaluation(job)
    yield from _machine(job)
    yield from _slurm(job.cluster)


def _sources(job: Job) -> Iterator[Finding]:
    for role, source in (("train", job.data.train), ("evaluation", job.data.evaluation)):
        if source is not None:
            yield from _source(f"data.{role}", source)


def _source(key: str, source: Source) -> Iterator[Finding]:
    parts = (f"{key}.path", f"{key}.name")
    if source.path is None and source.name is None:
        yield _finding(key, None, "needs path (a local file) or name (a data set on the hub)", *parts)
    if source.path is not None and source.name is not None:
        yield _finding(f"{key}.name", source.name, "path and name are both there, and rows come from one place; leave one out", *parts)
    if source.name is None and source.subset is not None:
        yield _finding(f"{key}.subset", source.subset, "only a hub data set (name) has subsets; leave it out", *parts)


def _causal_lm(job: Job) -> Iterator[Finding]:
    data, task = job.data, ("model.task", "data.text", "data.prompt", "data.completion", "data.messages")
    if data.label is not None:
        yield _finding(
            "data.label", data.label, "causal-lm learns text, not labels; leave it out or set model.task: sequence-classification", *task
        )
    if data.problem != "single-label":
        yield _finding("data.problem", data.problem, "only sequence-classification has it; leave it out", *task)
    if (data.prompt is None) != (data.completion is None):
        there, absent = ("prompt", "completion") if data.completion is None else ("completion", "prompt")
        yield _finding(
            f"data.{there}", getattr(data, there), f"prompt and completion go together; name the column for data.{absent}", *task
        )
    ways = [
        way
        for way, used in (("text", data.text), ("prompt + completion", data.prompt or data.completion), ("messages", data.messages))
        if used
    ]
    if len(ways) != 1:
        said = f"there are {' and '.join(ways)}" if ways else "there is none"
        yield _finding("data", None, f"causal-lm reads exactly one of text, prompt + completion, or messages; {said}", *task)
    for key in ("tools", "date") if data.messages is None else ():
        if (value := getattr(data, key)) is not None:
            yield _finding(f"data.{key}", _shown(value), "belongs to chats: name the column data.messages, or leave it out", *task)
    if isinstance(data.text, tuple) and len(data.text) != 1:
        yield _finding("data.text", list(data.text), "causal-lm reads one column of text; for two parts name prompt and completion", *task)


def _shown(value: object) -> object:
    return None if isinstance(value, tuple) else value


def _classification(job: Job) -> Iterator[Finding]:
    data = job.data
    if data.text is None:
        yield _finding("data.text", None, "is missing: sequence-classification reads a column of text, or two for a pair", "model.task")
    if isinstance(data.text, tuple) and len(data.text) not in (1, 2):
        reason = f"a pair is exactly two columns; here are {len(data.text)}"
        yield _finding("data.text", list(data.text), reason, "model.task")
    if data.label is None:
        yield _finding("data.label", None, "is missing: sequence-classification learns a label", "model.task")
    for key in ("prompt", "completion", "messages", "tools", "date"):
        if (value := getattr(data, key)) is not None:
            yield _finding(f"data.{key}", _shown(value), "belongs to causal-lm; sequence-classification reads text and label", "model.task")
    if data.packing:
        reason = "only causal-lm packs; classification batches are sorted by length and padded, so set it to false"
        yield _finding("data.packing", True, reason, "model.task")


def _adapter(job: Job) -> Iterator[Finding]:
    model = job.model
    if model.adapter is None:
        return
    if model.freeze:
        reason = "an adapter leaves all weights as they are but those of model.adapter.train_also; leave freeze out"
        yield _finding("model.freeze", list(model.freeze), reason, "model.adapter")
    if model.weights == "random":
        reason = "an adapter is trained beside weights that were learned; write pretrained, or leave model.adapter out"
        yield _finding("model.weights", model.weights, reason, "model.adapter")
    if model.compile:
        yield _finding(
            "model.compile", True, "layers with adapters are not compiled; write false, or leave model.adapter out", "model.adapter"
        )


def _training(job: Job) -> Iterator[Finding]:
    training, batch = job.training, job.batch
    length = ("training.epochs", "training.max_steps")
    if training.epochs is not None and training.max_steps is not None:
        yield _finding(
            "training.max_steps", training.max_steps, "epochs and max_steps both say how long; leave one out (or set it to null)", *length
        )
    if training.minimum_learning_rate > training.learning_rate:
        reason = f"above learning_rate ({training.learning_rate:g}): the schedule would end higher than it begins"
        yield _finding("training.minimum_learning_rate", training.minimum_learning_rate, reason, "training.learning_rate")
    if training.warmup >= 1 and training.warmup != int(training.warmup):
        yield _finding(
            "training.warmup", training.warmup, "from 1 it is a number of steps, and steps are whole; below 1 it is a share of all steps"
        )
    elif training.max_steps is not None and training.warmup > training.max_steps:
        reason = f"longer than the whole training of {training.max_steps} steps"
        yield _finding("training.warmup", training.warmup, reason, *length)
    if batch.micro_batch_size != "auto" and batch.micro_batch_size > batch.global_batch_size:
        reason = f"above global_batch_size ({batch.global_batch_size}); one rank's pass cannot hold more than the whole step"
        yield _finding("batch.micro_batch_size", batch.micro_batch_size, reason, "batch.global_batch_size")


def _evaluation(job: Job) -> Iterator[Finding]:
    if job.data.evaluation is not None:
        yield from _metrics(job)
        return
    if job.training.early_stopping is not None:
        yield _finding(
            "training.early_stopping",
            None,
            "watches an evaluation metric, and there are no rows to measure on: name data.evaluation",
            "data.evaluation",
        )
    if job.training.evaluate_every is not None:
        reason = "there are no rows to measure on: name data.evaluation"
        yield _finding("training.evaluate_every", str(job.training.evaluate_every), reason, "data.evaluation")
    if job.checkpoint.keep_best > 0:
        reason = "the best is known by an evaluation, and there are no rows to measure on: name data.evaluation or set it to 0"
        yield _finding("checkpoint.keep_best", job.checkpoint.keep_best, reason, "data.evaluation")


def _metrics(job: Job) -> Iterator[Finding]:
    kind = job.model.task if job.model.task == "causal-lm" else job.data.problem
    early = job.training.early_stopping
    watched = {"checkpoint.metric": job.checkpoint.metric if job.checkpoint.keep_best else "loss"}
    watched["training.early_stopping.metric"] = early.metric if early else "loss"
    for key, metric in watched.items():
        if metric not in METRICS[kind]:
            near = difflib.get_close_matches(metric, METRICS[kind], n=1, cutoff=0.0)
            reason = f"a {kind} evaluation measures {', '.join(METRICS[kind])}; the nearest is {near[0]}"
            yield _finding(key, metric, reason, "model.task", "data.problem")


def _machine(job: Job) -> Iterator[Finding]:
    cluster = job.cluster
    if cluster.gpus_per_node == 0 and job.model.attention == "flash_attention_2":
        yield _finding(
            "model.attention",
            "flash_attention_2",
            "needs a GPU, and cluster.gpus_per_node is 0; write sdpa or auto",
            "cluster.gpus_per_node",
        )
    if cluster.gpus_per_node not in (0, "auto") and cluster.ranks_per_node not in ("auto", cluster.gpus_per_node):
        reason = f"each GPU has one rank, and there are {cluster.gpus_per_node}; write {cluster.gpus_per_node} or leave it out"
        yield _finding("cluster.ranks_per_node", cluster.ranks_per_node, reason, "cluster.gpus_per_node")


def _slurm(cluster: Cluster) -> Iterator[Finding]:
    """Options of sbatch that are said twice, that exclude each other, or that are not the job's to give."""
    given = {name: value for name, value in cluster.sbatch.items() if slurm_options.is_asked(value)}
    for name, value in given.items():
        option, key = slurm_options.long_name(name), f"cluster.sbatch.{name}"
        if option in slurm_options.KEYS:
            yield _finding(key, value, f"has a key of its own, which the plan goes by; write it as {slurm_options.KEYS[option]}")
        elif option in slurm_options.DECIDED:
            yield _finding(key, value, f"is not the job's to give: {slurm_options.DECIDED[option]}; leave it out")
        elif option != name:
            yield _finding(key, value, f"options stand here by their long names; write {option}")
        elif option == "gres" and any(part.split(":")[0].strip().removeprefix("gres/") == "gpu" for part in str(value).split(",")):
            reason = "GPUs have keys of their own, which the plan goes by; write cluster.gpus_per_node (and gpu_type), and the rest here"
            yield _finding(key, value, reason, "cluster.gpus_per_node")
    asked = slurm_options.named(cluster.model_dump(exclude={"sbatch"}))
    for number, (name, value) in enumerate(given.items()):
        there = {option: f"cluster.{option}" for option in asked} | {option: f"cluster.sbatch.{option}" for option in list(given)[:number]}
        for other in sorted({*slurm_options.rivals([name]), *({name} & asked - slurm_options.KEYS.keys())} & there.keys()):
            yield _finding(f"cluster.sbatch.{name}", value, f"Slurm takes this or {there[other]}, not both; leave one out", there[other])
