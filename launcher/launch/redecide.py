"""A new plan for a resumed run, in which the values that the job leaves open stay as decided before."""

from __future__ import annotations

from pathlib import Path

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.job.check_training import EARLIER_DEFAULTS
from launcher.job.cluster import node_range
from launcher.job.schema import Job
from launcher.planner.plan import Plan
from launcher.planner.resolve.sharding import only_deepspeed
from launcher.planner.script_plan import plan as decide_script
from launcher.planner.search import plan_job


def plan_for_most_nodes(job: Job, stored: Plan, counts: range, run: Path | None = None) -> Plan:
    """Return the plan for the first of these node counts that works. Raises ConfigurationError with the reason
    against the first if none does."""
    first: ConfigurationError | None = None
    for count in counts:
        cluster = job.cluster.model_copy(update={"nodes": count})
        try:
            plan = decide_again(
                job.model_copy(update={"cluster": cluster}), stored.mesh.ranks_per_node, stored, False, run
            )
            return plan.model_copy(update={"slurm": stored.slurm})
        except ConfigurationError as error:
            first = first or error
    assert first is not None
    raise first


def decide_again(job: Job, nproc: int | None, stored: Plan, local: bool, run: Path | None = None) -> Plan:
    """Return the job's plan, with open values as decided before: today's free memory must not change the
    numbers.

    With another number of ranks the micro-batch is decided anew, as it must divide the batch. A teacher's
    checkpoint may be gone if `run` holds an exported copy.
    """
    plan = _decided(job, nproc, stored, local, run)
    given = job.training.model_fields_set
    as_begun = {
        key: value
        for key, value in EARLIER_DEFAULTS.items()
        if key not in given and getattr(stored.training, key) == value
    }
    plan = plan.model_copy(update={"training": plan.training.model_copy(update=as_begun)})
    return _writing_as_begun(plan, job, stored)


def _writing_as_begun(plan: Plan, job: Job, stored: Plan) -> Plan:
    """Return the plan with the generation settings of before where the job leaves them open, because later
    evaluations are compared with earlier ones."""
    before = stored.evaluation.generate if stored.evaluation is not None else None
    own = job.evaluation.generate
    if own is None or before is None or plan.evaluation is None:
        return plan
    left = {key: getattr(before, key) for key in type(own).model_fields if key not in own.model_fields_set}
    return plan.model_copy(
        update={"evaluation": plan.evaluation.model_copy(update={"generate": own.model_copy(update=left)})}
    )


def _decided(job: Job, nproc: int | None, stored: Plan, local: bool, run: Path | None) -> Plan:
    before = stored.distillation
    if run and job.distillation and before and before.checkpoint is not None:
        own = job.distillation.model_copy(update={"checkpoint": before.checkpoint})
        if job.distillation.checkpoint in (None, before.checkpoint) and own.written_out(run):
            there = own.model_copy(update={"teacher": str(run / "teacher"), "checkpoint": None})
            job = job.model_copy(update={"distillation": there})
            stored = stored.model_copy(update={"distillation": there})
            return _decided(job, nproc, stored, local, None).model_copy(update={"distillation": own})
    updates: dict[str, object] = {}
    if stored.script:
        return decide_script(job, stored.script, _ranks(job, nproc, stored), local=local)
    if job.precision == "auto":
        updates["precision"] = stored.precision
    if left := [one.key for one in tasks.of_job(job).left_open()]:
        updates["data"] = job.data.model_copy(update={key: getattr(stored.data, key) for key in left})
    if job.distillation and stored.distillation and job.distillation.checkpoint is None:
        taught = {"checkpoint": stored.distillation.checkpoint}
        updates["distillation"] = job.distillation.model_copy(update=taught)
    if job.memory.activation_checkpointing == "auto":
        updates["memory"] = job.memory.model_copy(
            update={"activation_checkpointing": stored.activation_checkpointing}
        )
    fewest, most = node_range(job.cluster.nodes)
    if fewest <= stored.mesh.nodes <= most and _ranks(job, nproc, stored) in (
        None,
        stored.mesh.ranks_per_node,
    ):
        # With a range of nodes, this attempt may get another number of them, by which the number of copies
        # need not be divisible.
        updates |= _as_placed(job.model_copy(update=updates), stored, copies=fewest == most)
    job, num_ranks = job.model_copy(update=updates), _ranks(job, nproc, stored)
    plan = plan_job(job, num_ranks, local=local)
    if job.batch.micro_batch_size != "auto" or plan.mesh.world_size != stored.mesh.world_size:
        return plan
    batch = job.batch.model_copy(update={"micro_batch_size": stored.batch.micro_batch_size})
    # Another global batch is refused by `check`, with a better reason than that it is not divisible.
    return (
        plan
        if batch.global_batch_size != stored.batch.global_batch_size
        else plan_job(job.model_copy(update={"batch": batch}), num_ranks, local=local)
    )


def _as_placed(job: Job, stored: Plan, copies: bool) -> dict[str, object]:
    """Return engine, sharding, offloading and, with `copies`, the number of copies as decided before, unless the
    job now contradicts them."""
    parallel, memory = job.parallel, job.memory
    if parallel.engine not in ("auto", stored.engine) or (stored.engine == "fsdp" and only_deepspeed(job)):
        return {}
    cut: dict[str, object] = {}
    updates: dict[str, object] = {}
    if parallel.shard == "auto" and "replicate" not in parallel.model_fields_set:
        cut = {"engine": stored.engine, "shard": stored.sharding}
        cut |= (
            {"replicate": stored.mesh.dp_replicate}
            if copies and stored.engine == "fsdp" and stored.sharding != "none"
            else {}
        )
        updates["parallel"] = parallel.model_copy(update=cut)
    elif parallel.engine == "auto" and stored.sharding != "none":
        updates["parallel"] = parallel.model_copy(update={"engine": stored.engine})
    if memory.offload == "auto" and parallel.shard in ("auto", stored.sharding):
        updates["memory"] = memory.model_copy(
            update={"offload": stored.offload, "offload_to": stored.offload_to}
        )
    return updates


def _ranks(job: Job, nproc: int | None, stored: Plan) -> int | None:
    """Return the requested ranks per node; without a request as many as before, so that resuming changes
    nothing; None if the job's own keys say."""
    if nproc is not None:
        return nproc
    cluster = job.cluster
    open_still = cluster.ranks_per_node == "auto" and cluster.gpus_per_node in ("auto", 0)
    return stored.mesh.ranks_per_node if open_still else None


def has_devices(plan: Plan, local: bool) -> bool:
    """Return whether this machine has the GPUs that a plan needs; other machines are assumed to have them."""
    if plan.mesh.device == "cpu" or not local:
        return True
    from launcher.planner.hardware.detect import find_gpus

    return len(find_gpus()[0]) >= plan.mesh.ranks_per_node
