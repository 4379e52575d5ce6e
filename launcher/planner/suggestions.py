"""Suggest what would fit: the plans nearest to one that does not, and what to try after out of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from launcher.planner.candidates import with_cut
from launcher.planner.forecast import Forecast, forecast, forecast_here, least_bytes
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import STAGED, Estimator
from launcher.planner.memory.limits import gib
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import Plan
from launcher.planner.resolve.batch import divisors, largest_divisor, with_batch
from launcher.planner.target import GPUS_PER_NODE, USABLE, Target

_MORE_NODES = 64
"""So many times the nodes are looked at, at most."""


class Suggestion(NamedTuple):
    """A plan that fits in place of one that does not."""

    text: str
    """What to write, and in brackets what it costs: `cluster.nodes: 2 (16 ranks)`."""
    forecast: Forecast


def nearest_that_fit(wanted: Forecast, most: int = 4, per_node: int = GPUS_PER_NODE) -> list[Suggestion]:
    """Return the changes of a plan that does not fit after which it does, the smallest first.

    Of each kind of change it is the least that will do: by itself, or with a smaller pass. per_node: the GPUs
    that a node has.
    """
    suggestions: list[Suggestion] = []
    taken: list[dict[str, object]] = []
    for other in _that_fit(wanted, per_node):
        changed = changes(wanted.plan, other.plan)
        # What holds a change that will do by itself is no other one.
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
    """Return the plan's forecast with the least that a pass can take: one sample, all computed again."""
    return _instead(wanted, with_batch(wanted.plan, 1, "full")) or wanted


def changes(before: Plan, after: Plan) -> dict[str, object]:
    """Return the keys of a job in which two plans differ, as the second has them."""
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
    """Yield plans that fit: another cut or pass alone, then other changes with the smaller pass they take."""
    plan = wanted.plan
    passes = (
        with_batch(plan, 1),
        with_batch(plan, plan.batch.micro_batch_size, "full"),
        with_batch(plan, 1, "full"),
    )
    for changed in (*_cut_more(plan), *passes):
        other = _instead(wanted, changed) if _may_fit(wanted, changed) else None
        if other is not None and other.fits:
            yield other
    for plans in _larger_changes(plan, per_node):
        fitting = (_with_smaller_pass(wanted, changed) for changed in plans if _may_fit(wanted, changed))
        other = next((each for each in fitting if each is not None), None)
        if other is not None:
            yield other


def _instead(wanted: Forecast, plan: Plan) -> Forecast | None:
    """Return the forecast of another plan on the same target."""
    return forecast(plan, wanted.target, program=wanted.program)


def _may_fit(wanted: Forecast, plan: Plan) -> bool:
    """Return whether a plan is worth a forecast: what it needs whatever a pass takes is quickly known."""
    target = wanted.target
    usable = target.usable_bytes(plan.mesh.device)
    return not target.memory_bytes or least_bytes(plan, wanted.program) <= usable


def _with_smaller_pass(wanted: Forecast, plan: Plan) -> Forecast | None:
    """Return a plan's forecast, with a smaller pass where it takes that; None where no pass fits."""
    judged = _instead(wanted, plan)
    if judged is None or judged.fits:
        return judged
    smallest = least(judged)
    if not smallest.fits:
        return None
    smaller = _instead(wanted, with_batch(plan, 1))
    return smaller if smaller is not None and smaller.fits else smallest


def _larger_changes(plan: Plan, per_node: int) -> Iterator[Iterable[Plan]]:
    """Yield kinds of changes besides the pass, the cheapest first; of each its plans, the nearest first."""
    yield from ((cut,) for cut in _cut_more(plan))
    yield from ((moved,) for moved in _offloaded(plan))
    mesh = plan.mesh
    num_ranks = [mesh.ranks_per_node]
    if mesh.device == "cuda" and mesh.nodes == 1:
        counts = range(mesh.ranks_per_node + 1, per_node + 1)
        wider = [other for count in counts if (other := _on_more(plan, 1, count)) is not None]
        num_ranks += [other.mesh.ranks_per_node for other in wider[-1:]]
        yield wider
    nodes = range(mesh.nodes + 1, mesh.nodes * _MORE_NODES + 1)
    yield (
        other for count in nodes for ranks in num_ranks if (other := _on_more(plan, count, ranks)) is not None
    )
    lengths = [length for length in (plan.data.max_length // 2, plan.data.max_length // 4) if length >= 8]
    yield (
        plan.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})})
        for length in lengths
    )


def _cut_more(plan: Plan) -> Iterator[Plan]:
    """Yield the plan cut in full, in one copy, or both, where it is not."""
    mesh, full = plan.mesh, plan.sharding == "full"
    if mesh.world_size == 1:
        return
    if not full and plan.sharding != "none":
        yield _fully_cut(plan, mesh.dp_replicate)
    if mesh.dp_replicate > 1 and plan.sharding != "none":
        yield with_cut(plan, 1, plan.sharding)
    if not full:
        yield _fully_cut(plan, 1)


