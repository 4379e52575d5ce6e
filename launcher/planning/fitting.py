"""Choosing what a job leaves open so that it fits and is fast, and the nearest plans that fit where this one does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.job.schema import ActivationCheckpointing
from launcher.planning.batch import divisors
from launcher.planning.footprint.families import WITH_ADAPTERS, program_of
from launcher.planning.forecast import USABLE, Forecast, forecast, read_config
from launcher.planning.gpus import GpuType
from launcher.planning.memory import gib
from launcher.planning.plan import BatchPlan, Plan

WAYS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """Recomputation and micro-batch, each with why."""

    way: ActivationCheckpointing
    batch: BatchPlan
    reason: str
    limit: str
    forecast: Forecast


def known(plan: Plan) -> bool:
    """Whether the formulas know the plan's model and task."""
    from launcher.planning.forecast import locate

    config = read_config(locate(plan.model.name))
    try:
        knows = plan.model.adapter is None or (config or {}).get("model_type") in WITH_ADAPTERS
        return config is not None and knows and program_of(config, task=plan.task) is not None
    except KeyError:
        return False


def with_batch(plan: Plan, micro: int, way: ActivationCheckpointing | None = None) -> Plan:
    """The plan with another micro-batch and the same global batch; `micro` divides a rank's samples."""
    batch = plan.batch
    per_rank = batch.micro_batch_size * batch.accumulation_steps
    changed = batch.model_copy(update={"micro_batch_size": micro, "accumulation_steps": per_rank // micro})
    return plan.model_copy(update={"batch": changed, "activation_checkpointing": way or plan.activation_checkpointing})


def choose(
    plan: Plan,
    memory_bytes: int,
    ways: tuple[ActivationCheckpointing, ...],
    most: int,
    micro: int | None = None,
    gpu: GpuType | None = None,
) -> Choice | None:
    """The fastest recomputation and micro-batch that fit; without a GPU of the table the least recomputation is taken for the fastest.

    `ways` are those that may be chosen, `most` is the largest micro-batch worth having, `micro` one that is asked for.
    None where nothing fits.
    """
    per_rank = plan.batch.micro_batch_size * plan.batch.accumulation_steps
    sizes = [micro] if micro is not None else sorted((size for size in divisors(per_rank) if size <= max(1, most)), reverse=True)
    found: list[tuple[float, Forecast]] = []
    for number, way in enumerate(ways):
        made = _largest(plan, memory_bytes, way, sizes, gpu)
        if made is not None:
            found.append((made.speed.step if made.speed else float(number), made))
            if made.speed is None:
                break
    if not found:
        return None
    best = min(found, key=lambda pair: pair[0])[1]
    room, needed = int(memory_bytes * USABLE[plan.mesh.device]), best.footprint.highest
    reason = f"{gib(needed.total)} of the {gib(room)} that can be used of a rank, by the formulas ({needed.name}: {needed.where})"
    largest = best.plan.batch.micro_batch_size == sizes[0]
    limit = f"more than {most} are no faster" if largest else f"more would not fit into {gib(room)}"
    return Choice(best.plan.activation_checkpointing, best.plan.batch, reason, limit, best)


def _largest(plan: Plan, memory_bytes: int, way: ActivationCheckpointing, sizes: list[int], gpu: GpuType | None) -> Forecast | None:
    """The largest micro-batch that fits; memory grows with it, so that halving finds it."""
    low, high, best = 0, len(sizes) - 1, None
    while low <= high:
        middle = (low + high) // 2
        made = forecast(with_batch(plan, sizes[middle], way), memory_bytes, gpu)
        if made is not None and made.fits:
            best, high = made, middle - 1
        else:
            low = middle + 1
    return best


def nearest_that_fit(made: Forecast, gpu: GpuType | None = None, most: int = 4) -> list[tuple[str, Forecast]]:
    """Changes of a plan that does not fit after which it does, the smallest first, each with its forecast."""
    found = []
    for words, changed in _changes(made.plan):
        other = forecast(changed, made.memory_bytes, gpu)
        if other is not None and other.fits:
            found.append((words, other))
        if len(found) == most:
            break
    return found


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    small = with_batch(plan, 1)
    if plan.batch.micro_batch_size > 1:
        yield "batch.micro_batch_size: 1", small
    if plan.activation_checkpointing != "full":
        yield "memory.activation_checkpointing: full", with_batch(plan, plan.batch.micro_batch_size, "full")
        if plan.batch.micro_batch_size > 1:
            yield "batch.micro_batch_size: 1, memory.activation_checkpointing: full", with_batch(plan, 1, "full")
    least = with_batch(plan, 1, "full")
    if plan.mesh.device == "cuda" and plan.engine == "fsdp" and plan.offload == "none":
        yield "memory.offload: parameters (slower: the state crosses PCIe every step)", least.model_copy(update={"offload": "parameters"})
    for factor in (2, 4, 8, 16, 32, 64):
        if plan.batch.global_batch_size % (plan.mesh.world_size * factor):
            break
        yield f"cluster.nodes: {plan.mesh.nodes * factor} ({plan.mesh.world_size * factor} ranks)", _on_more(least, factor)
    for length in (plan.data.max_length // 2, plan.data.max_length // 4):
        if length >= 8:
            yield f"data.max_length: {length}", least.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})})


def _on_more(plan: Plan, factor: int) -> Plan:
    mesh, batch = plan.mesh, plan.batch
    wider = mesh.model_copy(
        update={"nodes": mesh.nodes * factor, "world_size": mesh.world_size * factor, "shard": mesh.shard * factor if mesh.shard > 1 else 1}
    )
    steps = batch.global_batch_size // wider.world_size // batch.micro_batch_size
    cut = batch.model_copy(update={"data_parallel_size": wider.world_size, "accumulation_steps": max(1, steps)})
    return plan.model_copy(update={"mesh": wider, "batch": cut})
