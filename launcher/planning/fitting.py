"""Choose recomputation and micro-batch so that the plan fits and is fast."""

from __future__ import annotations

from dataclasses import dataclass

from launcher import tasks
from launcher.job.schema import ActivationCheckpointing
from launcher.planning.batch import divisors
from launcher.planning.footprint.families import WITH_ADAPTERS, program_of
from launcher.planning.forecast import USABLE, Forecast, Trace, forecast, least_bytes
from launcher.planning.gpus import GpuType
from launcher.planning.memory import gib
from launcher.planning.model_config import config_of
from launcher.planning.plan import BatchPlan, Plan, Refused

NEARLY = 0.98
"""A smaller micro-batch has to take at most this share of the step of a larger one."""
WAYS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Room:
    """What a plan may take, and what computes it."""

    memory_bytes: int
    """Of a rank's device."""
    most: int
    """The largest micro-batch worth having."""
    micro: int | None = None
    """One that is asked for."""
    gpu: GpuType | None = None
    host_memory_bytes: int = 0
    """Of a node's own memory, for what is offloaded; 0 where it is not known."""
    trace: Trace | None = None
    """Goes by the model's real class in the place of the formulas."""
    slack: float | None = None
    """What runs on this machine have shown of the allocator; None where none did."""

    @property
    def source(self) -> str:
        return "the trace" if self.trace else "the formulas"

    def forecast(self, plan: Plan) -> Forecast | None:
        """Of a plan in this room."""
        return forecast(plan, self.memory_bytes, self.gpu, 1.0, self.trace, self.host_memory_bytes, self.slack)

    def usable(self, plan: Plan) -> int:
        """Bytes of a rank's device that a plan may fill."""
        return int(self.memory_bytes * USABLE[plan.mesh.device])


@dataclass(frozen=True)
class Choice:
    """Recomputation and micro-batch, each with why."""

    way: ActivationCheckpointing
    batch: BatchPlan
    reason: str
    limit: str
    forecast: Forecast


def cut_of(plan: Plan) -> str:
    """Engine and cut in a few words: `FSDP full, 4 x 8`, `ZeRO-3, optimizer offloaded`."""
    if plan.zero is not None:
        name = f"ZeRO-{plan.zero.stage}"
    else:
        name = f"{'FSDP' if plan.engine == 'fsdp' else plan.engine} {plan.sharding}, {plan.mesh.replicate} x {plan.mesh.shard}"
    return name if plan.offload == "none" else f"{name}, {plan.offload} offloaded"


def known(plan: Plan) -> bool:
    """Whether the formulas know the plan's model and task."""
    config = config_of(plan.model)
    try:
        knows = plan.model.adapter is None or (config or {}).get("model_type") in WITH_ADAPTERS
        return config is not None and knows and program_of(config, traits=tasks.find(plan.task).traits) is not None
    except KeyError:
        return False