def _fully_cut(plan: Plan, replicate: int) -> Plan:
    """Return the plan with everything cut; ZeRO's third stage does not allow selective recomputation."""
    cut = with_cut(plan, replicate, "full")
    if plan.zero is not None and plan.activation_checkpointing == "selective":
        return cut.model_copy(update={"activation_checkpointing": "full"})
    return cut


def _offloaded(plan: Plan) -> Iterator[Plan]:
    """Yield the plan with more offloaded; where the job leaves that open, it was looked at already."""
    decided = {decision.key for decision in plan.decisions}
    if plan.training.optimizer == "muon":
        return
    if plan.mesh.device != "cuda" or plan.offload != "none" or "memory.offload" in decided:
        return
    if plan.sharding == "none" and "parallel.shard" in decided:
        plan = _fully_cut(plan, plan.mesh.dp_replicate)  # as the planner has it where something is offloaded
    if plan.zero is not None:
        yield plan.model_copy(update={"offload": "optimizer"})
    if plan.zero is None or plan.zero.stage == 3:
        yield plan.model_copy(update={"offload": "parameters"})


def _on_more(plan: Plan, nodes: int, ranks_per_node: int) -> Plan | None:
    """Return the plan on more ranks, whole copies cut over them; None where batch or copies do not divide."""
    mesh, batch, world_size = plan.mesh, plan.batch, nodes * ranks_per_node
    copies = 1 if plan.sharding == "none" else mesh.dp_replicate
    if batch.global_batch_size % world_size or world_size % copies:
        return None
    per_rank = batch.global_batch_size // world_size
    micro = largest_divisor(per_rank, batch.micro_batch_size)
    sizes = {
        "data_parallel_size": world_size,
        "micro_batch_size": micro,
        "accumulation_steps": per_rank // micro,
    }
    wider = {"nodes": nodes, "ranks_per_node": ranks_per_node, "world_size": world_size}
    other = plan.model_copy(
        update={"mesh": mesh.model_copy(update=wider), "batch": batch.model_copy(update=sizes)}
    )
    return (
        _fully_cut(other, copies)
        if plan.sharding in ("none", "full")
        else with_cut(other, copies, plan.sharding)
    )


@dataclass(frozen=True)
class Advice:
    """The next thing to try."""

    options: str = ""
    """What to add to `launcher resume RUN`; empty where nothing on this machine is known to help."""
    reason: str = ""
    """One clause with the figures; empty where the options speak for themselves."""


def less_memory(plan: Plan, hardware: Hardware, peak: int = 0, profiles: Profiles = CACHED) -> Advice:
    """Return the cheapest change after which a plan would have fitted: a smaller pass, else another cut.

    peak: bytes that a rank was seen to have, where that was measured. Of a model whose passes cannot be
    forecast, what its state takes decides.
    """
    memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    results = profiles.find(plan)
    advice = (
        _smaller_pass(plan, hardware, peak, results) if memory and not isinstance(results, Unknown) else None
    )
    if advice is not None:
        return advice
    micro = plan.batch.micro_batch_size
    smaller = "" if plan.activation_checkpointing == "full" else "--set memory.activation_checkpointing=full"
    smaller = f"--set batch.micro_batch_size={largest_divisor(micro, micro // 2)}" if micro > 1 else smaller
    if (isinstance(results, Unknown) and results.profile is None) or not memory or plan.offload != "none":
        return Advice(smaller)
    usable = Target(memory).usable_bytes(plan.mesh.device)
    if smaller and _least_needed(plan, results) <= usable:
        return Advice(smaller)
    return _another_cut(plan, results, hardware, memory)


def _smaller_pass(plan: Plan, hardware: Hardware, peak: int, program: Program) -> Advice | None:
    """Return the fastest smaller pass that fits; None where none does.

    Fewer samples at a time cost least, then more recomputation, then both.
    """
    wanted = forecast_here(plan, hardware, program=program)
    assert wanted is not None  # its program is known
    expected, memory = wanted.footprint.highest, wanted.target.memory_bytes
    # What was seen and not foreseen counts for every other plan too.
    usable = wanted.target.usable_bytes(plan.mesh.device) - max(0, peak - expected.total)
    micro = plan.batch.micro_batch_size
    sizes = [size for size in reversed(divisors(micro * plan.batch.accumulation_steps)) if size <= micro]
    fitting: list[tuple[str, Forecast]] = []
    for recompute in dict.fromkeys((plan.activation_checkpointing, "full")):
        for size in sizes:
            smaller = with_batch(plan, size, recompute)
            options = " ".join(f"--set {key}={value}" for key, value in changes(plan, smaller).items())
            other = forecast_here(smaller, hardware, program=program) if options else None
            if other is None or not other.fits_host:
                continue
            if other.footprint.highest.total < expected.total and other.footprint.highest.total <= usable:
                fitting.append((options, other))
    if not fitting:
        return None
    options, other = min(fitting, key=lambda pair: pair[1].step)
    foreseen = f"the plan expected {gib(expected.total)} at the highest ({expected.name}: {expected.where})"
    measured = f", a rank had {gib(peak)}" if peak else ""
    then = f"with this it is {gib(other.footprint.highest.total)} of {gib(memory)}"
    return Advice(options, f"{foreseen}{measured}; {then}")


