"""Looking for a faster plan than the one that needs least memory: how parameters are cut, and in how many copies."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.job.schema import ActivationCheckpointing, Job
from launcher.planning.fitting import Choice, choose
from launcher.planning.gpus import GpuType
from launcher.planning.plan import Decision, Plan

WORTH = 0.95
"""Another cut than the one of least memory has to take at most this share of its step: the speed model is not right to the percent."""


@dataclass(frozen=True)
class Variant:
    """A plan that the job leaves room for."""

    plan: Plan
    changed: dict[str, str | int] = field(default_factory=dict)
    """What the plan of least memory has otherwise: keys of the job, and their values."""
    words: str = ""
    """The same in a clause."""


def variants(job: Job, made: Plan) -> list[Variant]:
    """The plan as it was made, of least memory, and the other cuts that compute the same."""
    found = [Variant(made)]
    mesh, parallel = made.mesh, job.parallel
    if made.engine != "fsdp" or made.sharding != "full" or mesh.shard == 1 or made.offload != "none":
        return found
    spreads = "replicate" not in parallel.model_fields_set and mesh.nodes > 1 and mesh.ranks_per_node > 1
    for replicate in (mesh.replicate, mesh.nodes) if spreads else (mesh.replicate,):
        for sharding in ("full", "gradients") if parallel.shard == "auto" else ("full",):
            changed: dict[str, str | int] = {}
            words = []
            if replicate != mesh.replicate:
                changed["parallel.replicate"] = replicate
                words.append(f"a copy on each of the {replicate} nodes, so that only gradients cross the network")
            if sharding != made.sharding:
                changed["parallel.shard"] = sharding
                words.append("parameters stay whole between forward and backward")
            cut = mesh.model_copy(
                update={"replicate": replicate, "shard": mesh.world_size // replicate, "reshard_after_forward": sharding == "full"}
            )
            if changed:
                found.append(Variant(made.model_copy(update={"mesh": cut, "sharding": sharding}), changed, " and ".join(words)))
    return found


def fastest(
    job: Job, made: Plan, memory_bytes: int, ways: tuple[ActivationCheckpointing, ...], most: int, micro: int | None, gpu: GpuType | None
) -> tuple[Choice, list[Decision]] | None:
    """The best recomputation and micro-batch of the variant that takes the least time, or of the first where others gain little; and
    what was decided beside.

    None where nothing fits. Without a GPU of the table nothing is known of times, and the first one is taken.
    """
    first, *others = variants(job, made)
    best = choose(first.plan, memory_bytes, ways, most, micro, gpu)
    if best is None:
        return None
    decided: list[Decision] = []
    begun = best.forecast.speed
    # Other cuts send less and need more memory: they gain what is waited for at most.
    if begun is None or begun.exposed * begun.correction < (1 - WORTH) * begun.step:
        return best, decided
    shortest = begun.step * WORTH
    for variant in others:
        choice = choose(variant.plan, memory_bytes, ways, most, micro, gpu)
        if choice is not None and choice.forecast.speed is not None and choice.forecast.speed.step < shortest:
            best, shortest = choice, choice.forecast.speed.step
            reason = f"{variant.words}: {begun.step / shortest:.2f}x as fast by the speed model, and it fits"
            decided = [Decision(key=key, value=value, reason=reason) for key, value in variant.changed.items()]
    return best, decided
