"""Looking for a faster plan than the one that needs least memory: how parameters are cut, and in how many copies."""

from __future__ import annotations

from dataclasses import dataclass

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
    words: str
    """What is different, in a clause."""
    decisions: tuple[Decision, ...] = ()


def variants(job: Job, made: Plan) -> list[Variant]:
    """The plan as it was made, of least memory, and the other cuts that compute the same."""
    found = [Variant(made, "")]
    mesh, parallel = made.mesh, job.parallel
    if made.engine != "fsdp" or made.sharding != "full" or mesh.shard == 1 or made.offload != "none":
        return found
    copies = [mesh.replicate]
    if "replicate" not in parallel.model_fields_set and mesh.nodes > 1 and mesh.replicate == 1 and mesh.ranks_per_node > 1:
        copies.append(mesh.nodes)
    for replicate in copies:
        for sharding in ("full", "gradients") if parallel.shard == "auto" else ("full",):
            if (replicate, sharding) == (mesh.replicate, "full"):
                continue
            cut = mesh.model_copy(
                update={"replicate": replicate, "shard": mesh.world_size // replicate, "reshard_after_forward": sharding == "full"}
            )
            words = [f"a copy on each of the {replicate} nodes, so that only gradients cross the network"] * (replicate > mesh.replicate)
            words += ["parameters stay whole between forward and backward"] * (sharding == "gradients")
            found.append(Variant(made.model_copy(update={"mesh": cut, "sharding": sharding}), " and ".join(words)))
    return found


def fastest(
    job: Job, made: Plan, memory_bytes: int, ways: tuple[ActivationCheckpointing, ...], most: int, micro: int | None, gpu: GpuType | None
) -> tuple[Variant, Choice] | None:
    """The variant whose best recomputation and micro-batch take the least time; the first one where others gain little.

    None where nothing fits. Without a GPU of the table nothing is known of times, and the first one is taken.
    """
    first, *others = variants(job, made)
    least = choose(first.plan, memory_bytes, ways, most, micro, gpu)
    if least is None:
        return None
    best, begun = (first, least), least.forecast.speed
    # Other cuts send less and need more memory: they gain what is waited for at most.
    if begun is None or begun.exposed * begun.correction < (1 - WORTH) * begun.step:
        return best
    shortest = begun.step * WORTH
    for variant in others:
        choice = choose(variant.plan, memory_bytes, ways, most, micro, gpu)
        if choice is not None and choice.forecast.speed is not None and choice.forecast.speed.step < shortest:
            shortest = choice.forecast.speed.step
            best = _explained(variant, begun.step / shortest), choice
    return best


def _explained(variant: Variant, factor: float) -> Variant:
    mesh, reason = variant.plan.mesh, f"{variant.words}: {factor:.2f}x as fast by the speed model, and it fits"
    decided = []
    if mesh.replicate > 1:
        decided.append(Decision(key="parallel.replicate", value=mesh.replicate, reason=reason))
    if variant.plan.sharding == "gradients":
        decided.append(Decision(key="parallel.shard", value="gradients", reason=reason))
    return Variant(variant.plan, variant.words, tuple(decided))
