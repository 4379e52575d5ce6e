"""Checks across the keys of a job: each says the key, the value and why."""

from __future__ import annotations

from collections.abc import Iterator

from launcher import tasks
from launcher.job import check_adapter, check_sources, check_streaming, check_training, slurm_options
from launcher.job.schema import Cluster, Job
from launcher.tasks.distillation import Distillation
from launcher.tasks.mixed import not_measured
from launcher.tasks.task import Finding, finding


def findings(job: Job) -> Iterator[Finding]:
    """Yield everything in a job that contradicts itself."""
    yield from check_sources.findings(job)
    yield from check_streaming.findings(job)
    yield from tasks.of_job(job).checks()
    yield from check_adapter.findings(job)
    yield from check_training.findings(job)
    yield from _evaluation(job)
    yield from _distillation(job)
    yield from _machine(job)
    yield from _slurm(job.cluster)


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
    if (distillation.teacher is None) == (distillation.logits is None):
        given = "both are there" if distillation.teacher else "neither is there"
        reason = f"name either a teacher, or logits that were written ahead: {given}"
        yield finding("distillation", None, reason)
    elif distillation.logits is not None:
        yield from _written_logits(job, distillation)
    if distillation.hidden_states is not None and tasks.find(job.model.task).traits.unit != "token":
        reason = "hidden states are compared token by token, and an image has none; leave it out"
        yield finding("distillation.hidden_states", None, reason, "model.task")


def _written_logits(job: Job, distillation: Distillation) -> Iterator[Finding]:
    """Yield what only a teacher that is asked meanwhile can give."""
    for key in ("checkpoint", "revision", "hidden_states"):
        if (value := getattr(distillation, key)) is not None:
            shown = value if isinstance(value, (int, str)) else None
            reason = "logits that were written ahead have none of it; leave it out, or name a teacher"
            yield finding(f"distillation.{key}", shown, reason, "distillation.logits")
    if getattr(job.data, "augmentation", None) is not None:
        reason = "altered images are not those that logits were written of; leave it out, or name a teacher"
        yield finding("data.augmentation", None, reason, "distillation.logits")


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
