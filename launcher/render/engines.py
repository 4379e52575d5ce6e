"""The mapping of a job to the other engine: the nearest setting, and a note if the meaning changes."""

from __future__ import annotations

from typing import Any

from launcher.job.schema import EngineName, Job
from launcher.planner.plan import Plan
from launcher.render.notes import Note


def for_engine(job: Job, plan: Plan, engine: EngineName) -> tuple[Job, list[Note]]:
    """Return the job for `engine`, to be planned again, and a note for each key whose meaning changes.

    The decisions of `plan` about the computation (precision, activation checkpointing, micro-batch) are kept,
    so that only the engine differs.
    """
    notes: list[Note] = []
    parallel: dict[str, Any] = {"engine": engine}
    memory: dict[str, Any] = {"activation_checkpointing": plan.activation_checkpointing}
    model: dict[str, Any] = {}
    if engine != plan.engine:
        change = _to_fsdp if engine == "fsdp" else _to_deepspeed
        change(job, plan, parallel, memory, model, notes)
    batch = job.batch.model_copy(update={"micro_batch_size": plan.batch.micro_batch_size})
    updates = {
        "parallel": job.parallel.model_copy(update=parallel),
        "memory": job.memory.model_copy(update=memory),
        "model": job.model.model_copy(update=model),
        "precision": plan.precision,
        "batch": batch,
    }
    return job.model_copy(update=updates), notes


def _to_fsdp(
    job: Job,
    plan: Plan,
    parallel: dict[str, Any],
    memory: dict[str, Any],
    model: dict[str, Any],
    notes: list[Note],
) -> None:
    parallel["shard"] = plan.sharding
    if plan.sharding == "optimizer":
        parallel["shard"] = "gradients"
        notes.append(
            Note(
                "parallel.shard",
                "optimizer",
                "FSDP cuts gradients wherever it cuts the optimizer; taken: gradients",
            )
        )
    if plan.offload != "none":
        _offload_to_fsdp(plan, memory, notes)
    per_node = plan.zero.secondary_shard if plan.zero else 1
    if per_node > 1 and plan.mesh.world_size // per_node > 1:
        copies = plan.mesh.world_size // per_node
        parallel |= {"secondary_shard": 1, "replicate": copies}
        text = (
            f"hpZ is DeepSpeed's; taken: replicate {copies}, which holds optimizer and gradients {copies} "
            "times, not the parameters alone"
        )
        notes.append(Note("parallel.secondary_shard", per_node, text))
    elif per_node > 1:
        parallel["secondary_shard"] = 1
        notes.append(
            Note(
                "parallel.secondary_shard",
                per_node,
                "one group holds all ranks: nothing is lost by leaving it out",
            )
        )
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(job.parallel, key):
            parallel[key] = False
            notes.append(
                Note(f"parallel.{key}", True, "is DeepSpeed's; left out: FSDP sends what it computes in")
            )


def _offload_to_fsdp(plan: Plan, memory: dict[str, Any], notes: list[Note]) -> None:
    on_cpu = plan.mesh.device == "cpu"
    memory |= {"offload": "none" if on_cpu else "parameters", "offload_to": "cpu"}
    if on_cpu:
        notes.append(
            Note(
                "memory.offload",
                plan.offload,
                "on the CPU all of it is in the host's memory already; left out",
            )
        )
    elif plan.offload == "optimizer":
        notes.append(
            Note(
                "memory.offload",
                "optimizer",
                "FSDP moves parameters, gradients and optimizer together; taken: parameters",
            )
        )
    if plan.offload_to != "cpu":
        notes.append(
            Note(
                "memory.offload_to",
                plan.offload_to,
                "FSDP has no NVMe; taken: the host's memory, which must hold it",
            )
        )


def _to_deepspeed(
    job: Job,
    plan: Plan,
    parallel: dict[str, Any],
    memory: dict[str, Any],
    model: dict[str, Any],
    notes: list[Note],
) -> None:
    parallel |= {"shard": plan.sharding, "replicate": 1}
    if plan.sharding == "none":
        parallel["shard"] = "optimizer"
        text = (
            "ZeRO's stage 0 takes a wrong first step in half precision; taken: optimizer (ZeRO-1), which "
            "computes the same in less memory"
        )
        notes.append(Note("parallel.shard", "none", text))
    elif plan.mesh.dp_replicate > 1:
        shard = plan.mesh.dp_shard if plan.sharding == "full" else 1
        parallel["secondary_shard"] = shard
        kept = f"; taken: hpZ over {shard} ranks, which keeps the parameters as near" if shard > 1 else ""
        notes.append(
            Note(
                "parallel.replicate",
                plan.mesh.dp_replicate,
                f"ZeRO cuts over all ranks{kept}, and holds the optimizer once",
            )
        )
    if plan.offload == "parameters" and parallel["shard"] != "full":
        memory["offload"] = "optimizer"
        notes.append(
            Note("memory.offload", "parameters", "only ZeRO-3 offloads parameters; taken: optimizer")
        )
    if job.model.compile is True:
        model["compile"] = False
        notes.append(Note("model.compile", True, "compiled layers are for FSDP; left out"))
