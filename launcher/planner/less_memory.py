"""Advise what to change after a rank ran out of memory."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planner.forecast import Forecast, forecast, sizes_for
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import STAGED, Estimator
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import Plan
from launcher.planner.resolve.batch import divisors, largest_divisor, with_batch
from launcher.planner.suggestions import changes, fully_cut, on_more_ranks
from launcher.planner.target import USABLE, Target, target_here
from launcher.runs.wording import gib, in_phase


@dataclass(frozen=True)
class Advice:
    """The next thing to try."""

    options: str = ""
    """Options to add to `launcher resume RUN`; empty if nothing on this machine is known to help."""
    reason: str = ""
    """One clause with the figures; empty if the options need no explanation."""


def less_memory(plan: Plan, hardware: Hardware, peak: int = 0, profiles: Profiles = CACHED) -> Advice:
    """Return the cheapest change with which a plan would have fitted: a smaller pass, else more sharding.

    peak: a rank's measured peak in bytes, if known. For a model whose activations cannot be forecast, the
    size of its training state decides.
    """
    memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    program = profiles.find(plan)
    if memory and not isinstance(program, Unknown):
        advice = _smaller_pass(plan, hardware, peak, program)
        if advice is not None:
            return advice
    micro = plan.batch.micro_batch_size
    smaller = "" if plan.activation_checkpointing == "full" else "--set memory.activation_checkpointing=full"
    smaller = f"--set batch.micro_batch_size={largest_divisor(micro, micro // 2)}" if micro > 1 else smaller
    if (isinstance(program, Unknown) and program.profile is None) or not memory or plan.offload != "none":
        return Advice(smaller)
    usable = Target(memory).usable_bytes(plan.mesh.device)
    if smaller and _least_needed(plan, program) <= usable:
        return Advice(smaller)
    return _another_cut(plan, program, hardware, memory)


def _smaller_pass(plan: Plan, hardware: Hardware, peak: int, program: Program) -> Advice | None:
    """Return the fastest micro-batch and recomputation with less memory that fit; None if none do.

    Fewer samples at a time cost the least, then more recomputation, then both.
    """
    target = target_here(plan, hardware)
    data = sizes_for(plan, target)
    expected = forecast(plan, target, program, data).footprint.highest
    # The measured excess over the forecast is assumed for every other plan too.
    usable = target.usable_bytes(plan.mesh.device) - max(0, peak - expected.total)
    micro = plan.batch.micro_batch_size
    sizes = [size for size in reversed(divisors(micro * plan.batch.accumulation_steps)) if size <= micro]
    fitting: list[tuple[str, Forecast]] = []
    for recompute in dict.fromkeys((plan.activation_checkpointing, "full")):
        for size in sizes:
            smaller = with_batch(plan, size, recompute)
            options = " ".join(f"--set {key}={value}" for key, value in changes(plan, smaller).items())
            if not options or not (other := forecast(smaller, target, program, data)).fits_host:
                continue
            if other.footprint.highest.total < expected.total and other.footprint.highest.total <= usable:
                fitting.append((options, other))
    if not fitting:
        return None
    options, other = min(fitting, key=lambda pair: pair[1].step)
    foreseen = (
        f"the plan expected {gib(expected.total)} at most, {in_phase(expected.name)} ({expected.where})"
    )
    measured = f", a rank had {gib(peak)}" if peak else ""
    then = f"with this it is {gib(other.footprint.highest.total)} of {gib(target.memory_bytes)}"
    return Advice(options, f"{foreseen}{measured}; {then}")


def _least_needed(plan: Plan, program: Program | Unknown) -> int:
    """Return a rank's bytes with micro-batch 1 and full recomputation, or of the state alone if the rest
    cannot be forecast. They exclude the copy for background saving, which can be switched off."""
    if isinstance(program, Unknown):
        return _states(plan, program)
    phases = Estimator(with_batch(plan, 1, "full"), program).footprint().phases
    return max(phase.total - phase.parts.get(STAGED, 0) for phase in phases)


def _states(plan: Plan, program: Program | Unknown) -> int:
    known = program.profile if isinstance(program, Unknown) else program
    return 0 if known is None else Estimator(plan, known).least()


def _another_cut(plan: Plan, program: Program | Unknown, hardware: Hardware, memory: int) -> Advice:
    """Return advice for full sharding or for the fewest ranks that hold the training state, or that none
    do."""
    usable, world_size = Target(memory).usable_bytes(plan.mesh.device), plan.mesh.world_size
    needed = f"the model and its training state take about {gib(_least_needed(plan, program))}"
    have = f"{needed} of a rank, which has {gib(memory)}"
    full = fully_cut(plan, 1)
    if _states(full, program) < _states(plan, program) and _least_needed(full, program) <= usable:
        copies = " --set parallel.replicate=1" if plan.mesh.dp_replicate > 1 else ""
        then = f"cut in full over the {world_size} ranks it is {gib(_least_needed(full, program))}"
        return Advice(f"--set parallel.shard=full{copies}", f"{have}; {then}")
    more = [ranks for ranks in divisors(plan.batch.global_batch_size) if ranks > world_size]
    wider = [fully_cut(other, 1) for ranks in more if (other := on_more_ranks(full, 1, ranks)) is not None]
    enough = next((cut for cut in wider if _least_needed(cut, program) <= usable), None)
    if enough is not None:
        return _on_so_many(plan, enough, _least_needed(enough, program), hardware, have)
    if _least_needed(plan, program) <= usable:
        return Advice(reason=f"{have}: by that it should do, and nothing that needs less is left to change")
    most = wider[-1] if wider else full
    still = gib(_least_needed(most, program))
    then = f"cut over {most.mesh.world_size} ranks, one for each sample of the batch, it is still {still}"
    return Advice(reason=f"{have}; {then}")


def _on_so_many(plan: Plan, cut: Plan, num_bytes: int, hardware: Hardware, have: str) -> Advice:
    """Return the options for the ranks of `cut`, or why this machine cannot run them."""
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
        # More CPU ranks have more memory in total only if the system limits each process.
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