def with_batch(plan: Plan, micro: int, way: ActivationCheckpointing | None = None) -> Plan:
    """The plan with another micro-batch and the same global batch; `micro` divides a rank's samples."""
    batch = plan.batch
    per_rank = batch.micro_batch_size * batch.accumulation_steps
    changed = batch.model_copy(update={"micro_batch_size": micro, "accumulation_steps": per_rank // micro})
    return plan.model_copy(update={"batch": changed, "activation_checkpointing": way or plan.activation_checkpointing})


def choose(plan: Plan, room: Room, ways: tuple[ActivationCheckpointing, ...], refused: list[Refused] | None = None) -> Choice | None:
    """The fastest recomputation and micro-batch that fit; without a GPU of the table the least recomputation is taken for the fastest.

    `ways` are those that may be chosen. None where nothing fits. What was looked at and not taken is written to `refused`.
    """
    per_rank = plan.batch.micro_batch_size * plan.batch.accumulation_steps
    sizes = [room.micro] if room.micro is not None else sorted((n for n in divisors(per_rank) if n <= max(1, room.most)), reverse=True)
    refused = [] if refused is None else refused
    usable, least = room.usable(plan), least_bytes(plan, room.trace)
    if least > usable:
        reason = f"{gib(least)} of the {gib(usable)} of a rank whatever a pass takes"
        refused.append(Refused(what=cut_of(plan), why="does not fit", reason=reason))
        return None
    failed: list[Forecast] = []
    found: list[tuple[float, Forecast]] = []
    for number, way in enumerate(ways):
        made, smallest = _best(plan, room, way, sizes)
        if made is not None:
            found.append((made.speed.step if made.speed else float(number), made))
            if made.speed is None:
                break
        elif smallest is not None:
            failed.append(smallest)
    if failed:
        words = " or ".join(made.plan.activation_checkpointing for made in failed)
        lack = min(failed, key=lambda made: made.footprint.highest.total).lack
        refused.append(Refused(what=f"{cut_of(plan)}, recompute {words}", why="does not fit", reason=f"{lack} at the least"))
    if not found:
        return None
    shortest, best = min(found, key=lambda pair: pair[0])
    for step, made in found:
        if made is not best and made.speed:
            what = f"{cut_of(plan)}, recompute {made.plan.activation_checkpointing}, {made.plan.batch.micro_batch_size} a pass"
            refused.append(Refused(what=what, why="slower", reason=f"{step / shortest:.2f}x the step"))
    needed = best.footprint.highest
    reason = f"{gib(needed.total)} of the {gib(usable)} that can be used of a rank, by {room.source} ({needed.name}: {needed.where})"
    limit = _why_no_more(best, room, sizes)
    return Choice(best.plan.activation_checkpointing, best.plan.batch, reason, limit, best)


def _why_no_more(best: Forecast, room: Room, sizes: list[int]) -> str:
    taken = best.plan.batch.micro_batch_size
    if taken == sizes[0]:
        return f"more than {room.most} are no faster"
    larger = room.forecast(with_batch(best.plan, sizes[sizes.index(taken) - 1]))
    if larger is not None and larger.fits and larger.speed and best.speed:
        return f"{larger.plan.batch.micro_batch_size} take {larger.speed.step / best.speed.step:.2f}x the step"
    return f"more would not fit into {gib(room.usable(best.plan))}"


def _best(plan: Plan, room: Room, way: ActivationCheckpointing, sizes: list[int]) -> tuple[Forecast | None, Forecast | None]:
    """The micro-batch that takes the least time of those that fit, and one that was seen not to fit: the smallest that was looked at.

    Of those that are nearly as fast it is the largest: kernels like it, which the speed model does not know.
    """
    best, failed = _largest(plan, room, way, sizes)
    if best is None or best.speed is None:
        return best, failed
    for size in sizes[sizes.index(best.plan.batch.micro_batch_size) + 1 :]:
        smaller = room.forecast(with_batch(plan, size, way))
        if smaller is not None and smaller.fits and smaller.speed and smaller.speed.step < NEARLY * best.speed.step:
            best = smaller
    return best, failed


def _largest(plan: Plan, room: Room, way: ActivationCheckpointing, sizes: list[int]) -> tuple[Forecast | None, Forecast | None]:
    """The largest micro-batch that fits, and one that was seen not to: the smallest that was looked at.

    Memory grows with it, so that halving finds it; but for the largest, which is looked at first: where it is all that a rank has, no
    gradients wait for another pass, and it may need less than smaller ones.
    """
    failed: Forecast | None = None
    best: Forecast | None = None
    low, high, middle = 0, len(sizes) - 1, 0
    while low <= high:
        made = room.forecast(with_batch(plan, sizes[middle], way))
        if made is not None and made.fits:
            best, high = made, middle - 1
        else:
            failed, low = made, middle + 1
        middle = (low + high) // 2
    return best, failed
