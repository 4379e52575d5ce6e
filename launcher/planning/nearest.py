"""Suggest the nearest plans that fit, the smallest change first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from launcher.job.schema import Sharding
from launcher.planning.batch import divisors
from launcher.planning.fitting import with_batch
from launcher.planning.forecast import Forecast, forecast
from launcher.planning.plan import Plan
from launcher.planning.sharding import STAGES

PER_NODE = 8
"""GPUs of a node where nothing says how many it has."""
_MORE_NODES = 64
"""So many times the nodes are looked at, at most."""


def nearest_that_fit(made: Forecast, most: int = 4, per_node: int = PER_NODE) -> list[tuple[str, Forecast]]:
    """Changes of a plan that does not fit after which it does, the smallest first: what to write, and the forecast of it.

    Of each kind of change it is the least that will do: by itself, or with a smaller pass. `per_node`: the GPUs that a node has.
    """
    found: list[tuple[str, Forecast]] = []
    taken: list[dict[str, object]] = []
    for other in _that_fit(made, per_node):
        changed = changes(made.plan, other.plan)
        # What holds a change that will do by itself is no other one.
        if any(smaller.items() <= changed.items() for smaller in taken):
            continue
        taken.append(changed)
        found.append((words(made.plan, other.plan), other))
        if len(found) == most:
            break
    return found


def _that_fit(made: Forecast, per_node: int) -> Iterator[Forecast]:
    """Plans that do, the smallest changes first: of the cut or the pass alone, then others, with a smaller pass where it takes that."""
    plan = made.plan
    passes = (with_batch(plan, 1), with_batch(plan, plan.batch.micro_batch_size, "full"), with_batch(plan, 1, "full"))
    for changed in (*_cut_more(plan), *passes):
        if (said := _in_its_place(made, changed)) is not None and said.fits:
            yield said
    for plans in _changes(plan, per_node):
        if (other := next((said for changed in plans if (said := _fitting(made, changed)) is not None), None)) is not None:
            yield other


def least(made: Forecast) -> Forecast:
    """The forecast of the same plan with the least that a pass can take: one sample, all of it computed again."""
    return _in_its_place(made, with_batch(made.plan, 1, "full")) or made


def changes(before: Plan, after: Plan) -> dict[str, object]:
    """The keys of a job in which two plans differ, as the second has them."""
    old, new = _keys(before), _keys(after)
    return {key: value for key, value in new.items() if value != old[key]}


def words(before: Plan, after: Plan) -> str:
    """What to write to come from one plan to another."""
    changed = changes(before, after)
    remarks = [f"{after.mesh.world_size} ranks"] if after.mesh.world_size != before.mesh.world_size else []
    remarks += ["slower: it crosses PCIe every step"] if "memory.offload" in changed else []
    said = ", ".join(f"{key}: {value}" for key, value in changed.items())
    return f"{said} ({'; '.join(remarks)})" if remarks else said


def _keys(plan: Plan) -> dict[str, object]:
    mesh = plan.mesh
    ranks = "cluster.gpus_per_node" if mesh.device == "cuda" else "cluster.ranks_per_node"
    return {
        ranks: mesh.ranks_per_node,
        "cluster.nodes": mesh.nodes,
        "data.max_length": plan.data.max_length,
        "memory.offload": plan.offload,
        "parallel.shard": plan.sharding,
        "parallel.replicate": mesh.replicate,
        "batch.micro_batch_size": plan.batch.micro_batch_size,
        "memory.activation_checkpointing": plan.activation_checkpointing,
    }


def _in_its_place(made: Forecast, plan: Plan) -> Forecast | None:
    """The forecast of another plan where this one is to run: its memory, rates, disk, and what runs there have shown."""
    correction = made.speed.correction if made.speed else 1.0
    return forecast(
        plan, made.memory_bytes, made.gpu, correction, made.trace, made.host_memory_bytes, made.slack, made.slack_kind, made.disk_rate
    )


def _fitting(made: Forecast, plan: Plan) -> Forecast | None:
    """A plan in its place by itself where it fits, else with the smaller pass that does; None where not even the least does."""
    said = _in_its_place(made, plan)
    if said is None or said.fits:
        return said
    smallest = least(said)
    if not smallest.fits:
        return None
    smaller = _in_its_place(made, with_batch(plan, 1))
    return smaller if smaller is not None and smaller.fits else smallest


def _changes(plan: Plan, per_node: int) -> Iterator[Iterable[Plan]]:
    """What may be changed besides the pass, what costs least first; of each kind its plans, the least changed first."""
    yield from ((cut,) for cut in _cut_more(plan))
    yield from ((moved,) for moved in _offloaded(plan))
    mesh = plan.mesh
    wider = []
    if mesh.device == "cuda" and mesh.nodes == 1:
        wider = [made for count in range(mesh.ranks_per_node + 1, per_node + 1) if (made := _on_more(plan, 1, count))]
        yield wider
    ranks = [mesh.ranks_per_node, *(made.mesh.ranks_per_node for made in wider[-1:])]
    counts = range(mesh.nodes + 1, mesh.nodes * _MORE_NODES + 1)
    yield (made for count in counts for number in ranks if (made := _on_more(plan, count, number)))
    lengths = [length for length in (plan.data.max_length // 2, plan.data.max_length // 4) if length >= 8]
    yield (plan.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})}) for length in lengths)


def _cut_more(plan: Plan) -> Iterator[Plan]:
    """Cut in full, in one copy, or both, where it is not."""
    mesh = plan.mesh
    if mesh.world_size == 1:
        return
    full = plan.sharding == "full"
    if not full and plan.sharding != "none":
        yield _cut(plan, mesh.replicate)
    if mesh.replicate > 1 and plan.sharding != "none":
        yield _cut(plan, 1, plan.sharding)
    if not full:
        yield _cut(plan, 1)


def _cut(plan: Plan, replicate: int, sharding: Sharding = "full") -> Plan:
    """The plan cut otherwise; ZeRO's third stage does not allow selective recomputation."""
    mesh = plan.mesh.model_copy(
        update={"replicate": replicate, "shard": plan.mesh.world_size // replicate, "reshard_after_forward": sharding == "full"}
    )
    cut = plan.model_copy(update={"sharding": sharding, "mesh": mesh})
    if plan.zero is None:
        return cut
    way = "full" if (sharding, plan.activation_checkpointing) == ("full", "selective") else plan.activation_checkpointing
    return cut.model_copy(update={"zero": plan.zero.model_copy(update={"stage": STAGES[sharding]}), "activation_checkpointing": way})


def _offloaded(plan: Plan) -> Iterator[Plan]:
    """Where the job leaves it open, offloading was looked at already."""
    decided = {decision.key for decision in plan.decisions}
    if plan.mesh.device != "cuda" or plan.offload != "none" or "memory.offload" in decided:
        return
    if plan.sharding == "none" and "parallel.shard" in decided:
        plan = _cut(plan, plan.mesh.replicate)  # as the planner has it where something is offloaded
    if plan.zero is not None:
        yield plan.model_copy(update={"offload": "optimizer"})
    if plan.zero is None or plan.zero.stage == 3:
        yield plan.model_copy(update={"offload": "parameters"})


def _on_more(plan: Plan, nodes: int, ranks_per_node: int) -> Plan | None:
    """The plan on more ranks, what was whole on each cut in full over them; None where batch or copies cannot be cut over so many."""
    mesh, batch, world_size = plan.mesh, plan.batch, nodes * ranks_per_node
    copies = 1 if plan.sharding == "none" else mesh.replicate
    if batch.global_batch_size % world_size or world_size % copies:
        return None
    per_rank = batch.global_batch_size // world_size
    micro = max(size for size in divisors(per_rank) if size <= batch.micro_batch_size)
    cut = {"data_parallel_size": world_size, "micro_batch_size": micro, "accumulation_steps": per_rank // micro}
    wider = {"nodes": nodes, "ranks_per_node": ranks_per_node, "world_size": world_size}
    made = plan.model_copy(update={"mesh": mesh.model_copy(update=wider), "batch": batch.model_copy(update=cut)})
    return _cut(made, copies, "full" if plan.sharding == "none" else plan.sharding)
