"""Suggest what needs less memory, after a rank ran out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.job.schema import ActivationCheckpointing
from launcher.planning.batch import divisors
from launcher.planning.fitting import with_batch
from launcher.planning.forecast import USABLE as SHARE
from launcher.planning.forecast import Forecast, forecast_here
from launcher.planning.hardware import Hardware
from launcher.planning.memory import STATE_BYTES, USABLE, Setting, gib
from launcher.planning.model_shape import ModelShape
from launcher.planning.plan import Plan


@dataclass(frozen=True)
class Advice:
    """The next thing to try."""

    options: str = ""
    """What to add to `launcher resume RUN`; empty where nothing on this machine helps, or nothing is known to."""
    reason: str = ""
    """One clause with the figures; empty where the options speak for themselves."""


def less_memory(plan: Plan, hardware: Hardware, peak: int = 0) -> Advice:
    """The cheapest change of the pass that would have fitted, by the formulas where they know the model; else another cut.

    peak: bytes that a rank was seen to have, where that was measured. Where the formulas know nothing, `memory.py`'s rule decides.
    """
    known = _by_the_formulas(plan, hardware, peak)
    if known is not None:
        return known
    smaller = _smaller_pass(plan)
    shape = ModelShape.read(plan.model)
    memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    if shape is None or not memory or plan.offload != "none":
        return Advice(smaller)
    setting = _setting(plan, shape)
    if smaller and _needed(plan, setting) <= memory * USABLE:
        return Advice(smaller)
    return _another_cut(plan, setting, hardware, memory)


def _by_the_formulas(plan: Plan, hardware: Hardware, peak: int) -> Advice | None:
    """None where the formulas do not know the model, or know of no pass that would have fitted."""
    memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    made = forecast_here(plan, hardware) if memory else None
    if made is None:
        return None
    expected = made.footprint.highest
    # What was seen and not foreseen counts for every other plan too.
    unforeseen = max(0, peak - expected.total)
    usable = memory * SHARE[plan.mesh.device] - unforeseen
    fitting = [
        (options, other)
        for options, other in _passes(plan, hardware)
        if other.footprint.highest.total < expected.total and other.footprint.highest.total <= usable and other.fits_host
    ]
    if not fitting:
        return None
    options, other = min(fitting, key=lambda pair: pair[1].speed.step if pair[1].speed else 0.0)
    measured = f", a rank had {gib(peak)}" if peak else ""
    then = f"with this it is {gib(other.footprint.highest.total)} of {gib(memory)}"
    return Advice(options, f"the plan expected {gib(expected.total)} at the highest ({expected.name}: {expected.where}){measured}; {then}")


def _passes(plan: Plan, hardware: Hardware) -> Iterator[tuple[str, Forecast]]:
    """Smaller passes, those that cost least first: fewer samples at a time, then more recomputation, then both."""
    per_rank = plan.batch.micro_batch_size * plan.batch.accumulation_steps
    sizes = [size for size in sorted(divisors(per_rank), reverse=True) if size <= plan.batch.micro_batch_size]
    ways: list[ActivationCheckpointing] = list(dict.fromkeys((plan.activation_checkpointing, "full")))
    for way in ways:
        for size in sizes:
            options = [f"--set batch.micro_batch_size={size}"] if size != plan.batch.micro_batch_size else []
            options += [f"--set memory.activation_checkpointing={way}"] if way != plan.activation_checkpointing else []
            other = forecast_here(with_batch(plan, size, way), hardware)
            if options and other is not None:
                yield " ".join(options), other


def _smaller_pass(plan: Plan) -> str:
    micro = plan.batch.micro_batch_size
    if micro > 1:
        return f"--set batch.micro_batch_size={max(size for size in range(1, micro // 2 + 1) if micro % size == 0)}"
    return "" if plan.activation_checkpointing == "full" else "--set memory.activation_checkpointing=full"


def _setting(plan: Plan, shape: ModelShape) -> Setting:
    gathered = plan.mesh.shard > 1 and not plan.mesh.reshard_after_forward
    return Setting(
        shape,
        plan.precision,
        STATE_BYTES[plan.training.optimizer],
        plan.mesh.shard,
        gathered,
        plan.model.adapter.rank if plan.model.adapter else 0,
    )


def _needed(plan: Plan, setting: Setting) -> int:
    """Bytes of a rank with the least that a pass can take: one sample, all of it computed again."""
    return setting.states() + setting.of_token("full") * plan.data.max_length


def _another_cut(plan: Plan, setting: Setting, hardware: Hardware, memory: int) -> Advice:
    have = f"the model and its training state take about {gib(_needed(plan, setting))} of a rank, which has {gib(memory)}"
    world_size = plan.mesh.world_size
    full = replace(setting, shard=world_size, gathered=False)
    if full.states() < setting.states() and _needed(plan, full) <= memory * USABLE:
        copies = " --set parallel.replicate=1" if plan.mesh.replicate > 1 else ""
        return Advice(f"--set parallel.shard=full{copies}", f"{have}; cut in full over the {world_size} ranks it is {gib(full.states())}")
    found = _more_ranks(plan, setting, memory)
    if found is None and _needed(plan, setting) <= memory * USABLE:
        return Advice(reason=f"{have}: by that it should do, and nothing that needs less is left to change")
    if found is None:
        least = replace(setting, shard=plan.batch.global_batch_size, gathered=False)
        return Advice(reason=f"{have}; cut over {least.shard} ranks, one for each sample of the batch, it is still {gib(least.states())}")
    return _on_so_many(plan, found, hardware, have)


def _more_ranks(plan: Plan, setting: Setting, memory: int) -> Setting | None:
    """The fewest ranks more than now that divide the batch and hold the state, which is then cut in full."""
    more = [ranks for ranks in divisors(plan.batch.global_batch_size) if ranks > plan.mesh.world_size]
    settings = [replace(setting, shard=ranks, gathered=False) for ranks in sorted(more)]
    return next((found for found in settings if _needed(plan, found) <= memory * USABLE), None)


def _on_so_many(plan: Plan, found: Setting, hardware: Hardware, have: str) -> Advice:
    ranks = found.shard
    then = f"{have}; cut over {ranks} ranks it is {gib(found.states())}"
    if plan.mesh.device == "cuda":
        here = ranks <= len(hardware.gpus)
        elsewhere = f"{then}, but {len(hardware.gpus)} GPUs are here: take more nodes, or have ZeRO-3 keep it in the host's memory"
        offloaded = "--set parallel.engine=deepspeed --set parallel.shard=full --set memory.offload=parameters"
    else:
        # Where the system caps each process, more of them have more; where it does not, they only share what the machine has.
        here = bool(hardware.process_bytes) and ranks * found.states() <= hardware.memory_bytes * USABLE
        elsewhere = f"{then}, which this machine has not: take more nodes, or let ZeRO-3 offload to NVMe (memory.offload_to)"
        offloaded = ""
    if not here:
        return Advice(offloaded, elsewhere)
    share = plan.batch.global_batch_size // ranks
    micro = max(size for size in divisors(share) if size <= plan.batch.micro_batch_size)
    options = [f"--nproc {ranks}"]
    if micro != plan.batch.micro_batch_size:
        options.append(f"--set batch.micro_batch_size={micro}")
    asked = not any(decision.key == "parallel.shard" for decision in plan.decisions)
    if plan.sharding != "full" and asked:
        options.append("--set parallel.shard=full")
    if plan.mesh.replicate > 1 and asked:
        options.append("--set parallel.replicate=1")
    return Advice(" ".join(options), then)
