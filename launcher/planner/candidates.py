"""List the candidates for engine, offloading and sharding that a job leaves open, in the order of trial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.job.schema import EngineName, Job, Offload, Sharding
from launcher.planner.plan import Plan
from launcher.planner.resolve.sharding import STAGES, zeropp

ENGINE_NAMES: dict[EngineName, str] = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}
_OFFLOADS: dict[EngineName, tuple[Offload, ...]] = {
    "fsdp": ("parameters",),
    "deepspeed": ("optimizer", "parameters"),
}
"""Each engine's modes of offloading, the one that moves least first."""


@dataclass(frozen=True)
class EngineOption:
    """One engine with one mode of offloading."""

    engine: EngineName
    offload: Offload

    @property
    def words(self) -> str:
        """Return the option in words: `DeepSpeed, optimizer offloaded`."""
        return ENGINE_NAMES[self.engine] + ("" if self.offload == "none" else f", {self.offload} offloaded")

    def pinned(self, job: Job) -> Job:
        """Return the job with this option set."""
        memory = {"offload": self.offload} | ({"offload_to": "cpu"} if self.offload == "none" else {})
        sections = {
            "parallel": job.parallel.model_copy(update={"engine": self.engine}),
            "memory": job.memory.model_copy(update=memory),
        }
        return job.model_copy(update=sections)


def engine_options(job: Job, first: Plan) -> list[list[EngineOption]]:
    """Return the options of engine and offloading that the job leaves open, in groups.

    The fastest option of a group is taken. A later group is tried only if nothing in the earlier ones fits.
    FSDP precedes DeepSpeed, and no offloading precedes offloading. first: the plan that the job begins with.
    """
    # DeepSpeed always shards, so it is no option for a job that wants full replicas; Muon, Adafactor,
    # moments in 8 bits and DoRA need whole matrices or rows.
    dora = job.model.adapter is not None and job.model.adapter.dora
    only_fsdp = job.parallel.shard == "none" or job.training.needs_whole_rows or dora
    engine_open = job.parallel.engine == "auto" and not only_fsdp and first.engine == "fsdp"
    engines: list[EngineName] = [first.engine, "deepspeed"] if engine_open else [first.engine]
    groups = [[EngineOption(engine, first.offload)] for engine in engines]
    may_offload = first.mesh.device == "cuda" and not job.training.needs_whole_rows
    if job.memory.offload == "auto" and may_offload:
        groups += [[EngineOption(engine, offload) for offload in _OFFLOADS[engine]] for engine in engines]
    return groups


@dataclass(frozen=True)
class Cut:
    """A sharding and its number of replicas, if the job leaves them open."""

    plan: Plan
    changed: dict[str, str | int]
    """Job keys in which it differs from the sharding of least memory, with their values."""
    words: str
    """The same as a clause."""


def other_cuts(job: Job, plan: Plan) -> Iterator[Cut]:
    """Yield shardings with the same results as the plan's, which needs the least memory, that send less."""
    return _zero_stages(job, plan) if plan.engine == "deepspeed" else _fsdp_cuts(job, plan)


def _fsdp_cuts(job: Job, plan: Plan) -> Iterator[Cut]:
    """Yield a replica on each node, and parameters that stay gathered."""
    mesh, parallel = plan.mesh, job.parallel
    if plan.sharding != "full" or mesh.dp_shard == 1 or plan.offload != "none":
        return
    may_copy = "replicate" not in parallel.model_fields_set and mesh.nodes > 1 and mesh.ranks_per_node > 1
    for replicate in (mesh.dp_replicate, mesh.nodes) if may_copy else (mesh.dp_replicate,):
        for sharding in ("full", "gradients") if parallel.shard == "auto" else ("full",):
            changed: dict[str, str | int] = {}
            words = []
            if replicate != mesh.dp_replicate:
                changed["parallel.replicate"] = replicate
                words.append(
                    f"a copy on each of the {replicate} nodes, so that only gradients cross the network"
                )
            if sharding != plan.sharding:
                changed["parallel.shard"] = sharding
                words.append("parameters stay whole from the first pass to the end of the step")
            if changed:
                yield Cut(with_cut(plan, replicate, sharding), changed, " and ".join(words))


def _zero_stages(job: Job, plan: Plan) -> Iterator[Cut]:
    """Yield ZeRO's earlier stages, unless the job needs stage 3, for example to offload to files."""
    zero_open = job.parallel.shard == "auto" and plan.offload_to == "cpu" and not zeropp(job)
    if plan.zero is None or plan.offload == "parameters" or not zero_open:
        return
    words: dict[Sharding, str] = {
        "gradients": "ZeRO-2: each rank has the parameters whole, and gathers nothing for a pass"
    }
    if plan.offload == "none":  # the gradients that ZeRO-1 keeps whole stay on the device
        words["optimizer"] = "ZeRO-1: each rank has parameters and gradients whole, and sends once a step"
    for sharding, clause in words.items():
        if STAGES[sharding] < plan.zero.stage:
            yield Cut(with_cut(plan, plan.mesh.dp_replicate, sharding), {"parallel.shard": sharding}, clause)


def with_cut(plan: Plan, replicate: int, sharding: Sharding) -> Plan:
    """Return the plan with another sharding and number of replicas, all else unchanged."""
    sizes = {"dp_replicate": replicate, "dp_shard": plan.mesh.world_size // replicate}
    mesh = plan.mesh.model_copy(update=sizes | {"reshard_after_forward": sharding == "full"})
    zero = plan.zero and plan.zero.model_copy(update={"stage": STAGES[sharding]})
    return plan.model_copy(update={"sharding": sharding, "mesh": mesh, "zero": zero})


def cut_words(plan: Plan) -> str:
    """Return engine and sharding in a few words: `FSDP full, 4 x 8`, `ZeRO-3, optimizer offloaded`."""
    if plan.zero is not None:
        name = f"ZeRO-{plan.zero.stage}"
    else:
        name = f"{ENGINE_NAMES[plan.engine]} {plan.sharding}, {plan.mesh.dp_replicate} x {plan.mesh.dp_shard}"
    return name if plan.offload == "none" else f"{name}, {plan.offload} offloaded"
