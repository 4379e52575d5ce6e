"""Search sharding and replication for a plan faster than the one of least memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.job.schema import ActivationCheckpointing, Job, Sharding
from launcher.planning.fitting import WAYS, Choice, Room, choose, cut_of
from launcher.planning.plan import Decision, Plan, Refused
from launcher.planning.sharding import STAGES, zeropp

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


@dataclass(frozen=True)
class Found:
    """The best of a plan's variants, and what was looked at beside."""

    choice: Choice | None
    """None where nothing fits."""
    decided: tuple[Decision, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def step(self) -> float:
        """Seconds; 0 where nothing is known of the speed."""
        return self.choice.forecast.speed.step if self.choice and self.choice.forecast.speed else 0.0


def variants(job: Job, made: Plan) -> list[Variant]:
    """The plan as it was made, of least memory, and the other cuts that compute the same."""
    return [Variant(made), *(_stages(job, made) if made.engine == "deepspeed" else _cuts(job, made))]


def _cuts(job: Job, made: Plan) -> list[Variant]:
    """FSDP's: copies on each node, parameters that stay whole."""
    found: list[Variant] = []
    mesh, parallel = made.mesh, job.parallel
    if made.sharding != "full" or mesh.shard == 1 or made.offload != "none":
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
                words.append("parameters stay whole from the first pass to the end of the step")
            cut = mesh.model_copy(
                update={"replicate": replicate, "shard": mesh.world_size // replicate, "reshard_after_forward": sharding == "full"}
            )
            if changed:
                found.append(Variant(made.model_copy(update={"mesh": cut, "sharding": sharding}), changed, " and ".join(words)))
    return found


def _stages(job: Job, made: Plan) -> list[Variant]:
    """ZeRO's other stages, where nothing is asked for that only the third has, as files are."""
    if job.parallel.shard != "auto" or made.zero is None or made.offload == "parameters" or made.offload_to != "cpu" or zeropp(job):
        return []
    kept: dict[Sharding, str] = {"gradients": "ZeRO-2: each rank has the parameters whole, and gathers nothing for a pass"}
    if made.offload == "none":  # the gradients that ZeRO-1 keeps whole stay on the device
        kept["optimizer"] = "ZeRO-1: each rank has parameters and gradients whole, and sends once a step"
    cut = made.mesh.model_copy(update={"reshard_after_forward": False})
    return [
        Variant(
            made.model_copy(update={"sharding": name, "mesh": cut, "zero": made.zero.model_copy(update={"stage": STAGES[name]})}),
            {"parallel.shard": name},
            words,
        )
        for name, words in kept.items()
        if STAGES[name] < made.zero.stage
    ]


def ways_of(job: Job, plan: Plan) -> tuple[ActivationCheckpointing, ...]:
    """The recomputations that the job leaves open and the engine can do."""
    asked = job.memory.activation_checkpointing
    if asked != "auto":
        return (asked,)
    return tuple(way for way in WAYS if way != "selective" or plan.zero is None or plan.zero.stage != 3)


def fastest(job: Job, made: Plan, room: Room) -> Found:
    """The best recomputation and micro-batch of the variant that takes the least time, or of the first where others gain little; what
    was decided beside, and what was refused.

    Without a GPU of the table nothing is known of times, and the first that fits is taken.
    """
    first, *others = variants(job, made)
    refused: list[Refused] = []
    best = choose(first.plan, room, ways_of(job, first.plan), refused)
    begun = best.forecast.speed if best else None
    # Other cuts send less and need more memory: they gain what is waited for at most, and what is not computed again.
    if best is not None and (begun is None or begun.exposed * begun.correction < (1 - WORTH) * begun.step):
        others = _recompute_less(job, first, others) if begun and best.way == "full" else []
    decided: tuple[Decision, ...] = ()
    shortest = begun.step * WORTH if begun else float("inf")
    for variant in others:
        choice = choose(variant.plan, room, ways_of(job, variant.plan), refused)
        if choice is None:
            continue
        rate = choice.forecast.speed
        if (rate.step if rate else 0.0) < shortest:
            gain = (
                f"{begun.step / rate.step:.2f}x as fast by the speed model, and it fits"
                if begun and rate
                else "what cuts more does not fit"
            )
            decided = tuple(Decision(key=key, value=value, reason=f"{variant.words}: {gain}") for key, value in variant.changed.items())
            best, shortest = choice, rate.step if rate else 0.0
        elif begun and rate:
            refused.append(Refused(what=cut_of(variant.plan), why="slower", reason=_beside(rate.step, begun.step, shortest)))
    return Found(best, decided, tuple(refused))


def _recompute_less(job: Job, first: Variant, others: list[Variant]) -> list[Variant]:
    """The cuts that may compute less again than the first one ever can, as ZeRO-3 cannot keep some of it."""
    return [other for other in others if set(ways_of(job, other.plan)) - set(ways_of(job, first.plan))]


def _beside(seconds: float, least_memory: float, shortest: float) -> str:
    if seconds < least_memory and shortest >= least_memory * WORTH:
        return f"{seconds / least_memory:.2f}x the step, not worth its memory"
    return f"{seconds / min(shortest, least_memory):.2f}x the step"
