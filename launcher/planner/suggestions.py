"""Suggest plans that fit, nearest to one that does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from launcher.planner.candidates import with_cut
from launcher.planner.forecast import Forecast, forecast, sizes_for
from launcher.planner.memory.estimate import Estimator
from launcher.planner.plan import Plan
from launcher.planner.resolve.batch import largest_divisor, with_batch
from launcher.planner.target import GPUS_PER_NODE

_MORE_NODES = 64
"""At most this multiple of the nodes is tried."""


class Suggestion(NamedTuple):
    """A plan that fits in place of one that does not."""

    text: str
    """Keys to change, and in brackets their cost: `cluster.nodes: 2 (16 ranks)`."""
    forecast: Forecast


def nearest_that_fit(wanted: Forecast, most: int = 4, per_node: int = GPUS_PER_NODE) -> list[Suggestion]:
    """Return changes that make a plan fit, the smallest first.

    Each kind of change is the least that will do, alone or with a smaller micro-batch or more recomputation.
    per_node: GPUs per node.
    """
    suggestions: list[Suggestion] = []
    taken: list[dict[str, object]] = []
    for other in _that_fit(wanted, per_node):
        changed = changes(wanted.plan, other.plan)
        # Changes that include a sufficient smaller one are no alternative.
        if any(smaller.items() <= changed.items() for smaller in taken):
            continue
        taken.append(changed)
        num_ranks = other.plan.mesh.world_size
        remarks = [f"{num_ranks} ranks"] if num_ranks != wanted.plan.mesh.world_size else []
        remarks += ["slower: it crosses PCIe every step"] if "memory.offload" in changed else []
        text = ", ".join(f"{key}: {value}" for key, value in changed.items())
        suggestions.append(Suggestion(f"{text} ({'; '.join(remarks)})" if remarks else text, other))
        if len(suggestions) == most:
            break
    return suggestions


def least(wanted: Forecast) -> Forecast:
    """Return the forecast with the least memory for activations: micro-batch 1, full recomputation."""
    return _instead(wanted, with_batch(wanted.plan, 1, "full"))


def changes(before: Plan, after: Plan) -> dict[str, object]:
    """Return the job keys in which two plans differ, with the second plan's values."""
    old, new = _keys(before), _keys(after)
    return {key: value for key, value in new.items() if value != old[key]}


def _keys(plan: Plan) -> dict[str, object]:
    mesh = plan.mesh
    ranks = "cluster.gpus_per_node" if mesh.device == "cuda" else "cluster.ranks_per_node"
    return {
        ranks: mesh.ranks_per_node,
        "cluster.nodes": mesh.nodes,
        "data.max_length": plan.data.max_length,
        "memory.offload": plan.offload,
        "parallel.shard": plan.sharding,
        "parallel.replicate": mesh.dp_replicate,
        "batch.micro_batch_size": plan.batch.micro_batch_size,
        "memory.activation_checkpointing": plan.activation_checkpointing,
    }


def _that_fit(wanted: Forecast, per_node: int) -> Iterator[Forecast]:
    """Yield plans that fit: first other sharding, micro-batch or recomputation alone, then larger changes."""
    plan = wanted.plan
    passes = (
        with_batch(plan, 1),
        with_batch(plan, plan.batch.micro_batch_size, "full"),
        with_batch(plan, 1, "full"),
    )
    for changed in (*_cut_more(plan), *passes):
        if _may_fit(wanted, changed) and (other := _instead(wanted, changed)).fits:
            yield other
    for plans in _larger_changes(plan, per_node):
        fitting = (_with_smaller_pass(wanted, changed) for changed in plans if _may_fit(wanted, changed))
        smaller = next((each for each in fitting if each is not None), None)
        if smaller is not None:
            yield smaller


def _instead(wanted: Forecast, plan: Plan) -> Forecast:
    """Return the forecast of another plan on the same target."""
    # How many samples an epoch has depends on their maximum length.
    same = plan.data.max_length == wanted.plan.data.max_length
    sizes = wanted.sizes if same else sizes_for(plan, wanted.target)
    return forecast(plan, wanted.target, wanted.program, sizes)


def _may_fit(wanted: Forecast, plan: Plan) -> bool:
    """Return whether a plan is worth a forecast, by its quickly computed minimum memory."""
    target = wanted.target
    usable = target.usable_bytes(plan.mesh.device)
    return not target.memory_bytes or Estimator(plan, wanted.program).least() <= usable