def _least_needed(plan: Plan, found: Program | Unknown) -> int:
    """Return the bytes of a rank with one sample a pass, all of it computed again; of the state alone where no
    pass can be forecast. A copy for saving in the background is not among them: a save can do without."""
    if isinstance(found, Unknown):
        return _states(plan, found)
    phases = Estimator(with_batch(plan, 1, "full"), found).footprint().phases
    return max(phase.total - phase.parts.get(STAGED, 0) for phase in phases)


def _states(plan: Plan, found: Program | Unknown) -> int:
    program = found.profile if isinstance(found, Unknown) else found
    return 0 if program is None else least_bytes(plan, program)


def _another_cut(plan: Plan, found: Program | Unknown, hardware: Hardware, memory: int) -> Advice:
    """Return the fewest ranks that hold the training state and a pass, or that none do."""
    usable, world_size = Target(memory).usable_bytes(plan.mesh.device), plan.mesh.world_size
    needed = f"the model and its training state take about {gib(_least_needed(plan, found))}"
    have = f"{needed} of a rank, which has {gib(memory)}"
    full = _fully_cut(plan, 1)
    if _states(full, found) < _states(plan, found) and _least_needed(full, found) <= usable:
        copies = " --set parallel.replicate=1" if plan.mesh.dp_replicate > 1 else ""
        then = f"cut in full over the {world_size} ranks it is {gib(_least_needed(full, found))}"
        return Advice(f"--set parallel.shard=full{copies}", f"{have}; {then}")
    more = [ranks for ranks in divisors(plan.batch.global_batch_size) if ranks > world_size]
    wider = [_fully_cut(other, 1) for ranks in more if (other := _on_more(full, 1, ranks)) is not None]
    enough = next((cut for cut in wider if _least_needed(cut, found) <= usable), None)
    if enough is not None:
        return _on_so_many(plan, enough, _least_needed(enough, found), hardware, have)
    if _least_needed(plan, found) <= usable:
        return Advice(reason=f"{have}: by that it should do, and nothing that needs less is left to change")
    most = wider[-1] if wider else full
    still = gib(_least_needed(most, found))
    then = f"cut over {most.mesh.world_size} ranks, one for each sample of the batch, it is still {still}"
    return Advice(reason=f"{have}; {then}")


def _on_so_many(plan: Plan, cut: Plan, num_bytes: int, hardware: Hardware, have: str) -> Advice:
    """Return how to have so many ranks, or why this machine cannot."""
    ranks = cut.mesh.world_size
    then = f"{have}; cut over {ranks} ranks it is {gib(num_bytes)}"
    if plan.mesh.device == "cuda":
        here = ranks <= len(hardware.gpus)
        instead = "take more nodes, or have ZeRO-3 keep it in the host's memory"
        elsewhere = f"{then}, but {len(hardware.gpus)} GPUs are here: {instead}"
        offloaded = (
            "--set parallel.engine=deepspeed --set parallel.shard=full --set memory.offload=parameters"
        )
    else:
        # Only where the system caps each process do more of them have more.
        here = bool(hardware.process_bytes) and ranks * num_bytes <= hardware.memory_bytes * USABLE["cpu"]
        instead = "take more nodes, or let ZeRO-3 offload to NVMe (memory.offload_to)"
        elsewhere = f"{then}, which this machine has not: {instead}"
        offloaded = ""
    if not here:
        return Advice(offloaded, elsewhere)
    micro = largest_divisor(plan.batch.global_batch_size // ranks, plan.batch.micro_batch_size)
    options = [f"--nproc {ranks}"]
    if micro != plan.batch.micro_batch_size:
        options.append(f"--set batch.micro_batch_size={micro}")
    if not any(decision.key == "parallel.shard" for decision in plan.decisions):
        options += ["--set parallel.shard=full"] if plan.sharding != "full" else []
        options += ["--set parallel.replicate=1"] if plan.mesh.dp_replicate > 1 else []
    return Advice(" ".join(options), then)