def _with_smaller_pass(wanted: Forecast, plan: Plan) -> Forecast | None:
    """Return a plan's forecast, with a smaller micro-batch or recomputation if needed; None if none fits."""
    judged = _instead(wanted, plan)
    if judged.fits:
        return judged
    smallest = least(judged)
    if not smallest.fits:
        return None
    smaller = _instead(wanted, with_batch(plan, 1))
    return smaller if smaller.fits else smallest


def _larger_changes(plan: Plan, per_node: int) -> Iterator[Iterable[Plan]]:
    """Yield the larger kinds of changes, the cheapest first; each as its plans, the nearest first."""
    yield from ((cut,) for cut in _cut_more(plan))
    yield from ((moved,) for moved in _offloaded(plan))
    mesh = plan.mesh
    num_ranks = [mesh.ranks_per_node]
    if mesh.device == "cuda" and mesh.nodes == 1:
        counts = range(mesh.ranks_per_node + 1, per_node + 1)
        wider = [other for count in counts if (other := on_more_ranks(plan, 1, count)) is not None]
        num_ranks += [other.mesh.ranks_per_node for other in wider[-1:]]
        yield wider
    nodes = range(mesh.nodes + 1, mesh.nodes * _MORE_NODES + 1)
    yield (
        other
        for count in nodes
        for ranks in num_ranks
        if (other := on_more_ranks(plan, count, ranks)) is not None
    )
    lengths = [length for length in (plan.data.max_length // 2, plan.data.max_length // 4) if length >= 8]
    yield (
        plan.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})})
        for length in lengths
    )


def _cut_more(plan: Plan) -> Iterator[Plan]:
    """Yield the plan fully sharded, with one replica, or both, where it is not."""
    mesh, full = plan.mesh, plan.sharding == "full"
    if mesh.world_size == 1:
        return
    if not full and plan.sharding != "none":
        yield fully_cut(plan, mesh.dp_replicate)
    if mesh.dp_replicate > 1 and plan.sharding != "none":
        yield with_cut(plan, 1, plan.sharding)
    if not full:
        yield fully_cut(plan, 1)


def fully_cut(plan: Plan, replicate: int) -> Plan:
    """Return the fully sharded plan; ZeRO-3 does not allow selective recomputation."""
    cut = with_cut(plan, replicate, "full")
    if plan.zero is not None and plan.activation_checkpointing == "selective":
        return cut.model_copy(update={"activation_checkpointing": "full"})
    return cut


def _offloaded(plan: Plan) -> Iterator[Plan]:
    """Yield the plan with more offloaded, unless the job left that open, as it was tried then."""
    decided = {decision.key for decision in plan.decisions}
    if plan.training.needs_whole_rows:
        return
    if plan.mesh.device != "cuda" or plan.offload != "none" or "memory.offload" in decided:
        return
    if plan.sharding == "none" and "parallel.shard" in decided:
        plan = fully_cut(plan, plan.mesh.dp_replicate)  # as the planner has it where something is offloaded
    if plan.zero is not None:
        yield plan.model_copy(update={"offload": "optimizer"})
    if plan.zero is None or plan.zero.stage == 3:
        yield plan.model_copy(update={"offload": "parameters"})


def on_more_ranks(plan: Plan, nodes: int, ranks_per_node: int) -> Plan | None:
    """Return the plan on more ranks, unsharded replicas sharded; None if batch or replicas do not divide."""
    mesh, batch, world_size = plan.mesh, plan.batch, nodes * ranks_per_node
    copies = 1 if plan.sharding == "none" else mesh.dp_replicate
    if batch.global_batch_size % world_size or world_size % copies:
        return None
    per_rank = batch.global_batch_size // world_size
    micro = largest_divisor(per_rank, batch.micro_batch_size)
    sizes = {"data_parallel_size": world_size, "micro_batch_size": micro}
    sizes["accumulation_steps"] = per_rank // micro
    wider = {"nodes": nodes, "ranks_per_node": ranks_per_node, "world_size": world_size}
    other = plan.model_copy(
        update={"mesh": mesh.model_copy(update=wider), "batch": batch.model_copy(update=sizes)}
    )
    return (
        fully_cut(other, copies)
        if plan.sharding in ("none", "full")
        else with_cut(other, copies, plan.sharding)
    )
